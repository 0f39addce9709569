"""The command line of `pipelines.evaluate`."""

import argparse
from collections.abc import Sequence

from .command import Help, KeyValues, check_minimum, require

IMAGENET = "the validation set of ImageNet-1k (https://image-net.org) as DIR/WNID/IMAGE.JPEG or DIR/val/WNID/..."
BENCHMARK = "from https://github.com/hendrycks/natural-adv-examples, unpacked: 200 folders DIR/WNID/IMAGE.jpg"
EXPECTED = {
    "top1": IMAGENET,
    "shuffle": IMAGENET,
    "occlusion": IMAGENET,
    "wsol": IMAGENET,
    "imagenet-a": f"ImageNet-A {BENCHMARK}",
    "imagenet-o": f"ImageNet-O {BENCHMARK}",
    "wsas": "PASCAL VOC 2012 (http://host.robots.ox.ac.uk/pascal/VOC/voc2012), unpacked, with "
    "DIR/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/val.txt}",
}
BOXES = "ILSVRC2012_bbox_val_v3.tgz of ImageNet (https://image-net.org), unpacked: ILSVRC2012_val_*.xml anywhere"


def grid(text: str) -> tuple[int, int]:
    """An argparse type: 4x8 for 4 rows and 8 columns."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: give ROWSxCOLUMNS, such as 4x8")
    return int(sides[0]), int(sides[1])


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Every flag; a group whose title names protocols applies only to them."""
    parser = argparse.ArgumentParser("python -m pipelines.evaluate", description=description, formatter_class=Help)
    parser.add_argument("protocol", choices=EXPECTED, help="top1, or a protocol of the paper")
    _add_input(parser)
    _add_protocols(parser)
    _add_run(parser)
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", help="name of a timm model; None: the checkpoint's")
    add("--checkpoint", metavar="FILE", help="checkpoint of pipelines.train, or any file that timm.create_model loads")
    add("--pretrained", action="store_true", help="use timm's weights instead")
    add("--num-classes", type=int, help="outputs of the model; None: the checkpoint's, else timm's")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="further model arguments")

    add = parser.add_argument_group("images").add_argument
    add("--data-dir", required=True, metavar="DIR", help="data of the protocol; an error lists what is missing")
    add("--img-size", type=int, help="side of a square input; None: the model's, for wsas 512")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="input of any shape")
    add("--crop-pct", type=float, help="centre crop; None: .875, XCiT 1, or for top1 that of a run's checkpoint")
    add("--interpolation", choices=("bilinear", "bicubic"), help="None: bilinear, for top1 bicubic")
    add("--mean", type=float, nargs=3, help="mean of each channel, in [0, 1]; None: the model's")
    add("--std", type=float, nargs=3, help="standard deviation of each channel, in [0, 1]; None: the model's")


def _add_protocols(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("shuffle").add_argument
    add(
        "--grids",
        type=grid,
        nargs="+",
        default=[(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)],
        metavar="RxC",
        help="rows and columns of cells",
    )
    add = parser.add_argument_group("shuffle, occlusion").add_argument
    add(
        "--perm",
        choices=("batch", "sample"),
        default="batch",
        help="one draw per batch, as in the public code, or one per image",
    )
    add("--seeds", type=int, default=3, metavar="N", help="number of draws; their spread is reported")
    add("--seed", type=int, default=0, help="seed of the first draw")
    add = parser.add_argument_group("occlusion").add_argument
    add(
        "--drop",
        nargs="+",
        choices=("random", "salient", "non-salient"),
        metavar="MODE",
        default=["random", "salient", "non-salient"],
        help="what is dropped",
    )
    add(
        "--losses",
        type=int,
        nargs="+",
        default=list(range(0, 100, 10)),
        metavar="PERCENT",
        help="share that is dropped, of the cells, or of the attention in the salient modes",
    )
    add("--drop-grid", type=grid, default=(14, 14), metavar="RxC", help="cells of random drops")
    add("--dino-model", default="vit_small_patch16_224.dino", help="model whose attention is saliency")
    add("--dino-checkpoint", metavar="FILE", help="its weights; None: timm's")
    add = parser.add_argument_group("occlusion, wsol").add_argument
    add("--head", help="index, mean or max; None: 1 for occlusion, as in the public code, mean for wsol")
    add = parser.add_argument_group("wsas, wsol").add_argument
    add("--mass", type=float, default=0.9, help="share of the attention that counts as foreground")
    add = parser.add_argument_group("wsol").add_argument
    add("--boxes", metavar="DIR", help="bounding boxes of ImageNet's validation set")
    add("--component", choices=("largest", "all"), default="largest", help="components that the box encloses")
    add("--connectivity", type=int, choices=(4, 8), default=4, help="connectivity of components")
    add("--boxes-per-image", choices=("best", "mean"), default="best", help="IoU if there are several boxes")
    add = parser.add_argument_group("imagenet-a").add_argument
    add("--bin-size", type=int, default=100, metavar="N", help="samples per bin of the calibration error")
    add = parser.add_argument_group("imagenet-o").add_argument
    add("--val-dir", metavar="DIR", help="ImageNet's validation set")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("-b", "--batch-size", type=int, default=256, help="images per batch")
    add("-j", "--workers", type=int, help="DALI's CPU threads; None: the CPUs it may use")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="type of mixed precision")
    add("--out", metavar="FILE.json", help="write the result and its origin")
    add("--figure", metavar="FILE.png", help="plot the result beside the paper's")


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Reads the command line; flags that are invalid or would be ignored end the program here."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    for group in parser._action_groups:
        theirs = (group.title or "").split(", ")
        given = [action for action in group._group_actions if getattr(args, action.dest, None) != action.default]
        if given and set(theirs) <= EXPECTED.keys() and args.protocol not in theirs:
            parser.error(f"{given[0].option_strings[-1]} is for {group.title}: leave it out with {args.protocol}")
    if bool(args.checkpoint) == args.pretrained:
        parser.error("give either --checkpoint FILE or --pretrained")
    check_minimum(parser, args, {"seeds": 1, "seed": 0, "batch_size": 1, "bin_size": 1, "workers": 1})
    if not 0 < args.mass <= 1:
        parser.error(f"--mass {args.mass}: give a share in (0, 1]")
    if odd := [loss for loss in args.losses if not 0 <= loss < 100]:
        parser.error(f"--losses {odd[0]}: give percents in [0, 100)")
    args.head = args.head or {"occlusion": "1"}.get(args.protocol, "mean")
    if args.head not in ("mean", "max") and not args.head.isdecimal():
        parser.error(f"--head {args.head}: give a number, mean or max")
    return args


def require_packages(args: argparse.Namespace) -> None:
    """Raises ValueError if the command needs a package that is missing, before it does any work."""
    if args.protocol == "imagenet-o":
        require("sklearn", args.protocol)
    if args.protocol == "wsol" and args.component == "largest":
        require("scipy", "--component largest")
    if args.figure:
        require("matplotlib", f"--figure {args.figure}")
