import io
import sys

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

y, x = np.mgrid[:192, :256]
good = io.BytesIO()
Image.fromarray(np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)).save(good, "JPEG", quality=85)
content = good.getvalue()
scan = content.index(b"\xff\xda") + 14
middle = scan + (len(content) - scan) // 4
damaged = content[:middle] + b"\xff\xd8" + content[middle + 2 :]  # a second start of image within the scan


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    files = [np.frombuffer(damaged, np.uint8)]
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


try:
    Image.open(io.BytesIO(damaged)).convert("RGB")
except OSError as error:
    print("Pillow:", error)
try:
    (images,) = decode().run()
except RuntimeError:
    print("no fault: DALI refuses the file")
else:
    grey = float((np.ptp(images.at(0)[-64:], axis=(0, 1)) == 0).all())
    sys.exit(f"fault: decoded without an error; the last 64 rows are {'one grey' if grey else 'wrong'}")
