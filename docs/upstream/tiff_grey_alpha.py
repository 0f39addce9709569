import io

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

y, x = np.mgrid[:64, :96]
level, buffer = np.uint8(2 * x), io.BytesIO()
Image.fromarray(np.stack([level, 255 - level], -1), "LA").save(buffer, "TIFF")  # grey and alpha
file, right = buffer.getvalue(), np.stack([level] * 3, -1)


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    files = [np.frombuffer(file, np.uint8)]
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


(images,) = decode().run()
off = np.abs(np.array(images[0]).astype(float) - right).mean()
raise SystemExit(f"fault: pixels are off by {off:.1f} grey levels on average" if off > 1 else 0)
