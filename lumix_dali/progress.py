"""A progress bar on a terminal; nothing is shown without tqdm or in a log."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def bar(unit: str, what: str | None = None) -> Progress:
    """Returns a `progress` argument for `lumix_dali.data`: a function that wraps an iterable of known length."""

    def wrap(items: Iterable[Any], total: int) -> Iterable[Any]:
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        wrapped: Iterable[Any] = tqdm(items, total=total, unit=unit, desc=what, leave=False, disable=None)
        return wrapped

    return wrap
