"""Checks of arguments: each returns the value as a plain type, or raises an error that names the remedy."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np

_Word = TypeVar("_Word")


def whole(name: str, value: Any, minimum: int, limit: int | None = None) -> int:
    """A whole number >= `minimum`, and < `limit`."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < minimum or (limit is not None and found >= limit):
        raise ValueError(
            f"{name}={value!r}: give a whole number >= {minimum}" + f" and < {limit}" * (limit is not None)
        )
    return found


def one_of(name: str, value: _Word, known: Collection[Any]) -> _Word:
    """One of the `known` values."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}")
    return value


def fraction(name: str, value: float, positive: bool = False) -> float:
    """A number in [0, 1], or in (0, 1] where it must be positive."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1 or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: give a number in {'(' if positive else '['}0, 1]")
    return float(value)


def interval(name: str, value: Sequence[float], maximum: float = float("inf")) -> tuple[float, float]:
    """Two numbers (low, high) with 0 < low <= high <= `maximum`."""
    if np.shape(value) != (2,) or not 0 < value[0] <= value[1] <= maximum:
        raise ValueError(f"{name}={value!r}: give (low, high) with 0 < low <= high" + f" <= {maximum}" * (maximum < 2))
    return float(value[0]), float(value[1])


def channels(name: str, value: Sequence[float], positive: bool = False) -> tuple[float, float, float]:
    """Three numbers, one per channel."""
    if np.shape(value) != (3,) or (positive and min(value) <= 0):
        above = " and above 0" * positive
        raise ValueError(f"{name}={value!r}: give three numbers, one per channel, in units of [0, 1]{above}")
    return float(value[0]), float(value[1]), float(value[2])


def image_size(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width), from one side length, (H, W) or timm's (3, H, W)."""
    sides = list(value) if isinstance(value, Sequence | np.ndarray) else [value, value]
    if len(sides) == 3 and sides[0] == 3:
        sides = sides[1:]
    try:
        height, width = (whole(name, side, 1) for side in sides)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: give a side, (H, W) or (3, H, W), in pixels > 0") from error
    return height, width
