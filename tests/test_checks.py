"""What an argument may be: one table of what is taken, one of what is not."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from lumix_dali import checks

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = [
    NAN,
    INF,
    -INF,
    True,
    False,
    np.True_,
    "1",
    b"1",
    None,
    [1],
    {},
    1j,
    10**400,
    object(),
    torch.tensor(True),
]


@pytest.mark.parametrize(
    ("check", "taken", "more_refused"),
    [
        (lambda v: checks.whole("x", v, 1, 5), [(1, 1), (np.int64(4), 4), (torch.tensor(3), 3)], [0, 5, -1, 1.0, 2.5]),
        (lambda v: checks.number("x", v), [(-2, -2.0), (np.float32(0.5), 0.5), (Fraction(1, 4), 0.25)], []),
        (lambda v: checks.number("x", v, 0), [(0, 0.0), (1e300, 1e300)], [-1e-9]),
        (lambda v: checks.number("x", v, -1, 1, below_high=True), [(-1, -1.0), (0.99, 0.99)], [1, 1.5, -1.1]),
        (lambda v: checks.fraction("x", v), [(0, 0.0), (1, 1.0)], [-0.1, 1.1]),
        (lambda v: checks.fraction("x", v, below_one=True), [(0, 0.0), (0.9, 0.9)], [1, -0.1]),
        (lambda v: checks.interval("x", v, 1.0), [((0.5, 1), (0.5, 1.0)), (np.array([0.1, 0.1]), (0.1, 0.1))],
         [(0, 1), (0.5, 0.4), (0.5, 1.1), (0.5,), (1, NAN), (True, 1), ("a", "b"), "ab", [[1, 1]], (0.1, 0.2, 0.3)]),
        (lambda v: checks.interval("x", v), [((0.5, 4), (0.5, 4.0))], [(1, INF)]),
        (lambda v: checks.pair("x", v, 0, 1), [([0, 1], (0.0, 1.0)), ((0.7, 0.2), (0.7, 0.2))],
         [(0, 2), (0, NAN), "01"]),
        (lambda v: checks.channels("x", v), [((0, 1, -2), (0.0, 1.0, -2.0))],
         [(1, 2), (1, 2, NAN), (1, 2, INF), "abc"]),
        (lambda v: checks.channels("x", v, positive=True), [([1, 2, 3], (1.0, 2.0, 3.0))], [(1, 2, 0), (True,) * 3]),
        (lambda v: checks.image_size("x", v),
         [(224, (224, 224)), ((2, 3), (2, 3)), ([3, 8, 9], (8, 9)), (np.array([4, 5]), (4, 5))],
         [0, 2.5, (1,), np.array(3), (4, 8, 9), (8, -1), "22", (True, 2), (1, 2, 3, 4)]),
    ],
)  # fmt: skip
def test_numbers(check, taken, more_refused):
    for value, result in taken:
        assert check(value) == result
        assert {type(part) for part in np.atleast_1d(np.array(check(value), dtype=object))} <= {int, float}
    for value in [*NOT_NUMBERS, *more_refused]:
        with pytest.raises(ValueError, match=r"^x=.*: give ") as error:
            check(value)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1, 0, 1.0, "no", "True", None, [], NAN, torch.tensor(True)])
def test_flags(value):
    assert checks.flag("x", True) is checks.flag("x", np.True_) is True
    assert checks.flag("x", False) is False
    with pytest.raises(ValueError, match=r"^x=.*: give True or False$"):
        checks.flag("x", value)


@pytest.mark.parametrize("value", ["c", "", "A", None, 1.5, True, ["a"], np.arange(3)])
def test_words(value):
    assert checks.one_of("x", "a", ("a", "b")) == "a"
    assert checks.one_of("x", None, ("a", None)) is None
    with pytest.raises(ValueError, match=re.escape(": give one of 'a', 'b', 1")):
        checks.one_of("x", value, ("a", "b", 1))


def test_long_value():
    with pytest.raises(ValueError, match=r"^x='a.*\.\.\.: give") as error:
        checks.whole("x", "a\n" + "a" * 9999, 0)
    assert len(str(error.value)) < 400
