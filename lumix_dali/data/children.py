"""Work in child processes, where a file that ends its process does no harm and is found.

Not multiprocessing: its children import the caller's main module again, which may lack a guard, and would run it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

_Task = Callable[[list[Any]], list[Any]]


class Died(str):
    """In place of an item's result: how the process ended that worked on it."""


def run(
    task: _Task,
    chunks: Sequence[list[Any]],
    workers: int,
    prepare: Callable[[list[Any]], list[Any]] = lambda chunk: chunk,
) -> Iterator[list[Any]]:
    """What `task` returns for each chunk, in order.

    Args:
        task: takes a list and returns one result for each of its items; pickled, so a function of a module.
        chunks: lists of items.
        workers: child processes.
        prepare: called in this process, in a thread, to turn a chunk into what the child gets.

    Yields:
        The results of a chunk; `Died` for an item on which the child died.

    Raises:
        RuntimeError: a child could not start.
        Exception: whatever `task` raises.
    """
    idle: SimpleQueue[_Child] = SimpleQueue()
    every = [_Child(task) for _ in range(min(workers, len(chunks)))]
    for child in every:
        idle.put(child)

    def work(chunk: list[Any]) -> list[Any]:
        items = prepare(chunk)
        child = idle.get()
        try:
            return _bisected(child, items)
        finally:
            idle.put(child)

    pool = ThreadPoolExecutor(max(1, len(every)))
    try:
        yield from pool.map(work, chunks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in every:
            child.close()
        pool.shutdown()
        for child in every:  # which a thread has started meanwhile
            child.close()


def _bisected(child: _Child, items: list[Any]) -> list[Any]:
    """The child's results; of a list on which it dies, those of its halves."""
    try:
        return child(items)
    except EOFError:
        if len(items) == 1:
            return [Died(f"the process that decoded it died ({child.end})")]
        half = len(items) // 2
        return _bisected(child, items[:half]) + _bisected(child, items[half:])


class _Child:
    """A process that starts when it is needed, and again after it died."""

    def __init__(self, task: _Task) -> None:
        self._task, self._closed = task, False
        self._process: subprocess.Popen[bytes] | None = None
        self.end = ""  # how the last process ended

    def __call__(self, items: list[Any]) -> list[Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(items, process.stdin)
            process.stdin.flush()
            failed, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = process.wait()
            self.end = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._process = None
            raise EOFError from error
        if failed:
            raise result
        return list(result)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RuntimeError("the scan has ended")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(self._task, self._process.stdin)
            self._process.stdin.flush()
            pickle.load(self._process.stdout)  # it has imported all that it needs
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{sys.executable}: the scan's process could not start; see its error above") from error
        return self._process

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """Answers requests from stdin on stdout until the parent ends, which closes both."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    task = pickle.load(sys.stdin.buffer)
    pickle.dump(None, out)
    out.flush()
    # Decoders print lines without a file's name to both; what is wrong comes back as a result.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")  # no filter decides which files are good
    while True:
        try:
            items = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (False, task(items))
        except Exception as error:
            answer = (True, error)
        try:
            pickle.dump(answer, out)
            out.flush()
        except BrokenPipeError:
            return
