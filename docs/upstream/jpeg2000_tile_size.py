import io
from contextlib import suppress

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

buffer = io.BytesIO()
Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG2000")
file = np.frombuffer(buffer.getvalue(), np.uint8).copy()
size = buffer.getvalue().index(b"\xff\x51")
file[size + 26 : size + 30] = 0  # YTsiz, the height of a tile


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def peek():
    return fn.peek_image_shape(fn.external_source(lambda: [file], batch=True, dtype=types.UINT8, ndim=1))


with suppress(RuntimeError):  # right: an error
    peek().run()
print("no fault: an error, and the process lives")
