"""The faults of DALI that this package works around are still there.

Each script in docs/upstream reproduces one of them without this package. Its test fails once the fault is fixed; then
the workaround can be removed and the report closed.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "upstream"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
DEATHS = (-signal.SIGSEGV, -signal.SIGFPE, -signal.SIGABRT, -signal.SIGBUS)
RUNS = 5  # a race may not occur in every run


class StillThereError(Exception):
    """The script crashed or printed "fault:"."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.xfail(raises=StillThereError, strict=True, reason="a fault of the installed DALI")
def test_is_fixed(name):
    for _ in range(RUNS):
        run = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True, timeout=120)
        if run.returncode in DEATHS or (run.returncode == 1 and "\nfault: " in "\n" + run.stderr):
            raise StillThereError(f"{name}: exit status {run.returncode}, {run.stderr[-200:]}")
        assert run.returncode == 0, run.stderr  # anything else is an error in the script
