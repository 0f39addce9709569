"""How many CPUs there are for this process."""

import os


def available() -> int:
    """CPUs on which this process may run; containers and batch systems leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0))
