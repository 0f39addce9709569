"""The training program's command line, with timm's flag names where timm has them, and values derived from it.

python -m pipelines.flags > docs/timm_flags.md
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence

from . import timm_flags
from .command import Help, KeyValues, check_minimum, name, read_config, set_defaults

# They concern a single invocation, not the run, so args.yaml omits them.
ONCE = {"config", "resume", "overwrite", "stop_epoch", "rank", "world_size"}
ALIASES = {"recovery_interval": "checkpoint_interval"}  # keys of timm's args.yaml
MINIMUM = {
    "epochs": 1,
    "log_interval": 1,
    "checkpoint_hist": 0,
    "checkpoint_interval": 0,
    "seed": 0,
    "max_bad": 0,
    "grad_accum_steps": 1,
    "lumix_warmup_epochs": 0,
    "batch_size": 1,
    "validation_batch_size": 1,
    "workers": 1,
    "val_interval": 1,
    "stop_epoch": 1,
    "num_classes": 1,
    "img_size": 1,
    "cooldown_epochs": 0,
    "warmup_epochs": 0,
}


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Every flag, with its default."""
    parser = argparse.ArgumentParser(
        "python -m pipelines.train",
        usage="%(prog)s DIR [--model M] [--epochs N] [-b N] [--lr X] [--config FILE] [FLAG ...]",
        description=description,
        formatter_class=Help,
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="YAML file of defaults, such as args.yaml; flags override it"
    )
    for add_group in (
        _add_data,
        _add_augmentation,
        _add_loss,
        _add_model,
        _add_optimiser,
        _add_schedule,
        _add_run,
        _add_logging,
    ):
        add_group(parser)
    timm_flags.add_to(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    parser.add_argument("data", nargs="?", metavar="DIR", help="same as --data-dir")
    add("--data-dir", metavar="DIR", help="folder with train/ and val/ or validation/")
    add("--train-split", default="train", help="folder of the training images under DIR")
    add("--val-split", help="folder of the validation images; None: val or validation")
    add("-b", "--batch-size", type=int, default=128, help="images per batch")
    add("-vb", "--validation-batch-size", type=int, help="None: the training batch size")
    add("-j", "--workers", type=int, help="DALI's CPU threads; None: the CPUs it may use")
    add("--img-size", type=int, help="side of a square input; None: the model's")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="input of any shape")
    add(
        "--train-img-sizes",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="sides of the training images; one is drawn per epoch",
    )
    add("--train-size-probs", type=float, nargs="+", metavar="P", help="probability of each size; None: uniform")
    add(
        "--train-size-schedule",
        default="constant",
        choices=("constant", "progressive"),
        help="progressive: moves from the first of --train-img-sizes to the last",
    )
    add("--train-size-schedule-spread", type=float, default=0.65, help="width of the progressive window, in sizes")
    add("--train-size-random-mix", type=float, default=0.1, help="share of epochs with any of the sizes")
    add("--in-chans", type=int, choices=(3,), help="channels: images are decoded to RGB")
    add("--interpolation", default="", help="bilinear or bicubic; None: the model's")
    add("--mean", type=float, nargs=3, help="mean of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="standard deviation of each channel, in [0, 1]; None: the model's")
    add("--crop-pct", type=float, help="centre crop in validation; None: the model's")
    add("--max-bad", type=int, default=100, metavar="N", help="max damaged files to replace before raising an error")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true", help="no crop, flip, jitter, RandAugment or erasing; mixing stays")
    add("--scale", type=float, nargs=2, default=(0.08, 1.0), help="area of the random resized crop")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="aspect ratio of that crop")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    add("--aa", metavar="SPEC", help="RandAugment, such as rand-m9-mstd0.5-inc1; None: off")
    add(
        "--color-jitter",
        type=float,
        nargs="+",
        metavar="X",
        help="brightness, contrast, saturation and hue, or one number for the first three; not used with --aa; "
        "None, where timm has .4: off",
    )
    add("--color-jitter-prob", type=float, help="probability that an image is jittered; None: always")
    add("--grayscale-prob", type=float, help="probability that an image loses its colours; None: 0")
    add("--reprob", type=float, default=0.0, help="probability of random erasing, before mixing")
    add("--remode", default="pixel", help="fill of erased regions: pixel (noise), rand (one colour) or const")
    add("--recount", type=int, default=1, help="max number of erased regions per image")
    add("--aug-repeats", type=int, default=0, metavar="N", help="repeated augmentation; 0: off")
    add(
        "--train-interpolation", default="", help="bilinear, bicubic or random (timm's default); empty: --interpolation"
    )


def _add_loss(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("mixing and loss").add_argument
    add("--mixup", type=float, default=0.0, help="alpha of Mixup; 0 is off")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0, timm's default, is off")
    add(
        "--cutmix-minmax",
        type=float,
        nargs=2,
        help="min and max of the box's sides, as fractions of the image, instead of alpha",
    )
    add("--mixup-prob", type=float, default=1.0, help="share of the samples or batches that are mixed")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of CutMix if both are on")
    add("--mixup-mode", default="batch", help="one draw per batch, or one per sample: batch or elem")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="turn mixing off from epoch N on; 0: never")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--bce-loss", action="store_true", help="sigmoid BCE instead of softmax cross entropy")
    add("--bce-sum", action="store_true", help="sum the BCE over the classes instead of averaging")
    add("--bce-target-thresh", type=float, metavar="T", help="labels above T become 1, others 0; with --no-lumix")
    add("--bce-pos-weight", type=float, metavar="W", help="weight of the positive labels; with --no-lumix")
    add("--no-lumix", action="store_true", help="plain CutMix/Mixup: soft cross entropy at λ0")
    add("--r-r", type=float, default=0.4, help="weight of the noise λ_r in λ")
    add("--r-s", type=float, default=0.1, help="weight of the saliency λ_s in λ")
    add(
        "--lumix-warmup-epochs",
        type=float,
        default=0,
        metavar="N",
        help="increase both weights linearly from 0 over the first N epochs",
    )
    add("--eta", type=float, default=1.0, help="weight of the regulariser R")
    add(
        "--noise",
        nargs="+",
        default=["beta", "2.0"],
        metavar="LAW",
        help="distribution of λ_r: beta ALPHA, normal MEAN STD, or uniform",
    )
    add("--attach-lam-s", action="store_true", help="backpropagate through λ_s")
    add("--apply-to", choices=("cutmix", "all"), default="cutmix", help="samples that LUMix applies to")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", help="any model name that timm.create_model accepts")
    add("--num-classes", type=int, help="outputs of the model; None: the number of training classes")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--pretrained-path", metavar="PATH", help="file to load in place of timm's weights; its head may differ")
    add("--initial-checkpoint", default="", metavar="PATH", help="checkpoint whose weights the run starts from")
    add("--gp", metavar="POOL", help="global pooling; None: the model's")
    add("--drop", type=float, default=0.0, help="dropout rate")
    add("--drop-path", type=float, help="stochastic depth rate; None: the model's")
    add("--drop-block", type=float, help="DropBlock rate; None: the model's")
    add("--bn-momentum", type=float, help="momentum of batch norm; None: the model's")
    add("--bn-eps", type=float, help="epsilon of batch norm; None: the model's")
    add("--head-init-scale", type=float, help="factor on the classifier's initial weights and biases")
    add("--head-init-bias", type=float, help="initial value of the classifier's biases")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="further model arguments")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    add("--fast-norm", action="store_true", help="timm's low-precision layer norm under --amp")
    add(
        "--model-ema",
        action="store_true",
        help="average the weights; model_best is chosen by the average, and evaluation loads it",
    )
    add("--model-ema-decay", type=float, default=0.9998, help="decay of that average")
    add("--model-ema-warmup", action="store_true", help="increase the decay gradually; for runs of few updates")
    add("--channels-last", action="store_true", help="channels-last memory format for images and model")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    add("--torchcompile-mode", metavar="MODE", help="mode of torch.compile, such as reduce-overhead")


def _add_optimiser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="sgd", help="any optimiser of timm.optim")
    add("--opt-eps", type=float, help="epsilon; None: the optimiser's")
    add("--opt-betas", type=float, nargs="+", help="betas; None: the optimiser's")
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="further optimiser arguments")
    add("--momentum", type=float, default=0.9, help="momentum, for optimisers that have one")
    add("--weight-decay", type=float, default=2e-5, help="not applied to biases and norms")
    add("--layer-decay", type=float, metavar="X", help="learning rate times X per layer below the head")
    add("--layer-decay-min-scale", type=float, default=0.0, metavar="X", help="min value of that factor")
    add("--layer-decay-no-opt-scale", type=float, metavar="X", help="layers with a smaller factor are frozen")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches per update")
    add("--clip-grad", type=float, metavar="NORM", help="clipping threshold; None: no clipping")
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="how gradients are clipped")
    add("--lr", type=float, help="learning rate; None: --lr-base scaled by the batch size")
    add("--lr-base", type=float, default=0.1, help="learning rate at --lr-base-size")
    add("--lr-base-size", type=int, default=256, help="batch size of --lr-base, over all ranks and accumulated batches")
    add("--lr-base-scale", choices=("linear", "sqrt"), help="None: sqrt for adaptive optimisers, else linear")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, default=300, help="length of the schedule, without cycles, cooldown and prefix")
    add("--stop-epoch", type=int, metavar="N", help="stop after N epochs of the schedule; --resume continues it")
    add("--sched", default="cosine", help="any schedule of timm.scheduler")
    add("--sched-on-updates", action="store_true", help="step the schedule per update, not per epoch")
    add("--warmup-epochs", type=int, default=5, help="epochs of warm-up, starting from --warmup-lr")
    add("--warmup-lr", type=float, default=1e-5, help="learning rate at the start of the warm-up")
    add("--warmup-prefix", action="store_true", help="start the schedule after the warm-up")
    add("--cooldown-epochs", type=int, default=0, help="epochs at --min-lr after the schedule")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of the schedule")
    add("--decay-epochs", type=float, help="epochs between decays; None: 90, or the last fifth for wsd and rsqrt")
    add("--decay-milestones", type=int, nargs="+", default=(90, 180, 270), help="epochs of the decays, for multistep")
    add("--decay-rate", "--dr", type=float, default=0.1, help="factor of each decay")
    add("--patience-epochs", type=int, default=10, help="epochs without improvement before a decay, for plateau")
    add("--lr-noise", type=float, nargs="+", help="start and end of learning rate noise, as fractions of the schedule")
    add("--lr-noise-pct", type=float, default=0.67, help="max amplitude of that noise, as a fraction")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of that noise")
    add("--lr-cycle-mul", type=float, default=1.0, help="length of a cycle relative to the previous one")
    add("--lr-cycle-decay", type=float, default=0.5, help="peak of a cycle relative to the previous one")
    add("--lr-cycle-limit", type=int, default=1, help="number of cycles")
    add("--lr-k-decay", type=float, default=1.0, help="k-decay exponent, for cosine and poly")
    add("--lr-decay-fn", help="decay function, for wsd and rsqrt; None: the schedule's")
    add("--lr-stable-timescale", type=float, help="timescale of rsqrt; None: --warmup-epochs")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; with several ranks each has its own GPU")
    add("--sync-bn", action="store_true", help="synchronise batch norm across ranks, on GPUs")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="type of mixed precision")
    add("--seed", type=int, default=42, help="seed of all random numbers")
    add("--output", default="runs", metavar="PATH", help="parent folder of runs")
    add("--experiment", default="", help="folder under OUTPUT; empty: time, model and size")
    add("--overwrite", action="store_true", help="replace a run that is already in that folder")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between validations")
    add("--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="metric that selects model_best")
    add("--checkpoint-hist", type=int, default=0, metavar="N", help="number of best epochs to keep besides model_best")
    add("--save-epochs", type=int, nargs="+", default=[], metavar="N", help="keep milestone-N after N epochs")
    add(
        "--checkpoint-interval",
        "--recovery-interval",
        type=int,
        default=0,
        metavar="N",
        help="updates between writes of last.pth.tar; 0: only after each epoch",
    )
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="PATH",
        help="resume from this checkpoint or run folder; auto or no PATH: from OUTPUT/EXPERIMENT, if it has a run",
    )
    add(
        "--smoke",
        action="store_true",
        help="run two steps on generated images instead of --data-dir, to check that the command works",
    )


def _add_logging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("logging").add_argument
    add(
        "--log-interval",
        type=int,
        default=50,
        metavar="N",
        help="batches between updates of the loss shown and samples of λ",
    )
    add("--log-tensorboard", action="store_true", help="log each epoch to TensorBoard, in the run's folder")
    add("--log-wandb", action="store_true", help="log each epoch to Weights & Biases")
    add("--wandb-project", metavar="NAME", help="project for --log-wandb")
    add("--wandb-tags", nargs="+", default=[], metavar="TAG", help="tags for --log-wandb")
    add("--wandb-resume-id", default="", metavar="ID", help="W&B run to append to, with --resume")


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Reads the command line; invalid flags end the program here, before any work."""
    parser = build_parser(description)
    if path := parser.parse_args(argv).config:
        config = {ALIASES.get(key, key): value for key, value in read_config(parser, path).items()}
        if isinstance(config.get("color_jitter"), int | float):  # timm writes a number
            config["color_jitter"] = [config["color_jitter"]]
        foreign = {key: config.pop(key) for key in timm_flags.FOREIGN if key in config}
        timm_flags.settle(parser, argparse.Namespace(**foreign), f"--config {path}: ")
        set_defaults(parser, path, config)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    del args.data
    timm_flags.settle(parser, args)
    args.resume = True if args.resume == "auto" else args.resume
    try:
        args.noise = (args.noise[0], *map(float, args.noise[1:]))
    except ValueError:
        parser.error(f"--noise {' '.join(args.noise)}: give beta ALPHA, normal MEAN STD, or uniform")
    check_minimum(parser, args, MINIMUM)
    if fault := contradiction(args):
        parser.error(fault)
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.lr = learning_rate(args) if args.lr is None else args.lr
    if args.decay_epochs is None:
        args.decay_epochs = 0.2 if args.sched in ("wsd", "rsqrt") else 90.0
    return args


def contradiction(args: argparse.Namespace) -> str:
    """What is wrong with the flags and how to fix it; empty if they are valid."""
    if args.data_dir is None and not args.smoke:
        return "--data-dir is required"
    if args.resume is True and not args.experiment:
        return "--resume: name the run to resume, by --experiment or --resume PATH"
    if args.resume and args.overwrite:
        return "--overwrite replaces a run, and --resume continues one: give either"
    cutmix = args.cutmix > 0 or args.cutmix_minmax
    if not args.no_lumix and not cutmix and (args.apply_to == "cutmix" or not args.mixup):
        return (
            f"--cutmix {args.cutmix:g} leaves LUMix no sample to apply to: give --cutmix 1.0, "
            "--mixup .8 with --apply-to all, or --no-lumix"
        )
    for flag in ("bce_target_thresh", "bce_pos_weight"):
        if getattr(args, flag) is not None and not (args.bce_loss and args.no_lumix):
            return f"{name(flag)} is timm's own BCE, without LUMix: give --bce-loss --no-lumix too"
    if args.sched == "plateau" and args.val_interval > 1:
        return f"--val-interval {args.val_interval}: --sched plateau needs a score every epoch; give 1"
    if args.wandb_resume_id and not args.resume:
        return "--wandb-resume-id continues a W&B run: give --resume too"
    for flag, package in {"log_wandb": "wandb", "log_tensorboard": "tensorboard"}.items():
        if getattr(args, flag) and package not in sys.modules and not importlib.util.find_spec(package):
            return f"{name(flag)}: {package} is not installed; pip install {package}"
    return ""


def learning_rate(args: argparse.Namespace) -> float:
    """`--lr-base` scaled by the number of images per update, by timm's rule."""
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def ratios(args: argparse.Namespace, epochs: float = math.inf) -> tuple[float, float]:
    """r_r and r_s after this many epochs, which may be fractional."""
    share = min(1.0, epochs / args.lumix_warmup_epochs) if args.lumix_warmup_epochs else 1.0
    return (0.0, 0.0) if args.no_lumix else (share * args.r_r, share * args.r_s)


if __name__ == "__main__":
    sys.stdout.write(timm_flags.table(build_parser()))
