import io

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

exif = Image.Exif()
exif[274] = 6
random, odd = np.random.default_rng(0), b""
while not odd or not odd[odd.index(b"VP8L") + 4] % 2:  # until the chunk's size is odd, and padded by a byte
    pixels, buffer = random.integers(0, 256, (64, 96, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exif=exif.tobytes())
    odd = buffer.getvalue()


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    files = [np.frombuffer(odd, np.uint8)]
    encoded = fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, adjust_orientation=False)


try:
    (images,) = decode().run()
except RuntimeError as error:
    raise SystemExit(f"fault: refused, libwebp reads it: {error}") from error
assert (np.array(images[0]) == pixels).all()
