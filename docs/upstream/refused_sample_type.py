import io
import struct
from contextlib import suppress

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

good = io.BytesIO()
Image.linear_gradient("L").convert("RGB").save(good, "JPEG", quality=95)
data = bytes(96 * 64 * 2)  # a BMP of 16 bits, 5 for each colour
bmp = b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54)
bmp += struct.pack("<IiiHHIIiiII", 40, 96, 64, 1, 16, 0, len(data), 0, 0, 0, 0) + data
files = [np.frombuffer(content, np.uint8) for content in [bmp, *[good.getvalue()] * 63]]


@pipeline_def(batch_size=64, num_threads=2, device_id=None)
def decode():
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


for _ in range(20):
    with suppress(RuntimeError):  # right: an error, "Invalid sample_type: 0"
        decode().run()
print("no fault: 20 errors, and the process lives")
