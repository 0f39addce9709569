import numpy as np
from nvidia.dali import fn, pipeline_def, types

values = np.arange(64 * 96 * 3).reshape(64, 96, 3) % 101  # 100 is white
file = b"P6 96 64 100\n" + values.astype(np.uint8).tobytes()
right = values * 2.55


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode():
    files = [np.frombuffer(file, np.uint8)]
    return fn.decoders.image(fn.external_source(lambda: files, batch=True, dtype=types.UINT8, ndim=1))


(images,) = decode().run()
off = np.abs(np.array(images[0]).astype(float) - right).mean()
raise SystemExit(f"fault: pixels are off by {off:.1f} grey levels on average" if off > 1 else 0)
