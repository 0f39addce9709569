import io
from contextlib import suppress

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

good = io.BytesIO()
Image.linear_gradient("L").convert("RGB").save(good, "JPEG", quality=95)
files = [np.frombuffer(content, np.uint8) for content in [b"<html>404</html>", *[good.getvalue()] * 63]]


@pipeline_def(batch_size=64, num_threads=2, device_id=None)
def decode():
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


for _ in range(20):
    with suppress(RuntimeError):  # right: an error, "nvImageCodec failure: '#4'"
        decode().run()
print("no fault: 20 errors, and the process lives")
