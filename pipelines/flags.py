"""The training program's command line: timm's names where timm has them, and what follows from it alone."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from timm.utils import ParseKwargs


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module's text as it stands, and every default."""


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Every flag, with its default."""
    parser = argparse.ArgumentParser("python -m pipelines.train", description=description, formatter_class=Help)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML of defaults for what follows, as args.yaml")
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="folder with train/ and val/ or validation/")
    add("--train-split", default="train", help="folder of the training images under DIR")
    add("--val-split", help="folder of the validation images; None: val or validation")
    add("-b", "--batch-size", type=int, default=128, help="images a batch")
    add("-vb", "--validation-batch-size", type=int, help="None: the training batch size")
    add("-j", "--workers", type=int, help="DALI's CPU threads; None: the CPUs it may use")
    add("--img-size", type=int, help="side of a square input; None: the model's")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="input of any shape")
    add("--scale", type=float, nargs=2, default=(.08, 1.), help="area of the random resized crop")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of that crop")
    add("--hflip", type=float, default=.5, help="probability of a horizontal flip")
    add("--aa", metavar="SPEC", help="RandAugment, such as rand-m9-mstd0.5-inc1; None: off")
    add("--color-jitter", type=float, nargs="+", metavar="X",
        help="brightness, contrast, saturation and hue, or one number for the first three; not used with --aa; "
             "None, where timm has .4: off")
    add("--reprob", type=float, default=0., help="probability of random erasing, before mixing")
    add("--remode", default="pixel", help="what is erased becomes: pixel (noise), rand (one colour) or const")
    add("--recount", type=int, default=1, help="most regions erased in an image")
    add("--aug-repeats", type=int, default=0, metavar="N", help="repeated augmentation; 0: off")
    add("--train-interpolation", default="", help="or random, which timm defaults to; empty: --interpolation")
    add("--interpolation", default="", help="bilinear or bicubic; None: the model's")
    add("--mean", type=float, nargs=3, help="of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="of each channel, in [0, 1]; None: the model's")
    add("--crop-pct", type=float, help="centre crop in validation; None: the model's")
    add("--max-bad", type=int, default=100, metavar="N", help="damaged files replaced before that is an error")

    add = parser.add_argument_group("mixing and loss").add_argument
    add("--mixup", type=float, default=0., help="alpha of Mixup; 0 is off")
    add("--cutmix", type=float, default=1., help="alpha of CutMix; 0, timm's default, is off")
    add("--cutmix-minmax", type=float, nargs=2, help="share of the box's sides instead of alpha")
    add("--mixup-prob", type=float, default=1., help="share of the samples or batches that are mixed")
    add("--mixup-switch-prob", type=float, default=.5, help="share of CutMix where both are on")
    add("--mixup-mode", default="batch", help="one draw a batch, or one a sample: batch or elem")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixing from epoch N on; 0 is never")
    add("--smoothing", type=float, default=.1, help="label smoothing")
    add("--bce-loss", action="store_true", help="sigmoid BCE instead of softmax cross entropy")
    add("--bce-sum", action="store_true", help="sum the BCE over classes instead of the mean")
    add("--no-lumix", action="store_true", help="plain CutMix/Mixup: soft cross entropy at λ0")
    add("--r-r", type=float, default=.4, help="ratio of the noise λ_r in λ")
    add("--r-s", type=float, default=.1, help="ratio of the saliency λ_s in λ")
    add("--lumix-warmup-epochs", type=float, default=0, metavar="N",
        help="both ratios grow from 0 over the first N epochs")
    add("--eta", type=float, default=1., help="weight of the regulariser R")
    add("--noise", nargs="+", default=["beta", "2.0"], metavar="LAW",
        help="law of λ_r: beta ALPHA, normal MEAN STD, or uniform")
    add("--attach-lam-s", action="store_true", help="let the gradient through λ_s")
    add("--apply-to", choices=("cutmix", "all"), default="cutmix", help="kinds of samples LUMix changes")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", help="any name timm.create_model knows")
    add("--num-classes", type=int, help="None: as many as the training folder has")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--initial-checkpoint", default="", metavar="PATH", help="start from these weights")
    add("--drop", type=float, default=0., help="dropout")
    add("--drop-path", type=float, help="stochastic depth; None: the model's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="of the model")
    add("--model-ema", action="store_true", help="keep an average of the weights; it is what is validated")
    add("--model-ema-decay", type=float, default=.9998, help="of that average")
    add("--channels-last", action="store_true", help="memory format of images and model")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")

    add = parser.add_argument_group("optimiser and schedule").add_argument
    add("--opt", default="sgd", help="any name of timm.optim")
    add("--opt-eps", type=float, help="None: the optimiser's")
    add("--opt-betas", type=float, nargs="+", help="None: the optimiser's")
    add("--momentum", type=float, default=.9, help="where the optimiser has one")
    add("--weight-decay", type=float, default=2e-5, help="not applied to biases and norms")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches an update")
    add("--clip-grad", type=float, metavar="NORM", help="None: no clipping")
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="what is clipped")
    add("--lr", type=float, help="None: --lr-base, scaled by the batch size")
    add("--lr-base", type=float, default=.1, help="learning rate at --lr-base-size")
    add("--lr-base-size", type=int, default=256, help="batch size of --lr-base, over all ranks and batches")
    add("--lr-base-scale", choices=("linear", "sqrt"), help="None: sqrt for adaptive optimisers")
    add("--epochs", type=int, default=300, help="length of the run")
    add("--sched", default="cosine", help="any name of timm.scheduler")
    add("--sched-on-updates", action="store_true", help="a step of the schedule an update, not an epoch")
    add("--warmup-epochs", type=int, default=5, help="from --warmup-lr on")
    add("--warmup-lr", type=float, default=1e-5, help="where the warm-up starts")
    add("--warmup-prefix", action="store_true", help="start the schedule after the warm-up")
    add("--min-lr", type=float, default=0., help="where the schedule ends")
    add("--decay-epochs", type=float, default=90, help="between two decays")
    add("--decay-milestones", type=int, nargs="+", default=(90, 180, 270), help="for multistep")
    add("--decay-rate", type=float, default=.1, help="factor of a decay")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; with several ranks each has its own GPU")
    add("--sync-bn", action="store_true", help="batch norm over all ranks' GPUs")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="of mixed precision")
    add("--seed", type=int, default=42, help="of everything drawn")
    add("--output", default="runs", metavar="PATH", help="where runs go")
    add("--experiment", default="", help="folder under OUTPUT; empty: time, model and size")
    add("--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="what model_best is best in")
    add("--checkpoint-hist", type=int, default=0, metavar="N", help="best epochs kept besides model_best")
    add("--checkpoint-interval", type=int, default=0, metavar="N",
        help="updates between two writes of last.pth.tar; 0: after each epoch only")
    add("--resume", nargs="?", const=True, metavar="PATH",
        help="go on from that checkpoint or run folder; without PATH from OUTPUT/EXPERIMENT, if it is there yet")
    add("--smoke", action="store_true",
        help="two steps on generated images instead of --data-dir, to see that the command works to its end")
    add("--log-interval", type=int, default=50, metavar="N",
        help="batches between two looks at the loss shown and at λ")
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Reads the command line; what is wrong on its face ends the program here, before any work."""
    parser = build_parser(description)
    if config := parser.parse_args(argv).config:
        read_config(parser, config)
    args = parser.parse_args(argv)
    if args.data_dir is None and not args.smoke:
        parser.error("--data-dir is required")
    least = {"epochs": 1, "log_interval": 1, "checkpoint_hist": 0, "checkpoint_interval": 0, "seed": 0,
             "max_bad": 0, "grad_accum_steps": 1, "lumix_warmup_epochs": 0}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {value}")
    if args.resume is True and not args.experiment:
        parser.error("--resume: name the run to go on with, by --experiment or --resume PATH")
    cutmix = args.cutmix > 0 or args.cutmix_minmax
    if not args.no_lumix and not cutmix and (args.apply_to == "cutmix" or not args.mixup):
        parser.error(f"--cutmix {args.cutmix:g} leaves LUMix no sample to apply to: give --cutmix 1.0, "
                     "--mixup .8 with --apply-to all, or --no-lumix")
    try:
        args.noise = (args.noise[0], *map(float, args.noise[1:]))
    except ValueError:
        parser.error(f"--noise {' '.join(args.noise)}: give beta ALPHA, normal MEAN STD, or uniform")
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.lr = learning_rate(args) if args.lr is None else args.lr
    return args


def read_config(parser: argparse.ArgumentParser, path: str) -> None:
    """Makes a YAML's values the flags' defaults; what else it sets is named, since it would be missed."""
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(config, dict):
        parser.error(f"--config {path}: it holds a {type(config).__name__}; write FLAG: VALUE lines")
    known = {action.dest for action in parser._actions}
    # timm writes "" for what is not set.
    parser.set_defaults(**{key: value for key, value in config.items() if key in known and value != ""})
    if unknown := [f"{key}={value}" for key, value in config.items() if key not in known and value]:
        print(f"--config {path}: no such flags here, ignored: {', '.join(unknown)}", file=sys.stderr)


def learning_rate(args: argparse.Namespace) -> float:
    """`--lr-base` scaled by the images of an update, by timm's rule."""
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio ** .5 if scale == "sqrt" else ratio)


def ratios(args: argparse.Namespace, epochs: float = math.inf) -> tuple[float, float]:
    """r_r and r_s once so many epochs, and parts of one, are done."""
    share = min(1., epochs / args.lumix_warmup_epochs) if args.lumix_warmup_epochs else 1.
    return (0., 0.) if args.no_lumix else (share * args.r_r, share * args.r_s)
