"""What an argument may be: each check returns the value as a plain type, or raises a ValueError in one line.

The message names the argument, its value and what to give. No check takes a bool, text or NaN for a number.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from math import inf, isfinite
from numbers import Real
from typing import SupportsIndex, TypeVar

import numpy as np

_Word = TypeVar("_Word")


def error(name: str, value: object, remedy: str) -> ValueError:
    """The error of every check; for rules between arguments too."""
    return ValueError(f"{name}={_short(repr(value), 100)}: {_short(remedy, 220)}")


def whole(name: str, value: SupportsIndex, minimum: int, limit: int | None = None) -> int:
    """A whole number >= `minimum`, and < `limit`."""
    try:
        number = None if is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum or (limit is not None and number >= limit):
        below = "" if limit is None else f" and < {limit}"
        raise error(name, value, f"give a whole number >= {minimum}{below}")
    return number


def number(name: str, value: float, low: float = -inf, high: float = inf, *, below_high: bool = False) -> float:
    """A finite number in [low, high]; `high` itself is left out with `below_high`."""
    if not (_is_number(value) and low <= value <= high) or (below_high and value == high):
        raise error(name, value, f"give {_range(low, high, below_high)}")
    return float(value)


def fraction(name: str, value: float, below_one: bool = False) -> float:
    """A number in [0, 1], or in [0, 1) where it must be below one."""
    return number(name, value, 0, 1, below_high=below_one)


def flag(name: str, value: bool | np.bool_) -> bool:
    """True or False; neither 1 nor a word, since the text "False" is true."""
    if not isinstance(value, bool | np.bool_):
        raise error(name, value, "give True or False")
    return bool(value)


def one_of(name: str, value: _Word, known: Collection[_Word]) -> _Word:
    """One of the `known` values, of the same type: True is not 1."""
    if not any(isinstance(value, type(word)) and is_bool(value) == is_bool(word) and value == word for word in known):
        raise error(name, value, f"give one of {', '.join(map(repr, known))}")
    return value


def pair(name: str, value: Sequence[float], low: float = -inf, high: float = inf) -> tuple[float, float]:
    """Two finite numbers, each in [low, high]."""
    if not _are_numbers(value, 2) or not all(low <= number <= high for number in value):
        raise error(name, value, f"give two numbers, each {_range(low, high)}")
    return float(value[0]), float(value[1])


def interval(name: str, value: Sequence[float], maximum: float = inf) -> tuple[float, float]:
    """Two finite numbers (low, high) with 0 < low <= high <= `maximum`."""
    if not _are_numbers(value, 2) or not 0 < value[0] <= value[1] <= maximum:
        raise error(name, value, "give (low, high) with 0 < low <= high" + f" <= {maximum}" * isfinite(maximum))
    return float(value[0]), float(value[1])


def channels(name: str, value: Sequence[float], positive: bool = False) -> tuple[float, float, float]:
    """Three finite numbers, one per channel."""
    if not _are_numbers(value, 3) or (positive and min(value) <= 0):
        above = " and above 0" * positive
        raise error(name, value, f"give three numbers, one per channel, in units of [0, 1]{above}")
    return float(value[0]), float(value[1]), float(value[2])


def image_size(name: str, value: SupportsIndex | Sequence[int]) -> tuple[int, int]:
    """(height, width), from one side length, (H, W) or timm's (3, H, W)."""
    try:
        sides: list[SupportsIndex] = list(value) if isinstance(value, Sequence | np.ndarray) else [value, value]
        if len(sides) == 3 and sides[0] == 3:
            sides = sides[1:]
        height, width = (whole(name, side, 1, 2**31) for side in sides)
    except (TypeError, ValueError):  # an array without dimensions is a TypeError
        raise error(name, value, "give a side, (H, W) or (3, H, W), in pixels > 0") from None
    return height, width


def assign(options: object, **checked: object) -> None:
    """Makes these the fields of a frozen dataclass, in its ``__post_init__``."""
    for name, value in checked.items():
        object.__setattr__(options, name, value)


def is_bool(value: object) -> bool:
    """Whether it is a bool, or a bool tensor of PyTorch or array of NumPy, which count as an index too."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, Real) and not is_bool(value) and isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _are_numbers(value: object, count: int) -> bool:
    if isinstance(value, np.ndarray):
        value = value.tolist()  # a number, for an array without dimensions
    return isinstance(value, list | tuple) and len(value) == count and all(map(_is_number, value))


def _range(low: float, high: float, below_high: bool = False) -> str:
    if isfinite(low) and isfinite(high):
        return f"a number in [{low}, {high}{'])'[below_high]}"
    if isfinite(low):
        return f"a finite number >= {low}"
    return f"a finite number {'<' if below_high else '<='} {high}" if isfinite(high) else "a finite number"


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
