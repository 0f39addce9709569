import collections
import tempfile
from pathlib import Path

from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

N, RANKS, BATCH = 97, 4, 8


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
def read(files, rank):
    labels = list(range(len(files)))
    return fn.readers.file(files=files, labels=labels, shard_id=rank, num_shards=RANKS, pad_last_batch=True, name="r")[
        1
    ]


with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder, str(number)) for number in range(N)]
    for path in paths:
        path.write_bytes(b"x")
    files = [str(path) for path in paths]
    loaders = [
        DALIGenericIterator(
            read(files, rank), ["label"], reader_name="r", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
        )
        for rank in range(RANKS)
    ]
    repeated = []
    for epoch in range(4):
        seen = collections.Counter(int(v) for loader in loaders for batch in loader for v in batch[0]["label"].ravel())
        repeated += [(epoch, label, times) for label, times in seen.items() if times > 1]
raise SystemExit(f"fault: (epoch, sample, times) {repeated}" if repeated else 0)
