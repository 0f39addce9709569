import struct

import numpy as np
from nvidia.dali import fn, pipeline_def, types

y, x = np.mgrid[:64, :96]
right = np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8)
word = (right[::-1].astype(np.uint32) << np.array([24, 16, 8], np.uint32)).sum(-1).astype("<u4").tobytes()
masks = struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)  # of red, green, blue
file = b"BM" + struct.pack("<IHHI", 66 + len(word), 0, 0, 66)
file += struct.pack("<IiiHHIIiiII", 40, 96, 64, 1, 32, 3, len(word), 0, 0, 0, 0) + masks + word


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    files = [np.frombuffer(file, np.uint8)]
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


(images,) = decode().run()
off = np.abs(np.array(images[0]).astype(float) - right).mean()
raise SystemExit(f"fault: pixels are off by {off:.1f} grey levels on average" if off > 1 else 0)
