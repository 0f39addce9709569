"""How the work of a loader is done: threads, queues, and DALI's own options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import checks, cpus
from ..data.protocol import Source
from ..decoding import check_options

_MAX_THREADS = 1024


@dataclass(frozen=True)
class Execution:
    """How the work is done; only `decoder` and `decode_regions` can change pixels, so a state knows them.

    Args:
        num_threads: DALI's CPU threads; None: this process's CPUs, divided by LOCAL_WORLD_SIZE.
        prefetch_queue_depth: batches that DALI prepares ahead.
        decoder: further arguments of DALI's decoder (`hw_decoder_load`, `preallocate_width_hint`, ...).
        reader: local files only: further arguments of ``fn.io.file.read``.
        decode_regions: whether the decoder decodes only the region that the crop needs, see `decoding.decode`; the
            pixels differ by at most one grey level. None: on the CPU only.

    Raises:
        ValueError: an argument is outside its range, or DALI does not know an option.
    """

    num_threads: int | None = None
    prefetch_queue_depth: int = 2
    decoder: Mapping[str, Any] | None = None
    reader: Mapping[str, Any] | None = None
    decode_regions: bool | None = None

    def __post_init__(self) -> None:
        depth = checks.whole("prefetch_queue_depth", self.prefetch_queue_depth, 1, _MAX_THREADS + 1)
        checks.assign(self, prefetch_queue_depth=depth)
        if self.num_threads is not None:
            checks.assign(self, num_threads=checks.whole("num_threads", self.num_threads, 1, _MAX_THREADS + 1))
        if self.decode_regions is not None:
            checks.flag("decode_regions", self.decode_regions)
        if self.decoder is not None:
            operators = "decoders__Image", "decoders__ImageSlice"
            checks.assign(self, decoder=check_options(self.decoder, "decoder", *operators))
        if self.reader is not None:
            checks.assign(self, reader=check_options(self.reader, "reader", "io__file__Read"))

    @property
    def threads(self) -> int:
        """DALI's CPU threads."""
        return self.num_threads or max(1, cpus.available() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    @property
    def decode_options(self) -> dict[str, Any]:
        """Arguments of `decoding.decode`."""
        return dict(regions=self.decode_regions, **(self.decoder or {}))

    def check_source(self, samples: Source) -> None:
        """Raises a ValueError if an option is for another kind of source."""
        if self.reader and not samples.gives_paths:
            raise ValueError(
                f"reader={self.reader!r}: DALI reads only local files itself; leave it out for {samples!r}"
            )
