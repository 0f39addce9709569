"""A bar for long work on a terminal; without tqdm, and in a log, nothing."""

from collections.abc import Callable, Iterable


def bar(unit: str, what: str | None = None) -> Callable[[Iterable, int], Iterable]:
    """A function that wraps an iterable, given its length, as the `progress` arguments of `lumix_dali.data` take it."""

    def wrap(items: Iterable, total: int) -> Iterable:
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        return tqdm(items, total=total, unit=unit, desc=what, leave=False, disable=None)

    return wrap
