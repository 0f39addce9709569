"""Which samples are good, who decodes each, and what takes the place of the others: one record for a whole run.

Every sample passes here when it is read for the first time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from threading import RLock
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from ..data import formats
from ..data.formats import BadImage, Decoder
from ..data.protocol import Image, Source

_SEARCH = 1000  # samples that are tried as a substitute for a bad one


class Replaced(NamedTuple):
    """A sample that could not be used, and its substitute."""

    substitute: int
    name: str
    reason: str


class Faults:
    """The decoder of each sample, and the substitutes of samples that cannot be decoded.

    Args:
        source: of the samples.
        max_bad: how many samples may be replaced.
        max_pixels: limit of an image's height times width.

    Attributes:
        bad: {index: Replaced}.
        decoders: uint8 [n], the `Decoder` of each sample.
        refused: indices of samples that DALI refused, and Pillow reads.
        version: changes with `bad` and `refused`; an epoch that was prepared at another version is stale.
    """

    def __init__(self, source: Source, max_bad: int, max_pixels: int) -> None:
        self.source, self.max_bad, self.max_pixels = source, max_bad, max_pixels
        self.version = 0
        self._messages: list[str] = []
        self._lock = RLock()  # this epoch and the next one are read by different threads
        self.restore({}, ())

    def restore(self, bad: Mapping[int, Sequence[Any]], refused: Sequence[int]) -> None:
        """Starts from what an earlier run recorded."""
        self.bad = {index: Replaced(*replaced) for index, replaced in bad.items()}
        self.refused = set(refused)
        self.decoders = np.zeros(len(self.source), np.uint8)
        self.decoders[list(self.refused)] = Decoder.PILLOW
        self.version += 1

    def usable(self, indices: Sequence[int]) -> list[int]:
        """These samples, with known bad ones replaced."""
        return [self._usable(index) for index in indices]

    def _usable(self, index: int) -> int:
        while index in self.bad:  # a substitute may turn bad too
            index = self.bad[index].substitute
        return index

    def bitmap(self, index: int, file: BinaryIO) -> bytes | None:
        """The image as a bitmap if Pillow decodes this sample; None if DALI does.

        Raises:
            BadImage: neither can decode it.
        """
        if self.decoders[index] == Decoder.UNKNOWN:
            self.decoders[index] = formats.look(file, self.max_pixels).decoder
        if self.decoders[index] == Decoder.DALI:
            return None
        return formats.bitmap(formats.pillow_pixels(file, self.max_pixels))

    def forget(self, index: int) -> None:
        """Has a sample inspected again, because its file has changed."""
        if index not in self.refused:
            self.decoders[index] = Decoder.UNKNOWN

    def encoded(self, indices: Sequence[int]) -> tuple[dict[int, np.ndarray], list[int]]:
        """Encoded images of the samples that DALI decodes, and those of them that it no longer can.

        A file may have been removed or overwritten since it was inspected; such a sample is inspected again.
        """
        wanted = [index for index in dict.fromkeys(indices) if self.decoders[index] == Decoder.DALI]
        images: dict[int, np.ndarray] = {}
        lost: list[int] = []
        for index, image in zip(wanted, self.source.read(wanted)[0], strict=True):
            if isinstance(image, BadImage) or not self._is_for_dali(image):
                self.forget(index)
                lost.append(index)
            else:
                images[index] = np.frombuffer(image, np.uint8)
        return images, lost

    def refuse(self, index: int, reason: str) -> None:
        """Gives a sample that DALI cannot decode to Pillow, or replaces it if Pillow cannot decode it either.

        Raises:
            ValueError: as `replace`.
        """
        with self._lock:
            try:
                self._decode(index)
            except BadImage as error:
                self.replace(index, str(error))
                return
            self.refused.add(index)
            self.decoders[index] = Decoder.PILLOW
            self.version += 1
            self._messages.append(
                f"{self.source.name(index)}: DALI refuses it ({reason}); Pillow decodes it from now on"
            )

    def replace(self, index: int, reason: str) -> int:
        """The next good sample for one that cannot be used, which is recorded as bad.

        Raises:
            ValueError: no more samples may be replaced, or none of the next samples is good.
        """
        with self._lock:
            if index in self.bad:  # it occurs twice in a batch, or another thread was first
                return self._usable(index)
            name, n = self.source.name(index), len(self.source)
            if len(self.bad) >= self.max_bad:
                raise ValueError(
                    f"{name} cannot be used ({reason}), {len(self.bad)} replaced so far; repair or remove it, or give "
                    f"max_bad > {self.max_bad}"
                )
            others = [(index + step) % n for step in range(1, min(n, _SEARCH + 1))]
            substitute = next((i for i in others if i not in self.bad and self._is_good(i)), None)
            if substitute is None:
                raise ValueError(
                    f"{name} cannot be used ({reason}), nor can any of the {len(others)} samples after it"
                    + "; find out why with `lumix-dali check`" * self.source.gives_paths
                )
            self.bad[index] = Replaced(substitute, name, reason)
            self.refused.discard(index)
            self.version += 1
            instead = self.source.name(substitute)
            self._messages.append(f"{name} cannot be used ({reason}); {instead} takes its place")
            return substitute

    def take_warning(self) -> str | None:
        """The oldest message not yet taken: a thread must not warn, since a warning may raise."""
        return self._messages.pop(0) if self._messages else None

    def _is_for_dali(self, image: Image) -> bool:
        try:
            return formats.look(io.BytesIO(cast(Any, image)), self.max_pixels).decoder == Decoder.DALI
        except BadImage:
            return False

    def _is_good(self, index: int) -> bool:
        try:
            self._decode(index)
        except BadImage:
            return False
        return True

    def _decode(self, index: int) -> None:
        (image,), _ = self.source.read([index])
        if isinstance(image, BadImage):
            raise image
        formats.pillow_pixels(io.BytesIO(cast(Any, image)), self.max_pixels)
