"""How long training steps wait for data."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

ADVICE = (
    "the model waits for its data: give more --workers if there are CPUs left, store smaller images (`lumix-dali "
    "convert --max-size`), or augment less; `lumix-dali speed DIR --model M` measures how fast the model could go"
)


class DataWait:
    """Adds up the time between the end of a step and the arrival of the next batch, on the device's own clock.

    On a GPU the host runs ahead. Waiting for a batch while the device still computes costs nothing and is not
    counted; waiting after the device has run out of work is.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._gaps: list[tuple[Any, Any]] = []

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yields the same batches and times each of them."""
        iterator = iter(source)
        while True:
            asked = self._now()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._gaps.append((asked, self._now()))
            yield batch

    def seconds(self) -> float:
        """The wait for all batches so far; synchronises the device."""
        if self._device.type == "cpu":
            return sum(there - asked for asked, there in self._gaps)
        torch.cuda.synchronize(self._device)
        return sum(asked.elapsed_time(there) for asked, there in self._gaps) / 1000

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))
