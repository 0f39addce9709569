import io

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

# Pillow writes 8 bits. The header's depth only sets the offset that a decoder adds, 2**7 or 2**11.
levels, buffer = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), io.BytesIO()
Image.fromarray(levels).save(buffer, "JPEG2000", no_jp2=True, mct=0)
file = np.frombuffer(buffer.getvalue(), np.uint8).copy()
depth = buffer.getvalue().index(b"\xff\x51") + 40
file[[depth, depth + 3, depth + 6]] = 11  # 12 bits
right = (levels.astype(int) + 2**11 - 2**7) * 255 / 4095


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    return fn.decoders.image(fn.external_source(lambda: [file], batch=True, dtype=types.UINT8, ndim=1))


(images,) = decode().run()
off = np.abs(np.array(images[0]) - right).mean()
raise SystemExit(f"fault: pixels are off by {off:.1f} grey levels on average" if off > 1 else 0)
