"""Segmenter (arXiv 2105.05633) with a timm ViT on Pascal Context through DALI: Table 4 of the LUMix paper.

    python -m pipelines.segment train --config pipelines/recipes/segmentation/deit_small.yaml \\
        --data-dir VOCdevkit/VOC2010 --backbone runs/NAME/model_best.pth.tar     # from pipelines.train
    python -m pipelines.segment train --config runs/NAME/args.yaml --experiment NAME --resume   # after a kill
    python -m pipelines.segment evaluate --checkpoint runs/NAME/last.pth.tar --data-dir VOCdevkit/VOC2010 \\
        --multi-scale --figure masks.png --out result.json

DIR has Pascal Context's layout as MMSegmentation's converter writes it: JPEGImages/NAME.jpg,
SegmentationClassContext/NAME.png (class numbers, 255 for none), ImageSets/SegmentationContext/{train,val}.txt.
Table 4 compares two such runs, whose backbones were trained by pipelines.train with LUMix and with --no-lumix.

OUTPUT/EXPERIMENT receives `last.pth.tar`, `log.jsonl`, `args.yaml` and, at the end, `result.json`. `--resume` with
the same flags continues a run that was killed, bit for bit on the CPU.
"""

import sys
from collections.abc import Sequence
from typing import Any

from . import command
from .segmentation.flags import parse_args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains or evaluates as the command line says.

    Args:
        argv: the command line without the program's name; None: the process's own.

    Returns:
        The result, as written to JSON.

    Raises:
        ValueError: an argument, file or checkpoint is invalid.
    """
    args = parse_args(argv, __doc__)
    argv = sys.argv[1:] if argv is None else argv
    print(f"{args.command} on {args.data_dir}: loading PyTorch, timm and DALI", flush=True)
    import torch

    from .segmentation import cli

    torch.set_float32_matmul_precision("high")
    return {"train": cli.run_train, "evaluate": cli.run_evaluate}[args.command](args, argv)


if __name__ == "__main__":
    command.run("pipelines.segment", main)
