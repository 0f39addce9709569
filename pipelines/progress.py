"""A progress bar that counts images, for training and evaluation."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, initial: int = 0, disable: bool = False, unit: str = "img") -> tqdm:
    """A bar of `total` images, `initial` of them done; in a log file its first line, with the remaining time, comes
    after five seconds, and then one per minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1 if terminal else 60,
        delay=0.1 if terminal else 5,
        initial=initial,
        disable=disable,
    )
