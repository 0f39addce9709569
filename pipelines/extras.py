"""Optional packages that only some commands need."""

import importlib.util


def require(package: str, purpose: str) -> None:
    """Checks that a package is installed before a command starts work that needs it only at the end.

    Args:
        package: name of the import, such as "sklearn".
        purpose: the flag or command that needs it, for the message.

    Raises:
        ValueError: the package is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{purpose}: it needs the package {package}; install it by pip install '.[demo]'")
