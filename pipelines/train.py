"""Train any timm model from an image folder through DALI, with CutMix/Mixup in the graph and the LUMix loss.

DIR holds `train` and `val` (or `validation`), each with one folder per class. Flags are timm's
(docs/timm_flags.md); the mixing draws one λ per batch unless `--mixup-mode elem`, as timm does. CutMix is on by
default (`--cutmix 1.0`) because LUMix needs it.

    python -m pipelines.train --data-dir DIR --model resnet50 --epochs 100 --lr .1 -b 256 --amp
    python -m pipelines.train --data-dir DIR --model deit_small_patch16_224 --opt adamw --lr 1e-3 \\
        --weight-decay .05 --mixup .8 --cutmix 1.0 --drop-path .1 --model-ema
    python -m pipelines.train --data-dir DIR --model resnet50 --no-lumix     # plain CutMix, to compare
    torchrun --nproc_per_node 8 -m pipelines.train --data-dir DIR --model resnet50 -b 256 --amp     # 8 GPUs
    python -m pipelines.train --config runs/NAME/args.yaml --resume runs/NAME     # continue where it stopped
    python -m pipelines.train --config pipelines/recipes/deit_small.yaml --smoke     # check that a recipe runs

OUTPUT/EXPERIMENT receives `last.pth.tar` and `model_best.pth.tar` (`timm.create_model(checkpoint_path=...)` loads
them), `summary.csv` and `log.jsonl` (one row per epoch), `args.yaml` and, at the end, `summary.json`. A folder
that already holds a run is refused without `--resume` or `--overwrite`, and so is one that another run is using.

A run can be killed at any moment. `--resume` with the same flags and the same number of ranks continues it from
last.pth.tar, bit for bit on the CPU. The file is written before and after each validation, and also within epochs
with `--checkpoint-interval`. SIGINT, SIGTERM, SIGHUP and SIGUSR1 write it immediately and end the run.
"""

from collections.abc import Sequence
from typing import Any

from . import command
from .flags import parse_args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains as the command line says and leaves everything under OUTPUT/EXPERIMENT.

    Args:
        argv: the command line without the program's name; None: the process's own.

    Returns:
        The summary that rank 0 writes to summary.json.

    Raises:
        ValueError: an argument, folder or checkpoint is invalid; raised before the first batch.
    """
    args = parse_args(argv, __doc__)
    if args.rank == 0:
        data = "generated images" if args.smoke else args.data_dir
        print(f"{args.model} on {data}: loading PyTorch, timm and DALI; the log follows every epoch", flush=True)
    from . import training

    return training.run_training(args)


if __name__ == "__main__":
    command.run("pipelines.train", main)
