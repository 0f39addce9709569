"""What `pipelines.segment` does: `run_train` and `run_evaluate`."""

import argparse
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

from .. import checkpoint, report
from ..checkpoint import Found
from ..flags import ONCE
from ..folder import claimed, write_text
from ..ranks import Stop, find_device
from . import data, evaluation, training
from .model import Segmenter, build

MODEL_FLAGS = ("model", "model_kwargs", "num_classes", "img_size", "short_side", "mean", "std", "decoder_depth")


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


def run_train(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Trains, evaluates and writes result.json."""
    train, val = (data.load(args.data_dir, split, args.num_classes) for split in ("train", "val"))
    device = find_device(args.device)
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
    last = folder / "last.pth.tar"
    found = training.read_checkpoint(last) if args.resume and last.exists() else None
    with claimed(folder, args, found), Stop() as stop:
        start(run, args, len(train), found)
        training.fit(run, args, train, lambda: numbers(evaluated(args, model, val, device, False)[0], ""), stop)
        return finish(args, argv, model, val, device, folder / "result.json")


def start(run: training.Run, args: argparse.Namespace, photographs: int, found: Found | None) -> None:
    """Resumes if there is a checkpoint, and sets up the run's folder."""
    if found:
        training.resume(run, args, found)
    settings = {key: value for key, value in vars(args).items() if key not in ONCE | {"command"}}
    write_text(run.folder / "args.yaml", yaml.safe_dump(settings))
    origin = args.backbone or ("timm's weights" if args.pretrained else "random weights")
    print(
        f"{args.model} from {origin}: {photographs} photographs, {args.num_classes} classes, crops of "
        f"{args.img_size}, {args.iterations} updates on {run.device}, into {run.folder}"
    )
    if args.resume:
        print(f"resuming after update {run.update}" if found else f"--resume: {run.folder} has no checkpoint yet")
    sys.stdout.flush()


def run_evaluate(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Evaluates a checkpoint, and draws and writes the result if requested."""
    state = training.read_checkpoint(Path(args.checkpoint)).state
    for key in MODEL_FLAGS:
        setattr(args, key, state["args"][key])
    args.stride = args.stride or state["args"]["stride"]
    val, device = data.load(args.data_dir, args.split, args.num_classes), find_device(args.device)
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
