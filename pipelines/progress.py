"""A progress bar that counts images, for training and evaluation."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar of `total` images, `initial` of them done; in a log file it prints at most once per minute."""
    interval = 0.1 if sys.stderr.isatty() else 60
    return tqdm(
        total=total,
        desc=what,
        unit="img",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        mininterval=interval,
        delay=interval,
        initial=initial,
        disable=disable,
    )
