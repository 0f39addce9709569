"""The paper's evaluation protocols (Tables 1, 5, 7, 8, 9) for any timm model, on images read through DALI.

    python -m pipelines.evaluate top1 --data-dir imagenet --checkpoint runs/NAME/model_best.pth.tar
    python -m pipelines.evaluate shuffle --data-dir imagenet --model deit_small_patch16_224 --pretrained --amp
    python -m pipelines.evaluate occlusion --data-dir imagenet --checkpoint FILE --model M --figure drop.png
    python -m pipelines.evaluate imagenet-a --data-dir imagenet-a --checkpoint FILE --model M --out a.json
    python -m pipelines.evaluate imagenet-o --data-dir imagenet-o --val-dir imagenet --checkpoint FILE --model M
    python -m pipelines.evaluate wsas --data-dir voc --checkpoint FILE --model M
    python -m pipelines.evaluate wsol --data-dir imagenet --boxes annotations --checkpoint FILE --model M

Every result is printed beside the paper's numbers for its baseline and for LUMix. timm's own DeiT-S (--pretrained)
must reach the baseline's numbers: that shows that a protocol is the paper's. A checkpoint of pipelines.train
supplies its model, classes, input size, mean and std, and for top1 also the crop it was validated with. The other
protocols keep the paper's crop, so "shuffled 1", the whole image, may differ from top1.
"""

import sys
from collections.abc import Sequence
from typing import Any

from . import command
from .evaluate_flags import parse_args, require_packages


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates as the command line says and prints the result; also writes and plots it if requested.

    Args:
        argv: the command line without the program's name; None: the process's own.

    Returns:
        The result, as written to `--out`.

    Raises:
        ValueError: an argument is invalid, or data, weights or a package are missing.
    """
    args = parse_args(argv, __doc__)
    require_packages(args)
    print(f"{args.protocol} on {args.data_dir}: loading PyTorch, timm and DALI, then one bar per pass", flush=True)
    import torch

    from . import report
    from .evaluation import build_subject
    from .protocols import PROTOCOLS

    torch.set_float32_matmul_precision("high")
    with torch.inference_mode():
        subject = build_subject(args)
        values = PROTOCOLS[args.protocol](subject)
    meta = report.metadata("pipelines.evaluate", sys.argv[1:] if argv is None else argv, subject.device)
    result = report.build(args, values, subject.data, meta, subject.is_imagenet)
    print(report.table(result))
    if args.out:
        report.write(args.out, result)
    if args.figure:
        report.draw(result, args.figure)
    return result


if __name__ == "__main__":
    command.run("pipelines.evaluate", main)
