"""Packages that only some commands need, beyond those that lumix_dali itself installs."""

import importlib.util


def require(package: str, purpose: str) -> None:
    """Makes sure that a package is there before a command does work that needs it only in the end.

    Args:
        package: what is imported, such as "sklearn".
        purpose: flag or command that needs it, for the message.

    Raises:
        ValueError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{purpose}: it needs the package {package}; install it by pip install '.[demo]'")
