"""The command line of `pipelines.segment`, and the classes of Pascal Context."""

import argparse
from collections.abc import Sequence

from lumix_dali.cpus import available

from ..command import Help, KeyValues, check_minimum, read_config, set_defaults

VOID = 255  # pixels without a class
PASCAL_CONTEXT = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
    "bag",
    "bed",
    "bench",
    "book",
    "building",
    "cabinet",
    "ceiling",
    "cloth",
    "computer",
    "cup",
    "door",
    "fence",
    "floor",
    "flower",
    "food",
    "grass",
    "ground",
    "keyboard",
    "light",
    "mountain",
    "mouse",
    "curtain",
    "platform",
    "sign",
    "plate",
    "road",
    "rock",
    "shelves",
    "sidewalk",
    "sky",
    "snow",
    "bedclothes",
    "track",
    "tree",
    "truck",
    "wall",
    "water",
    "window",
    "wood",
)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Every flag of both commands, with its default."""
    parser = argparse.ArgumentParser("python -m pipelines.segment", description=description, formatter_class=Help)
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
    add("-j", "--workers", type=int, default=available(), help="CPU threads")
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
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="further encoder arguments")
    add("--num-classes", type=int, default=len(PASCAL_CONTEXT), help="number of classes, including background")
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
    add("--overwrite", action="store_true", help="replace a run that is already in that folder")


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Reads the command line; invalid values end the program here, before any work."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    train, _ = _commands(parser)
    if getattr(args, "config", None):
        set_defaults(train, args.config, read_config(train, args.config))
        args = parser.parse_args(argv)
    if not args.data_dir:
        parser.error("--data-dir is required")
    minimum = {
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
    check_minimum(parser, args, minimum)
    if args.command == "train":
        if args.num_classes > VOID:
            parser.error(f"--num-classes {args.num_classes}: give at most {VOID}, masks have 8 bits")
        if args.backbone and args.pretrained:
            parser.error("--backbone, --pretrained: give one of them")
        if args.resume and not args.experiment:
            parser.error("--resume: name the run to resume by --experiment")
        if args.resume and args.overwrite:
            parser.error("--overwrite replaces a run, and --resume continues one: give either")
    return args


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [*next(actions).choices.values()]
