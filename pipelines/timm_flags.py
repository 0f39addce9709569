"""The flags of timm's train.py that have no effect here or are refused, and why."""

import argparse
import sys
from typing import Any, NamedTuple

from .command import name


class Flag(NamedTuple):
    """A flag of timm's train.py that this program does not implement."""

    default: Any  # timm's: a config with this value requests nothing
    why: str
    nargs: str | None = None


GENERAL = "DALI reads, decodes and augments; there are no worker processes"
TORCH = "it changes speed, not results, and nothing here needs it"
KIND = "read from the files themselves"
WITHOUT_EFFECT = {
    "pin_mem": Flag(False, "DALI writes batches to the device itself"),
    "no_prefetcher": Flag(False, "there is no prefetcher: DALI prepares batches ahead"),
    "worker_seeding": Flag("all", GENERAL),
    "use_multi_epochs_loader": Flag(False, GENERAL),
    "train_num_samples": Flag(None, KIND),
    "val_num_samples": Flag(None, KIND),
    "input_img_mode": Flag(None, "images are decoded to RGB"),
    "dataset_download": Flag(False, "nothing is downloaded: --data-dir is a folder"),
    "dataset_trust_remote_code": Flag(False, "no code from a data set is executed"),
    "dist_bn": Flag("reduce", "running means are always those of rank 0 (broadcast): exact resume relies on it"),
    "no_ddp_bb": Flag(False, TORCH),
    "synchronize_step": Flag(False, TORCH),
    "fuser": Flag("", "for TorchScript; use --torchcompile"),
    "model_ema_force_cpu": Flag(False, "the average stays on the device, where it is validated"),
    "save_images": Flag(False, "`lumix-dali show DIR -o FILE.png` draws batches as the model gets them"),
    "local_rank": Flag(0, "torchrun sets it in the environment"),
    "resplit": Flag(False, "for --aug-splits"),
}

SPLITS = "augmentation splits are not supported; a batch has one version of each image (or --aug-repeats)"
DISTILL = "distillation is not supported; train with timm's train.py, which takes this loader (docs/timm.md)"
NAFLEX = "the NaFlex loader is not supported; use timm's train.py"
SIZES = "every batch has --batch-size images, whatever their size"
FOLDER = "data come from a class folder, a list or shards (README); create one of them"
MULTILABEL = "mixing and LUMix are defined for one label per image"
REFUSED = {
    "vflip": Flag(0.0, "the loader flips horizontally only"),
    "gaussian_blur_prob": Flag(None, "the loader does not blur"),
    "train_crop_mode": Flag(None, "the crop is always timm's rrc; leave it out"),
    "aug_splits": Flag(0, SPLITS),
    "jsd_loss": Flag(False, SPLITS),
    "split_bn": Flag(False, SPLITS),
    "drop_connect": Flag(None, "timm deprecates it; give --drop-path"),
    "dataset": Flag("", FOLDER),
    "class_map": Flag("", "classes are the folders' names, or the shards' list"),
    "input_key": Flag(None, FOLDER),
    "target_key": Flag(None, FOLDER),
    "task": Flag("classification", MULTILABEL),
    "target_format": Flag(None, MULTILABEL),
    "multilabel_threshold": Flag(None, MULTILABEL),
    "loss": Flag(None, "the loss is LUMix, or with --no-lumix soft cross entropy or BCE (--bce-loss)"),
    "torchscript": Flag(False, "PyTorch deprecates it; use --torchcompile"),
    "device_modules": Flag(None, "DALI runs on CPUs and NVIDIA GPUs", "+"),
    "model_dtype": Flag(None, "weights stay float32; use --amp"),
    "no_resume_opt": Flag(False, "--resume restores everything; --initial-checkpoint takes the weights only"),
    "start_epoch": Flag(None, "--resume knows its epoch; --initial-checkpoint starts at 0"),
    "epoch_repeats": Flag(0.0, "an epoch has each image once; give more --epochs, or --aug-repeats"),
    "tta": Flag(0, "validation sees each image once"),
    "train_batch_sizes": Flag(None, SIZES, "+"),
    "train_batches_per_epoch": Flag(None, "an epoch has each image once"),
    "variable_batch_loss_scale": Flag("none", SIZES),
    "naflex_loader": Flag(False, NAFLEX),
    "naflex_train_seq_lens": Flag([128, 256, 576, 784, 1024], NAFLEX, "+"),
    "naflex_max_seq_len": Flag(576, NAFLEX),
    "naflex_patch_sizes": Flag(None, NAFLEX, "+"),
    "naflex_patch_size_probs": Flag(None, NAFLEX, "+"),
    "naflex_loss_scale": Flag("linear", NAFLEX),
    "naflex_patchify_channels_first": Flag(False, NAFLEX),
    "kd_model_name": Flag(None, DISTILL),
    "kd_distill_type": Flag("logit", DISTILL),
    "kd_loss_type": Flag("kl", DISTILL),
    "distill_loss_weight": Flag(None, DISTILL),
    "task_loss_weight": Flag(None, DISTILL),
    "kd_temperature": Flag(4.0, DISTILL),
    "kd_student_feature_dim": Flag(None, DISTILL),
    "kd_teacher_feature_dim": Flag(None, DISTILL),
    "kd_token_distill_type": Flag("soft", DISTILL),
}
FOREIGN = WITHOUT_EFFECT | REFUSED

# Flags with a different default than in timm, and why; equivalent values (None for "") are not listed.
DIFFERENT = {
    "cutmix": Flag(0.0, "LUMix needs it"),
    "color_jitter": Flag(0.4, "off by default, like all augmentation except crop and flip"),
    "train_interpolation": Flag("random", "the model's, as in validation"),
    "val_split": Flag("validation", "`val` or `validation`, whichever exists"),
    "workers": Flag(4, "threads, not processes; one for each CPU that the process may use"),
    "device": Flag("cuda", "a GPU if there is one"),
    "output": Flag("", "timm: output/train"),
    "checkpoint_hist": Flag(
        10, "`model_best` and `last` are always kept; each further file of a large model takes gigabytes"
    ),
    "decay_epochs": Flag(90, "90, or the last fifth for wsd and rsqrt, as in timm 1.0.31 and later"),
}
SAME_NAME = {  # flags whose meaning differs from timm's
    "no_aug": "images that are not square are cropped at a random position, not at the centre",
    "resume": "everything is restored, even within an epoch; `auto`, or no PATH, means OUTPUT/EXPERIMENT",
    "recovery_interval": "updates between writes of `last.pth.tar`; also `--checkpoint-interval`",
    "model_ema": "the average and the model are both validated, in one pass; the average's scores decide",
    "bce_target_thresh": "requires `--no-lumix`: a threshold makes λ 0 or 1 and leaves LUMix nothing to weigh",
    "bce_pos_weight": "requires `--no-lumix`",
    "log_wandb": "raises an error at the start if wandb is not installed",
    "in_chans": "3",
    "aa": "RandAugment's strings (`rand-...`)",
    "mixup_mode": "`batch` or `elem`",
    "train_img_sizes": "one size is drawn per epoch, with timm's probabilities; timm draws one per batch. "
    "A ViT needs `--model-kwargs dynamic_img_size=True`",
    "val_interval": "`last.pth.tar` is still written after every epoch",
}
OWN = {  # not timm's
    "no_lumix",
    "r_r",
    "r_s",
    "lumix_warmup_epochs",
    "eta",
    "noise",
    "attach_lam_s",
    "apply_to",
    "max_bad",
    "checkpoint_interval",
    "overwrite",
    "smoke",
    "log_tensorboard",
}


def add_to(parser: argparse.ArgumentParser) -> None:
    """Accepts timm's flags that are not implemented here; those not given are absent from the parsed arguments."""
    for dest, flag in FOREIGN.items():
        options: dict[str, Any] = dict(action="store_true") if flag.default is False else dict(nargs=flag.nargs)
        parser.add_argument(name(dest), default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace, where: str = "") -> None:
    """Removes unimplemented flags from `args`: reports those without effect, ends the program for the others."""
    given = {dest: vars(args).pop(dest) for dest in FOREIGN if hasattr(args, dest)}
    asked = [dest for dest, value in given.items() if _is_asked(value, FOREIGN[dest].default)]
    if refused := [f"{name(dest)}: {REFUSED[dest].why}" for dest in asked if dest in REFUSED]:
        parser.error(where + "; ".join(refused))
    for dest in asked:
        print(f"{where}{name(dest)} has no effect here: {WITHOUT_EFFECT[dest].why}", file=sys.stderr)


def _is_asked(value: Any, default: Any) -> bool:
    texts = [str(each) for each in (value if isinstance(value, list) else [value])]
    usual = [str(each) for each in (default if isinstance(default, list) else [default])]
    try:
        same = [*map(float, texts)] == [*map(float, usual)]
    except ValueError:
        same = texts == usual
    return not same and value not in (None, "", False)


def table(parser: argparse.ArgumentParser) -> str:
    """docs/timm_flags.md."""
    options = {action.dest: action for action in parser._actions if action.option_strings}
    built = [dest for dest in options if dest not in FOREIGN.keys() | OWN | {"help"}]

    def row(dest: str, *cells: str) -> str:
        return f"| `{name(dest)}` | {' | '.join(cells)} |"

    lines = [
        "# timm's training flags",
        "",
        "`python -m pipelines.train` takes the flags of timm's train.py. `python -m pipelines.flags` writes",
        "this page, and a test compares it with timm's own parser, to notice the flags of a new release.",
        "",
        "## Supported",
        "",
        "They have the same meaning and default as in timm, except for those in the two tables below:",
        "",
        ", ".join(f"`{name(dest)}`" for dest in sorted(built)) + ", and the data folder as a positional argument.",
        "",
        "| flag | default in timm | here |",
        "|---|---|---|",
        *(row(dest, f"`{flag.default or 'empty'}`", flag.why) for dest, flag in DIFFERENT.items() if dest != "cutmix"),
        row("cutmix", "`0`", f"`1`: {DIFFERENT['cutmix'].why}"),
        "",
        "| flag | what differs |",
        "|---|---|",
        *(row(dest, why) for dest, why in SAME_NAME.items()),
        "",
        "## Accepted, without effect",
        "",
        "They may appear on the command line or in a config; a line on stderr says that they do nothing.",
        "",
        "| flag | why |",
        "|---|---|",
        *(row(dest, flag.why) for dest, flag in WITHOUT_EFFECT.items()),
        "",
        "## Refused",
        "",
        "They would change the training: any value other than timm's default ends the program.",
        "",
        "| flag | reason and alternative |",
        "|---|---|",
        *(row(dest, flag.why) for dest, flag in REFUSED.items()),
        "",
        "## Only here",
        "",
        "| flag | default | meaning |",
        "|---|---|---|",
        *(
            row(dest, f"`{_shown(option.default)}`", str(option.help))
            for dest, option in options.items()
            if dest in OWN
        ),
    ]
    return "\n".join(lines).replace("docs/timm.md", "[timm.md](timm.md)") + "\n"


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)
