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

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import load_state_dict
from timm.utils import ParseKwargs

from .. import checkpoint, report
from ..flags import Help, read_config
from ..ranks import Stop
from . import data, evaluation, training
from .model import Segmenter, build

MODEL_FLAGS = ("model", "model_kwargs", "num_classes", "img_size", "short_side", "mean", "std", "decoder_depth")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of both commands, with its default."""
    parser = argparse.ArgumentParser("python -m pipelines.segment", description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", formatter_class=Help, help="train, then evaluate")
    train.add_argument(
        "-c", "--config", metavar="FILE", help="YAML file of defaults, such as args.yaml; flags override it"
    )
    _add_common(train)
    _add_model(train)
    _add_training(train)
    evaluate = commands.add_parser("evaluate", formatter_class=Help, help="evaluate a checkpoint of train")
    _add_common(evaluate)
    add = evaluate.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="last.pth.tar of a run")
    add("--stride", type=int, help="stride of the windows; None: the run's")
    add("--split", default="val", help="list in ImageSets/SegmentationContext")
    add("--out", metavar="FILE", help="write the result as JSON")
    add("--figure", metavar="FILE", help="draw predicted masks")
    add("--images", type=int, default=6, help="number of photographs in the figure")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data and device").add_argument
    add("--data-dir", metavar="DIR", help="VOCdevkit/VOC2010 of Pascal Context, or the folder around VOCdevkit")
    add("-j", "--workers", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="type of mixed precision")
    add("--multi-scale", action="store_true", help="also evaluate at six scales with flips")
    add("--window-batch-size", type=int, default=4, metavar="N", help="windows per batch in evaluation")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", help="a timm ViT; None: the backbone's, or deit_small_patch16_224")
    add("--backbone", metavar="FILE", help="checkpoint of a classifier, such as one of pipelines.train")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights instead")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="further encoder arguments")
    add("--num-classes", type=int, default=len(data.PASCAL_CONTEXT), help="number of classes, including background")
    add("--drop-path", type=float, default=0.1, help="stochastic depth rate of the encoder")
    add("--decoder-depth", type=int, default=2, help="transformer blocks of the decoder")
    add("--decoder-drop", type=float, default=0.1, help="dropout rate of the decoder")
    add("--mean", type=float, nargs=3, help="mean of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="standard deviation of each channel, in [0, 1]; None: the model's")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--img-size", type=int, default=480, help="side of crops and windows")
    add("--short-side", type=int, default=520, help="shorter side of a photograph at scale 1")
    add("--stride", type=int, default=320, help="stride of the windows in evaluation")
    add("-b", "--batch-size", type=int, default=16, help="crops per update")
    add("--iterations", type=int, default=80_000, help="number of updates")
    add("--opt", default="sgd", help="any optimiser of timm.optim; its sgd uses Nesterov momentum")
    add("--lr", type=float, default=1e-3, help="learning rate at the start")
    add("--min-lr", type=float, default=1e-5, help="learning rate at the end")
    add("--poly-power", type=float, default=0.9, help="power in the schedule (1 - update / iterations) ** power")
    add("--momentum", type=float, default=0.9, help="momentum, for optimisers that have one")
    add("--weight-decay", type=float, default=0.0, help="not applied to biases and norms")
    add("--seed", type=int, default=42, help="seed of all random numbers")
    add("--output", default="runs", metavar="PATH", help="parent folder of runs")
    add("--experiment", default="", help="folder under OUTPUT; empty: time and model")
    add(
        "--checkpoint-interval",
        type=int,
        default=1000,
        metavar="N",
        help="updates between checkpoints; 0: only at the end",
    )
    add("--eval-interval", type=int, default=0, metavar="N", help="updates between evaluations; 0: only at the end")
    add("--log-interval", type=int, default=50, metavar="N", help="updates between rows of the log")
    add("--resume", action="store_true", help="resume from OUTPUT/EXPERIMENT, if it exists")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; invalid values end the program here, before any work."""
    parser = build_parser()
    args = parser.parse_args(argv)
    train, _ = _commands(parser)
    if getattr(args, "config", None):
        read_config(train, args.config)
        args = parser.parse_args(argv)
    if not args.data_dir:
        parser.error("--data-dir is required")
    least = {
        "num_classes": 2,
        "img_size": 1,
        "short_side": 1,
        "stride": 1,
        "batch_size": 1,
        "iterations": 1,
        "log_interval": 1,
        "checkpoint_interval": 0,
        "eval_interval": 0,
        "workers": 1,
        "images": 1,
        "window_batch_size": 1,
        "decoder_depth": 1,
        "seed": 0,
    }
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} {value}: give at least {low}")
    if args.command == "train":
        if args.num_classes > data.VOID:
            parser.error(f"--num-classes {args.num_classes}: give at most {data.VOID}, masks have 8 bits")
        if args.backbone and args.pretrained:
            parser.error("--backbone, --pretrained: give one of them")
        if args.resume and not args.experiment:
            parser.error("--resume: name the run to resume by --experiment")
    return args


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [*next(actions).choices.values()]


def backbone(args: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """The initial weights; also fills in --model, --mean and --std from the backbone if they are not given.

    Raises:
        ValueError: the file cannot be read, or is not a classifier's checkpoint.
    """
    weights, settings = None, {}
    if args.backbone:
        try:
            state = torch.load(args.backbone, map_location="cpu", weights_only=True)
            weights = load_state_dict(args.backbone)  # timm's function prefers averaged weights
        except Exception as error:  # a damaged file may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"--backbone: {args.backbone} cannot be read ({reason}); give a checkpoint of "
                "pipelines.train, or of timm"
            ) from error
        if state.get("run_format") == checkpoint.FORMAT:
            settings = state["args"]
    args.model = args.model or settings.get("model") or "deit_small_patch16_224"
    args.model_kwargs = args.model_kwargs or settings.get("model_kwargs") or {}
    if args.pretrained:
        weights = timm.create_model(args.model, pretrained=True).state_dict()
    known = {key: settings[key] for key in ("mean", "std") if settings.get(key)}
    known |= {key: getattr(args, key) for key in ("mean", "std") if getattr(args, key)}
    config = timm.get_pretrained_cfg(args.model)
    found = resolve_data_config(known, pretrained_cfg=config.to_dict() if config else None)
    args.mean, args.std = list(found["mean"]), list(found["std"])
    return weights


def choose_device(name: str) -> torch.device:
    """The device that --device selects."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def run_train(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Trains, evaluates and writes result.json."""
    train, val = (data.load(args.data_dir, split, args.num_classes) for split in ("train", "val"))
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    folder = Path(args.output, args.experiment or time.strftime("%Y%m%d-%H%M%S-segment"))
    weights = backbone(args)
    model = build(
        args.model,
        args.num_classes,
        args.img_size,
        weights=weights,
        drop_path=args.drop_path,
        depth=args.decoder_depth,
        drop=args.decoder_drop,
        model_kwargs=args.model_kwargs,
    )
    run = training.build_run(args, model, device, folder)
    with Stop() as stop:
        start(run, args, len(train))
        training.fit(run, args, train, lambda: numbers(evaluated(args, model, val, device, False)[0], ""), stop)
    return finish(args, argv, model, val, device, folder / "result.json")


def start(run: training.Run, args: argparse.Namespace, photographs: int) -> None:
    """Resumes if there is a checkpoint, and sets up the run's folder."""
    last = run.folder / "last.pth.tar"
    if args.resume and last.exists():
        training.resume(run, args, last)
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "config", "resume")}
    (run.folder / "args.yaml").write_text(yaml.safe_dump(settings))
    origin = args.backbone or ("timm's weights" if args.pretrained else "random weights")
    print(
        f"{args.model} from {origin}: {photographs} photographs, {args.num_classes} classes, crops of "
        f"{args.img_size}, {args.iterations} updates on {run.device}, into {run.folder}"
    )
    if args.resume:
        print(f"resuming after update {run.update}" if run.update else f"--resume: {last} does not exist yet")
    sys.stdout.flush()


def run_evaluate(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Evaluates a checkpoint, and draws and writes the result if requested."""
    state = training.read_checkpoint(Path(args.checkpoint))
    for key in MODEL_FLAGS:
        setattr(args, key, state["args"][key])
    args.stride = args.stride or state["args"]["stride"]
    val, device = data.load(args.data_dir, args.split, args.num_classes), choose_device(args.device)
    model = build(args.model, args.num_classes, args.img_size, depth=args.decoder_depth, model_kwargs=args.model_kwargs)
    model.load_state_dict(state["state_dict"])
    return finish(args, argv, model.to(device), val, device, args.out)


def evaluated(
    args: argparse.Namespace,
    model: Segmenter,
    split: data.Split,
    device: torch.device,
    multi_scale: bool,
    keep: int = 0,
) -> tuple[dict[str, Any], list[evaluation.Prediction]]:
    """Scores at one scale or at several, and the predictions to draw."""
    protocol = evaluation.Protocol(
        args.short_side, args.img_size, args.stride, args.window_batch_size, args.mean, args.std
    )
    return evaluation.evaluate(
        model,
        split,
        protocol,
        multi_scale=multi_scale,
        device=device,
        threads=args.workers,
        autocast=training.autocast(args, device),
        keep=keep,
    )


def numbers(found: dict[str, Any], suffix: str) -> dict[str, float]:
    """The two numbers of Table 4."""
    return {f"{name}{suffix}": found[name] for name in ("mAcc", "mIoU")}


def finish(
    args: argparse.Namespace,
    argv: Sequence[str],
    model: Segmenter,
    split: data.Split,
    device: torch.device,
    out: str | Path | None,
) -> dict[str, Any]:
    """Evaluates as the flags say, prints the row of Table 4, and draws and writes the result if requested."""
    figure = getattr(args, "figure", None)
    found, kept = evaluated(args, model, split, device, False, args.images if figure else 0)
    values, per_class = numbers(found, ""), {"IoU": found["IoU"]}
    if args.multi_scale:
        found, kept = evaluated(args, model, split, device, True, args.images if figure else 0)
        values, per_class = values | numbers(found, " (MS)"), per_class | {"IoU (MS)": found["IoU"]}
    print(evaluation.table(values, args.num_classes), flush=True)
    result = {
        "values": values,
        "per_class": per_class,
        "unit": "%",
        "photographs": len(split),
        "paper": evaluation.TABLE_4,
        "settings": vars(args),
        "meta": report.metadata("pipelines.segment", argv, device),
    }
    if figure:
        evaluation.draw(split, kept, figure)
    if out:
        report.write(str(out), result)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains or evaluates as the command line says.

    Args:
        argv: the command line without the program's name; None: the process's own.

    Returns:
        The result, as written to JSON.

    Raises:
        ValueError: an argument, file or checkpoint is invalid.
    """
    args = parse_args(argv)
    argv = sys.argv[1:] if argv is None else argv
    torch.set_float32_matmul_precision("high")
    return {"train": run_train, "evaluate": run_evaluate}[args.command](args, argv)
