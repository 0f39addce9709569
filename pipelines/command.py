"""What the command lines of all programs share: help, config files, limits, missing packages, errors of one line.

Nothing heavy is imported here or by the modules that define flags, so that `--help` and wrong flags answer at once.
"""

import argparse
import ast
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the module's docstring as it is and shows every default that is a value; a help text tells the others."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, "", {}, []) or "%" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%")


class KeyValues(argparse.Action):
    """K=V words as a dict, each V a Python literal or else text, as timm's ParseKwargs reads them."""

    def __call__(self, parser: argparse.ArgumentParser, args: Any, values: Any, option: str | None = None) -> None:
        """Stores the dict."""
        if wrong := [word for word in values if "=" not in word]:
            parser.error(f"{option} {wrong[0]}: give K=V")
        setattr(args, self.dest, {key: _literal(text) for key, _, text in (word.partition("=") for word in values)})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def name(dest: str) -> str:
    """A flag as it is typed on the command line."""
    return f"--{dest.replace('_', '-')}" if dest != "local_rank" else "--local_rank"


def check_minimum(parser: argparse.ArgumentParser, args: argparse.Namespace, minimum: Mapping[str, int]) -> None:
    """Ends the program if a flag is below its minimum."""
    for dest, low in minimum.items():
        value = getattr(args, dest, None)
        if value is not None and value < low:
            parser.error(f"{name(dest)} {value}: give at least {low}")


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """The values of a YAML file that are set; timm writes "" or null for the others."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        parser.error(f"--config {path}: it holds a {type(config).__name__}; write FLAG: VALUE lines")
    return {str(key): value for key, value in config.items() if value is not None and value != ""}


def set_defaults(parser: argparse.ArgumentParser, path: str, config: Mapping[str, Any]) -> None:
    """Uses a config's values as the flags' defaults; a value that its flag would refuse ends the program."""
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    for key in config.keys() & flags.keys():
        try:
            flags[key].default = config_value(flags[key], config[key])
        except (ValueError, TypeError) as error:
            parser.error(f"--config {path}: {key}: {str(config[key])[:80]!r}: {error}")
    if unknown := [f"{key}={value}" for key, value in config.items() if key not in flags and value]:
        print(f"--config {path}: ignored unknown flags: {', '.join(unknown)}", file=sys.stderr)


def config_value(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag would have it from the command line.

    Raises:
        ValueError, TypeError: the flag takes no such value.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("give true or false")
        return value
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise ValueError("give a mapping")
        return value
    if action.nargs == "?" and value is True:
        return action.const
    if action.nargs in (None, "?"):
        return _one(action, value)
    count = action.nargs if isinstance(action.nargs, int) else None
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError(f"give a list of {count or 'one or more'} values")
    return [_one(action, each) for each in value]


def _one(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type or str
    wanted = {int: "an integer", float: "a number", str: "a text"}.get(kind, "a value")
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"give {wanted}")
    try:
        found = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"give {wanted}") from None
    if kind is int and not isinstance(value, str) and found != value:
        raise ValueError(f"give {wanted}")
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"give one of {', '.join(map(str, action.choices))}")
    return found


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


def run(program: str, main: Callable[[], Any]) -> None:
    """Runs a program; errors that a user can mend are one line."""
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        status = f"python -m {program}: {' '.join(str(error).split()) or type(error).__name__}"
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))  # everything is closed; a normal exit takes two seconds with torch
