"""A bar for images, of training and of evaluation."""

import sys

from tqdm import tqdm


def progress(total: int, what: str, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar of `total` images, of which `initial` are done; in a log file it speaks once a minute."""
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
