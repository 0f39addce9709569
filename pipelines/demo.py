"""Train a small model on real handwritten digits with LUMix and look at the result.

scikit-learn ships 1797 scanned digits of 8x8 pixels. The demo writes them as a JPEG class folder, trains a resnet10t
on them through DALI (on the GPU if there is one), and writes `summary.json`, `curves.png` and `mixed.png` to
`runs/demo`. It takes about three minutes on two cores.

    make demo            or            python -m pipelines.demo --seed 1
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import command, train

SIZE = 32
MEAN = STD = (0.5, 0.5, 0.5)
SCALE, HFLIP = (0.6, 1.0), 0.0  # a mirrored 2 or 5 is not a digit
GOAL = 95.0


def write_digits(root: Path) -> None:
    """Writes root/{train,val}/DIGIT/NUMBER.jpg: 1437 and 360 images, stratified, always the same."""
    if root.exists():  # renamed to this only once it is complete
        return
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(range(len(digits.images)), test_size=360, stratify=digits.target, random_state=0)
    scratch = root.with_name(root.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    for name, numbers in zip(("train", "val"), split, strict=True):
        for number in numbers:
            folder = scratch / name / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[number] * 255 / 16).round().astype("uint8")
            image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            image.save(folder / f"{number:04}.jpg", quality=95)
    scratch.rename(root)


def curves(log: Path, out: Path) -> None:
    """Draws the losses and the accuracy by epoch, from a run's log.jsonl."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [row["epoch"] + 1 for row in rows]
    figure = Figure(figsize=(9, 3.4), layout="constrained")  # without pyplot, which would look for a display
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in rows], label="training, LUMix on mixed images")
    left.plot(epochs, [row["val_loss"] for row in rows], label="validation, cross entropy")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(epochs, [row["top1"] for row in rows], color="C2")
    right.annotate(
        f"{rows[-1]['top1']:.1f} %", (epochs[-1], rows[-1]["top1"]), (-4, -14), textcoords="offset points", ha="right"
    )
    right.set(xlabel="epoch", ylabel="validation top-1, %", ylim=(None, 100.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def _flags(args: argparse.Namespace) -> list[str]:
    """The training's command line."""
    recipe = (
        f"--model resnet10t --img-size {SIZE} --crop-pct 1 --hflip {HFLIP} --cutmix 1 --mixup-mode elem "
        "--opt adamw --lr 2e-3 --weight-decay .05 --warmup-epochs 2 --batch-size 64"
    ).split()
    for name, values in dict(mean=MEAN, std=STD, scale=SCALE).items():
        recipe += [f"--{name}", *map(str, values)]
    run = ["--data-dir", str(args.data), "--epochs", str(args.epochs), "--seed", str(args.seed)]
    run += ["--device", args.device, "--output", str(args.output.parent), "--experiment", args.output.name]
    return [*recipe, *run, *(["--resume", args.resume] if args.resume else ["--overwrite"])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit status: 1 if top-1 is below the goal."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description=__doc__, formatter_class=command.Help)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--epochs", type=int, default=20, help="length of the training")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--data", type=Path, default=Path("data/digits"), help="where the images are written")
    parser.add_argument("--data-only", action="store_true", help="write the images and stop")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--resume", metavar="PATH", help="continue a run that was stopped, from its last.pth.tar")
    args = parser.parse_args(argv)
    command.check_minimum(parser, args, {"seed": 0, "epochs": 1})
    for package in ("sklearn", "matplotlib"):
        command.require(package, "the demo")

    write_digits(args.data)
    if args.data_only:
        return 0
    print(f"{args.epochs} epochs on 1437 digits; every epoch prints a line", flush=True)
    summary = train.main(_flags(args))
    from lumix_dali.cli import show

    curves(args.output / "log.jsonl", args.output / "curves.png")
    show(
        str(args.data / "train"),
        str(args.output / "mixed.png"),
        input_size=SIZE,
        cutmix_alpha=1.0,
        seed=args.seed,
        scale=SCALE,
        hflip=HFLIP,
    )

    verdict = "reached" if summary["top1"] >= GOAL else "missed"
    print(
        f"top-1 of the last epoch: {summary['top1']:.2f} %, the goal of {GOAL:g} % is {verdict}\n"
        f"see {args.output}/mixed.png, {args.output}/curves.png and {args.output}/summary.json"
    )
    return int(summary["top1"] < GOAL)


if __name__ == "__main__":
    command.run("pipelines.demo", lambda: sys.exit(main()))
