"""How much RandAugment's operations here differ from timm's, in grey levels, on the same photographs.

`lumix_dali.augment` and timm's `AugmentOp` apply every operation at magnitude 9 with both signs, bilinear if it
interpolates. A row has the max and the mean difference; for operations that move pixels, the outermost eighth of the
image is left out because it holds the fill colour.

    python -m benchmarks.augment --data imagenet/train --out FILE.json
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from timm.data import auto_augment as timms
from tqdm import tqdm

from lumix_dali import augment
from lumix_dali.data.sources import load_files

from . import data, harness, readings
from .contenders import MEAN

MAGNITUDE = 9
FILL = tuple(round(255 * m) for m in MEAN)
POLICY = augment.parse(f"rand-m{MAGNITUDE}-n1-p1-inc1")


def photographs(paths: Sequence[str], size: int) -> np.ndarray:
    """uint8 [N, size, size, 3]: the middle of each image, resized."""

    def read(path: str) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))

    return np.stack([read(path) for path in tqdm(paths, "reading", unit="image", disable=None)])


@pipeline_def(num_threads=2, prefetch_queue_depth=1)
def operations():
    """The operation of each sample's `outcome`, with its `argument`."""
    images = fn.external_source(name="images", layout="HWC")
    outcome, argument = fn.external_source(name="outcome"), fn.external_source(name="argument")
    leaves = augment._leaves(POLICY, partial(augment._warp, fill=FILL, interpolation=types.INTERP_LINEAR))
    return augment._select(leaves, images, outcome, argument)


def differences(images: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row per operation and sign."""
    count, border = len(images), images.shape[1] // 8
    pipe = operations(batch_size=count, device_id=None)
    for place, (name, (base, slope, signed)) in enumerate(tqdm(augment.OPERATIONS.items(), disable=None)):
        for sign in (1, -1) if signed else (1,):
            outcome = np.full(count, 2 * place + (1 if sign > 0 else 2), np.int32)
            argument = np.full(count, base + sign * slope * MAGNITUDE, np.float32)
            (found,) = pipe.run(images=images, outcome=outcome, argument=argument)
            wanted = np.stack([np.asarray(timm_operation(name, sign)(Image.fromarray(image))) for image in images])
            wrong = np.abs(found.as_array().astype(int) - wanted)
            if place < augment._WARPS:
                wrong = wrong[:, border:-border, border:-border]
            yield dict(
                name=name + " -" * (sign < 0),
                largest=int(wrong.max()),
                mean=float(wrong.mean()),
                beyond_one=float((wrong > 1).mean()),
            )


def timm_operation(name: str, sign: int) -> timms.AugmentOp:
    """timm's operation with this sign."""
    known = timms._RAND_INCREASING_TRANSFORMS
    full = name if name in known else name + "Increasing"
    operation = timms.AugmentOp(full, 1.0, MAGNITUDE, dict(img_mean=FILL, interpolation=Image.Resampling.BILINEAR))
    level: Any = operation.level_fn  # None for an operation without a level
    drawn = timms._randomly_negate

    def signed(*arguments: Any) -> Any:
        timms._randomly_negate = lambda value: sign * value
        try:
            return level(*arguments)
        finally:
            timms._randomly_negate = drawn

    operation.level_fn = signed if level else None
    return operation


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.augment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help="class folder; default: generated images")
    add("--out", required=True, metavar="FILE.json", help="where the result goes")
    add("--images", type=harness.positive, default=100)
    add("--input-size", type=harness.positive, default=224)
    add("--allow-dirty", action="store_true", help="for benchmarks/results, too; the result says so")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    meta = harness.metadata(shlex.join(["python", "-m", "benchmarks.augment", *given]))
    harness.refuse_dirty(args.out, meta, args.allow_dirty)
    samples = load_files(args.data or data.generate())
    chosen = np.random.default_rng(0).permutation(len(samples))[: args.images]
    images = photographs([samples.path(i) for i in chosen], args.input_size)
    result = dict(
        kind="augment",
        unit="grey levels",
        complete=True,
        meta=meta,
        settings=dict(images=len(images), input_size=args.input_size),
        rows=list(differences(images)),
    )
    harness.write(args.out, result)
    print(readings.report(result))


if __name__ == "__main__":
    main()
