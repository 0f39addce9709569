"""Work in child processes, where a file that ends its process does no harm and is found.

Not a pool of multiprocessing's processes: they import the caller's main module again, which may lack a guard, and would
run it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from multiprocessing.connection import Connection, Pipe
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
        try:
            self._pipe.send(items)
            failed, result = self._pipe.recv()
        except (EOFError, OSError) as error:
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
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
                stdin=theirs.fileno(),  # not a descriptor of its own: 0 and 1 may be free, and Popen uses them
                stdout=subprocess.DEVNULL,
                env=os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
            )
        try:
            self._pipe.send(self._task)
            self._pipe.recv()  # it has imported all that it needs
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{sys.executable}: the scan's process could not start; see its error above") from error
        return self._process

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """Answers requests from a pipe, which is stdin, until the parent ends, which closes it."""
    # Above 2, which may be free; tasks find nothing to read.
    with Connection(fcntl(0, F_DUPFD_CLOEXEC, 3)) as pipe, suppress(EOFError, ConnectionError):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        task = pipe.recv()
        pipe.send(None)
        # Decoders print lines without a file's name to both; what is wrong comes back as a result.
        os.dup2(1, 2)
        warnings.simplefilter("ignore")  # no filter decides which files are good
        while True:
            items = pipe.recv()
            try:
                answer: tuple[bool, Any] = (False, task(items))
            except Exception as error:
                answer = (True, error)
            pipe.send(answer)
