"""One-line faults that the tests must catch, each inserted into a copy of the tree.

    python -m tests.mutants              every mutant; exit status 1 if one survives or no longer applies
    python -m tests.mutants box smooth   those whose file or fault contains one of these words

A fault counts as caught when one of its tests fails; a crash, a timeout or tests that cannot be collected do
not count. The same tests must pass on the unchanged copy first, or every fault would look caught.

mutmut makes the simple faults of the pure modules (``[tool.mutmut]`` in pyproject.toml). This file has only those that
it cannot make: in DALI graphs and in programs, and wrong formulas and swapped variables elsewhere.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "data", "mutants", "runs")
SECONDS = 300


class Mutant(NamedTuple):
    """`old` occurs once in `file` and becomes `new`; `tests` are pytest's arguments, one of which must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


VISIT = "benchmarks/gpu.py"
FN, TARGET, LOSS = "lumix_dali/fn.py", "lumix_dali/target.py", "lumix_dali/loss.py"
MIXING, TRAINING = "experiments/mixing.py", "experiments/training.py"
PUZZLE, LABELS = "experiments/puzzlemix.py", "experiments/labels.py"
ABLATIONS, PAIRED = "experiments/ablations.py", "benchmarks/paired.py"
AUGMENT = "lumix_dali/augment.py"
LAW, PLAN, DECODING = "lumix_dali/mixing.py", "lumix_dali/loading/plan.py", "lumix_dali/decoding.py"
PIPELINES, LOADER, FEED = (f"lumix_dali/loading/{name}.py" for name in ("pipelines", "loader", "feed"))
FORMATS, SOURCES, ORDER, INDEX, CONVERT = (
    f"lumix_dali/data/{name}.py" for name in ("formats", "sources", "order", "index", "convert")
)
METRICS, EVALUATE = "pipelines/metrics.py", "pipelines/evaluate.py"


def tests(module, *names):
    return " ".join(f"tests/test_{module}.py::test_{name}" for name in names)


PIXELS = tests("fn", "pixels_match_the_target")
GIVEN = tests("fn", "given_draws")
KINDS = tests("fn", "kinds_that_occur")
MINMAX = tests("fn", "minmax_counts_its_boxes")
BAD = tests("fn", "invalid_arguments_are_named_with_a_remedy")
DELIVERED = tests("loader", "delivered_pixels_match_the_target")
BOXES = tests("fn_law", "boxes")
OPERATIONS = tests("augment", "operations_match_timms")
MIXED, BOXED = tests("contracts", "pastes_of_a_mix"), tests("contracts", "pastes_of_given_boxes")
ERASED = tests("contracts", "pastes_of_erasing")
TRAINED = tests("contracts", "no_cpu_operator_of_training_reads_gpu_data")
WEIGHTS = tests("fn_law", "kinds_and_drawn_weights")
ORACLE = tests("loss", "every_option_matches_the_oracle")
MASKED = tests("loss", "a_masked_target_class_without_weight_matches_pytorch")
SCHEDULE = tests("loss", "a_schedule_recompiles_once_on_leaving_zero")
SHARES = tests("loss", "shares_above_one_are_refused_by_the_next_loss")
LAM = tests("loss", "lam_matches_the_oracle_and_is_lam0_where_lumix_does_not_apply")
OCCLUSION, WSOL = tests("evaluate", "occlusion"), tests("evaluate", "wsol")
RESIZE = tests("mixing", "resizemix_pastes_the_whole_partner_into_the_box")
TRANSMIX = tests("mixing", "transmix_by_hand", "transmix_leaves_other_kinds_alone")
BY_HAND = tests("ablations", "statistics_by_hand")
LAWS = {
    name: tests("mixing_law", test)
    for name, test in dict(
        partners="partners_are_uniform_over_the_other_samples",
        boxes="boxes_follow_their_distribution",
        minmax="minmax_boxes_follow_timms_distribution",
        kinds="kinds_and_weights_follow_their_distributions",
        occur="kinds_that_occur",
        smallest="the_smallest_batches",
        patches="no_patch_is_empty_or_leaves_the_image",
        pixels="pixels_and_lam0_match_the_target",
        differ="plans_differ_by_seed_epoch_rank_and_iteration",
    ).items()
}
DENSE = tests("target", "dense_equals_the_oracle", "dense_keeps_the_sum_when_both_classes_are_one")

MUTANTS = [
    # λ0
    Mutant("λ0 ↔ 1 - λ0 of CutMix", FN, "return area[1] / area[0]", "return 1.0 - area[1] / area[0]", PIXELS),
    Mutant(
        "λ0 ↔ 1 - λ0 of Mixup",
        FN,
        "_scale(images, 1.0 - weight) + _scale(partners, weight)",
        "_scale(images, weight) + _scale(partners, 1.0 - weight)",
        PIXELS,
    ),
    Mutant(
        "area of the box before clipping",
        FN,
        "if drawn_lam is not None and not mixing.counts_lam0:",
        "if drawn_lam is not None:",
        PIXELS,
    ),
    Mutant(
        "correct_lam ignored",
        FN,
        "if drawn_lam is not None and not mixing.counts_lam0:",
        "if False:",
        tests("fn", "drawn_weight_without_correction"),
    ),
    Mutant(
        "given λ0 ignored",
        FN,
        "Draw(partner, lam0=lam0, pixels=pixels)",
        "Draw(partner, pixels=pixels)",
        tests("fn", "a_given_lam0_is_emitted_unchanged"),
    ),
    Mutant(
        "blend wraps white around to black",
        FN,
        "BELOW_HALF = -1e-3 / 255",
        "BELOW_HALF = 0.0",
        tests("fn", "every_pair_of_levels_blends_within_one_level"),
    ),
    # the box
    Mutant("box not clipped below 0", FN, "return math.clamp(low, 0, size)", "return low", PIXELS),
    Mutant("box not clipped at the far edge", FN, "math.clamp(low + side, 0, size)", "low + side", PIXELS),
    Mutant(
        "x and y swapped in the emitted box",
        FN,
        "fn.cat(_put(drawn.start, device), _put(drawn.stop, device), axis=1)[1]",
        "fn.cat(*(c[:, i : i + 1] for c in (drawn.start, drawn.stop) for i in (1, 0)), axis=1)[1]",
        PIXELS,
    ),
    Mutant(
        "height and width swapped",
        FN,
        "size = images.shape(dtype=types.INT32)[:2]",
        "size = fn.cat(*(images.shape(dtype=types.INT32)[i : i + 1] for i in (1, 0)))",
        PIXELS,
    ),
    Mutant(
        "pasted from another place",
        FN,
        "multi_paste(own, partner, in_anchors=start,",
        "multi_paste(own, partner, in_anchors=start * 0,",
        PIXELS,
    ),
    Mutant("box left in samples of other kinds", FN, "axis=1)[1] * is_cutmix", "axis=1)[1]", PIXELS),
    Mutant("given box used in samples of other kinds", FN, "box[2:] * is_cutmix", "box[2:]", GIVEN),
    Mutant(
        "centre cast without floor: ends at half weight",
        FN,
        "math.floor(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size)",
        "(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size)",
        BOXES,
    ),
    Mutant(
        "side cast without floor",
        FN,
        "math.floor(math.sqrt(lam + _WHOLE) * size)",
        "(math.sqrt(lam + _WHOLE) * size)",
        BOXES,
    ),
    Mutant("side without the square root", FN, "math.sqrt(lam + _WHOLE)", "(lam + _WHOLE)", BOXES),
    Mutant(
        "odd sides off by one",
        FN,
        "low = centre - side // 2",
        "low = centre - (side + 1) // 2",
        tests("timm_parity", "box_rule"),
    ),
    Mutant("one centre for both axes", FN, "shape=[2])", "shape=[1])", BOXES),
    Mutant("minmax ignored", FN, "if mixing.cutmix_minmax is not None:", "if False:", MINMAX),
    Mutant(
        "minmax never reaches the far edge",
        FN,
        "(size - side + 1)",
        "(size - side)",
        tests("timm_parity", "minmax_rule"),
    ),
    Mutant(
        "minmax with its upper end",
        FN,
        "uniform[0] * (longest - shortest)",
        "uniform[0] * (longest - shortest + 1)",
        tests("fn_law", "minmax_boxes"),
    ),
    # partners, and whether a sample is mixed
    Mutant("labels not permuted", FN, "fn.permute_batch(labels, indices=drawn.partner)", "labels", PIXELS),
    Mutant(
        "labels permuted apart from the images",
        FN,
        "fn.permute_batch(images, indices=drawn.partner)",
        "fn.permute_batch(images, indices=fn.batch_permutation())",
        PIXELS,
    ),
    Mutant(
        "labels ↔ partner_labels",
        FN,
        "MixTarget(labels, fn.permute_batch(labels, indices=drawn.partner),",
        "MixTarget(fn.permute_batch(labels, indices=drawn.partner), labels,",
        PIXELS,
    ),
    Mutant(
        "labels through float32",
        FN,
        "fn.cast(_put(labels, device), dtype=types.INT64)",
        "fn.cast(fn.cast(_put(labels, device), dtype=types.FLOAT), dtype=types.INT64)",
        tests("fn", "labels_from_readers_and_from_lists"),
    ),
    Mutant("own partner", FN, "fn.batch_permutation(no_fixed_points=True)", "fn.batch_permutation()", PIXELS),
    Mutant(
        "alone, yet mixed",
        FN,
        "is_mixed = is_cutmix = partner != other",
        "is_mixed = is_cutmix = partner == partner",
        PIXELS,
    ),
    Mutant("alone, yet mixed by chance", FN, " + (partner == other)", " + 0.0", PIXELS),
    Mutant("prob ignored", FN, "is_mixed = chance < prob", "is_mixed = chance < 1", KINDS),
    Mutant(
        "switch_prob inverted",
        FN,
        "chance < prob * mixing.switch_prob",
        "chance < prob * (1 - mixing.switch_prob)",
        KINDS,
    ),
    Mutant(
        "switch_prob not a share of prob",
        FN,
        "chance < prob * mixing.switch_prob",
        "chance < mixing.switch_prob",
        WEIGHTS,
    ),
    Mutant("Mixup where CutMix is", FN, "is_mixed ^ is_cutmix", "is_mixed", PIXELS),
    Mutant("kinds swapped", FN, "is_cutmix * int(Kind.CUTMIX)", "is_cutmix * int(Kind.MIXUP)", PIXELS),
    # the draws
    Mutant("CutMix' α wrong", FN, "beta=mixing.cutmix_alpha)", "beta=1.0)", WEIGHTS),
    Mutant(
        "Mixup with CutMix' α",
        FN,
        "fn.random.beta(alpha=mixing.mixup_alpha, beta=mixing.mixup_alpha)",
        "fn.random.beta(alpha=mixing.cutmix_alpha, beta=mixing.cutmix_alpha)",
        WEIGHTS,
    ),
    Mutant("mode swapped", FN, 'if mode == "elem":', 'if mode != "elem":', PIXELS),
    Mutant("batch mode draws per sample", FN, "first = partner * 0", "first = partner", PIXELS),
    Mutant(
        "batch mode draws Mixup's weight per sample",
        FN,
        "weight = share(fn.random.beta(alpha=mixing.mixup_alpha, beta=mixing.mixup_alpha))",
        "weight = fn.random.beta(alpha=mixing.mixup_alpha, beta=mixing.mixup_alpha)",
        PIXELS,
    ),
    # devices, bad input
    Mutant(
        "λ0 left on the CPU",
        FN,
        "weights.append(_put(drawn.weight, device))",
        "weights.append(drawn.weight)",
        tests("fn", "gpu_graph_stays_within_the_budget"),
    ),
    Mutant(
        "a CPU operator too many",
        FN,
        "kind = reduce(add, kinds)",
        "drawn = drawn._replace(partner=drawn.partner + 0 + 0); kind = reduce(add, kinds)",
        tests("fn", "gpu_graph_stays_within_the_budget"),
    ),
    Mutant("mode='pair' taken for batch", LAW, "self.mode not in get_args(Mode)", 'self.mode[0] not in "ebp"', BAD),
    # the plan of a batch
    Mutant("the host's own partner", LAW, "if (partner != places).all():", "if True:", LAWS["partners"]),
    Mutant("the host's side without the square root", LAW, "np.sqrt(lam)[:, None]", "lam[:, None]", LAWS["boxes"]),
    Mutant(
        "one centre for both axes on the host",
        LAW,
        "rng.random((len(lam), 2))",
        "rng.random((len(lam), 1))",
        LAWS["boxes"],
    ),
    Mutant(
        "minmax with its upper end on the host",
        LAW,
        "* (longest - shortest))",
        "* (longest - shortest + 1))",
        LAWS["minmax"],
    ),
    Mutant(
        "switch_prob not a share of prob on the host",
        LAW,
        "chance < mixing.prob * share",
        "chance < share",
        LAWS["kinds"],
    ),
    Mutant("prob ignored on the host", LAW, "chance < mixing.prob], [", "chance < 1], [", LAWS["kinds"]),
    Mutant(
        "Mixup with CutMix' α on the host",
        LAW,
        "rng.beta(mixing.mixup_alpha, mixing.mixup_alpha,",
        "rng.beta(mixing.cutmix_alpha, mixing.cutmix_alpha,",
        LAWS["kinds"],
    ),
    Mutant(
        "a box left in samples of other kinds on the host", LAW, "boxes * is_cutmix[:, None]", "boxes", LAWS["occur"]
    ),
    Mutant("alone, yet mixed on the host", LAW, "mixing is None or n < 2", "mixing is None", LAWS["smallest"]),
    Mutant("an empty patch", LAW, "np.where(is_pasted[:, None], sides, 1)", "sides", LAWS["patches"]),
    Mutant(
        "a box without a side is pasted",
        LAW,
        "sides.min(axis=1, initial=1) > 0",
        "sides.max(axis=1) > 0",
        LAWS["patches"],
    ),
    Mutant("an empty box's corner is kept", LAW, "corner * is_pasted[:, None]", "corner", LAWS["patches"]),
    Mutant(
        "the partner's pixel where nothing is pasted",
        LAW,
        "np.where(is_mixup | is_pasted, drawn.partner, own)",
        "drawn.partner",
        LAWS["patches"],
    ),
    Mutant(
        "λ0 of what is not pasted",
        LAW,
        "np.where(is_mixup, drawn.weight, is_pasted)",
        "np.where(is_mixup, drawn.weight, 1)",
        LAWS["pixels"],
    ),
    Mutant(
        "λ0 by the square of the height",
        FN,
        "patches.height * patches.width / float",
        "patches.height * patches.height / float",
        LAWS["pixels"],
    ),
    Mutant(
        "λ0 without the weight",
        FN,
        "return patches.weight * (patches.height",
        "return 1.0 * (patches.height",
        LAWS["pixels"],
    ),
    Mutant(
        "Mixup's weight divided last",
        FN,
        "patches.weight * (patches.height * patches.width / float(size[0] * size[1]))",
        "patches.weight * patches.height * patches.width / float(size[0] * size[1])",
        LAWS["pixels"],
    ),
    Mutant(
        "patches from another place",
        FN,
        "in_anchors=patches.anchors,",
        "in_anchors=patches.anchors * 0,",
        LAWS["pixels"],
    ),
    Mutant("Mixup is not blended", FN, "if not with_mixup:", "if True:", LAWS["pixels"]),
    Mutant(
        "a plan's partner labels are its labels",
        PLAN,
        "labels, labels[drawn.partner]",
        "labels, labels",
        LAWS["pixels"],
    ),
    Mutant(
        "box and kind exchanged in the plan",
        PLAN,
        "drawn.box, drawn.kind",
        "drawn.box[:, ::-1], drawn.kind",
        LAWS["pixels"],
    ),
    Mutant(
        "plans of all ranks alike",
        PLAN,
        "self.epoch, self.rank, iteration, 1]",
        "self.epoch, iteration, 1]",
        LAWS["differ"],
    ),
    Mutant("plans of all iterations alike", PLAN, "self.rank, iteration, 1]", "self.rank, 1]", LAWS["differ"]),
    Mutant(
        "a GPU is handed what it does not read",
        PLAN,
        "mixing.with_mixup and not self.on_gpu:",
        "mixing.with_mixup:",
        tests("contracts", "mixing_adds_few_operators"),
    ),
    Mutant(
        "the compiled loss compares with an enum",
        LOSS,
        "_CUTMIX = int(Kind.CUTMIX)",
        "_CUTMIX = Kind.CUTMIX",
        tests("target", "a_compiled_loss_takes_views"),
    ),
    Mutant(
        "mix: λ0 ↔ 1 - λ0",
        TARGET,
        "((1 - weight) * values).where(weight < 1, 0) + (weight * partners)",
        "(weight * values).where(weight < 1, 0) + ((1 - weight) * partners)",
        tests("target", "mix_is_the_weighted_sum_of_rows"),
    ),
    Mutant(
        "mix: the partners' places are not used",
        TARGET,
        "partners = values[self.partner]",
        "partners = values.flip(0)",
        tests("target", "mix_is_the_weighted_sum_of_rows"),
    ),
    # what the GPU kernels accept
    Mutant(
        "samples without a box are pasted",
        FN,
        "has_box = fn.reductions.min(extent) > 0",
        "has_box = fn.reductions.min(extent) >= 0",
        MIXED,
    ),
    Mutant(
        "a box without a side is a box",
        FN,
        "has_box = fn.reductions.min(extent) > 0",
        "has_box = fn.reductions.max(extent[1]) > 0",
        BOXED,
    ),
    Mutant("λ0 by the square of the height", FN, "extent[1, 0] * extent[1, 1]", "extent[1, 0] * extent[1, 0]", MIXED),
    Mutant(
        "one-hot labels are summed",
        FN,
        "return fn.reshape(labels, shape=[])",
        "return fn.reductions.sum(labels)",
        tests("contracts", "labels_that_are_not_one_integer_are_an_error"),
    ),
    Mutant(
        "the loader's warps ask a GPU image for its size",
        PIPELINES,
        "interpolation=warped, size=transform.size",
        "interpolation=warped",
        TRAINED,
    ),
    Mutant(
        "the loader's erasing asks a GPU image for its size",
        PIPELINES,
        "std=transform.std,\n            size=transform.size,",
        "std=transform.std,",
        TRAINED,
    ),
    Mutant(
        "noise smaller than the image",
        AUGMENT,
        "fn.pad(_noise(sides, images.device, mean, std), axes=[0, 1], shape=size)",
        "_noise(sides, images.device, mean, std)",
        ERASED,
    ),
    Mutant(
        "an empty region is erased", AUGMENT, "fn.reductions.min(sides) > 0", "fn.reductions.min(sides) >= 0", ERASED
    ),
    # the benchmarks' mixing methods, and the text about accuracies
    Mutant(
        "ResizeMix crops",
        MIXING,
        "fn.resize(fn.permute_batch(images, indices=partner), size=fn.cast(side, dtype=types.FLOAT))",
        "fn.permute_batch(images, indices=partner)",
        RESIZE,
    ),
    Mutant(
        "ResizeMix stretches",
        MIXING,
        "fn.random.uniform(range=list(scope))",
        "fn.random.uniform(range=list(scope), shape=[2])",
        RESIZE,
    ),
    Mutant(
        "ResizeMix never at the far edge",
        MIXING,
        "(size - side + 1)",
        "(size - side)",
        tests("mixing", "resizemix_puts_the_box_anywhere"),
    ),
    Mutant(
        "equal draws give no permutation",
        MIXING,
        " | ((others == draws) & types.Constant(np.tri(count, k=-1, dtype=np.bool_)))",
        "",
        tests("mixing", "equal_draws_still_give_a_permutation"),
    ),
    Mutant(
        "patches cut along rows",
        MIXING,
        "swap = [0, 2, 1, 3, 4]",
        "swap = [0, 1, 2, 3, 4]",
        tests("mixing", "patches_are_permuted_whole_and_differently_for_each_sample"),
    ),
    Mutant(
        "largest weight for the mean",
        MIXING,
        "fn.reductions.mean(weight)",
        "fn.reductions.max(weight)",
        tests("mixing", "each_patch_has_its_own_weight_and_lam0_is_their_mean"),
    ),
    Mutant(
        "random λ weighs the canvas",
        MIXING,
        "own + (other - own) * spread",
        "other + (own - other) * spread",
        tests("mixing", "each_patch_has_its_own_weight_and_lam0_is_their_mean"),
    ),
    Mutant(
        "the canvas' salient point",
        MIXING,
        "zip(weights, partner, strict=True)",
        "zip(weights, range(len(images)), strict=True)",
        tests("mixing", "saliencymix_pastes_around_the_partners_point"),
    ),
    Mutant("attention alone", MIXING, "(target.lam0 + share.to(target.lam0.dtype)) / 2", "share", TRANSMIX),
    Mutant("attention not of a sum of 1", MIXING, " / attention.sum(1)", "", TRANSMIX),
    Mutant("box resampled by area", MIXING, "size=(side, side))", 'size=(side, side), mode="area")', TRANSMIX),
    Mutant(
        "attention for Mixup",
        MIXING,
        "torch.where(target.kind == int(Kind.CUTMIX),",
        "torch.where(target.kind > 0,",
        TRANSMIX,
    ),
    Mutant(
        "attention to the class token",
        MIXING,
        "[:, :, 0, 1:]",
        "[:, :, 0, :-1]",
        tests("mixing", "class_attention_is_the_last_blocks"),
    ),
    Mutant(
        "pairs that do not bend the unary",
        PUZZLE,
        "level**2 - n * level",
        "0 * level",
        tests("puzzlemix", "the_cut_is_the_best_of_all_labellings"),
    ),
    Mutant(
        "β not scaled by the grid",
        PUZZLE,
        "settings.beta / grid / 16",
        "settings.beta / 16",
        tests("puzzlemix", "the_energy_is_what_is_lost_and_what_breaks"),
    ),
    Mutant(
        "the prior of the partner's share",
        PUZZLE,
        "lam ** (n - away) * (1 - lam) ** away",
        "lam ** away * (1 - lam) ** (n - away)",
        tests("puzzlemix", "a_half_is_in_the_middle"),
    ),
    Mutant(
        "blocks move backwards", PUZZLE, '"bij,bcip->bcjp"', '"bij,bcjp->bcip"', tests("puzzlemix", "blocks_move_whole")
    ),
    Mutant(
        "λ0 of the sample",
        PUZZLE,
        "labels[places], 1 - own,",
        "labels[places], own,",
        tests("puzzlemix", "the_target_weighs_the_partner"),
    ),
    Mutant(
        "λ_s of the canvas",
        LABELS,
        "criterion.lam_s(logits, target), target",
        "1 - criterion.lam_s(logits, target), target",
        tests("ablations", "label_weights_by_hand"),
    ),
    Mutant("normal for t", PAIRED, "ppf(0.975, n - 1)", "ppf(0.975, 1e9)", BY_HAND),
    Mutant("sd of a population", PAIRED, "ddof=1", "ddof=0", BY_HAND),
    Mutant("the best epoch", PAIRED, "run[metric][-1]", "max(run[metric])", BY_HAND),
    Mutant("Bonferroni for Holm", PAIRED, "(len(known) - rank)", "len(known)", tests("ablations", "holm_by_hand")),
    Mutant(
        "Holm not monotone",
        PAIRED,
        "largest = max(largest, min(1.0, value * (len(known) - rank)))",
        "largest = min(1.0, value * (len(known) - rank))",
        tests("ablations", "holm_by_hand"),
    ),
    Mutant(
        "weights of no seed",
        TRAINING,
        "torch.manual_seed(seed)  #",
        "#",
        tests("ablations", "rows_of_a_seed_share_weights_order_and_crops"),
    ),
    Mutant(
        "crops of no seed",
        TRAINING,
        '"cuda" else None,\n        seed=seed,',
        '"cuda" else None,\n        seed=-1,',
        tests("ablations", "rows_of_a_seed_share_weights_order_and_crops"),
    ),
    Mutant(
        "another commit goes on",
        ABLATIONS,
        'commit=meta.get("commit")',
        "commit=None",
        tests("ablations", "a_different_commit_is_refused"),
    ),
    # MixTarget.dense
    Mutant(
        "λ0 ↔ 1 - λ0 in dense",
        TARGET,
        "partner = (1 - smoothing) * self.lam0",
        "partner = (1 - smoothing) * (1 - self.lam0)",
        DENSE,
    ),
    Mutant(
        "same class twice overwritten in dense", TARGET, "return dense.scatter_add_(", "return dense.scatter_(", DENSE
    ),
    Mutant(
        "smoothing over K - 1 classes in dense",
        TARGET,
        "smoothing / num_classes)",
        "smoothing / (num_classes - 1))",
        DENSE,
    ),
    # the loss
    Mutant(
        "λ0 ↔ 1 - λ0 in the loss",
        LOSS,
        "lam0 = target.lam0.to(columns.dtype)",
        "lam0 = 1 - target.lam0.to(columns.dtype)",
        ORACLE,
    ),
    Mutant("λ ↔ 1 - λ in the loss", LOSS, "(lam, 1 - lam)", "(1 - lam, lam)", ORACLE),
    Mutant(
        "AND for OR in R: P = {a} ∩ {b}",
        LOSS,
        "y * active[:, None]",
        "y * (active & (target.labels == target.partner_labels))[:, None]",
        ORACLE,
    ),
    Mutant("R for samples that LUMix leaves out", LOSS, "y * active[:, None]", "y", ORACLE),
    Mutant("R with the hinge's sign wrong", LOSS, "addcmul(gain, hinge,", "addcmul(gain, -hinge,", ORACLE),
    Mutant("eta ignored", LOSS, "active[:, None] * self._eta", "active[:, None]", ORACLE),
    Mutant(
        "same class twice is two elements of P",
        LOSS,
        "torch.stack((a != b, b == b), 1)",
        "torch.stack((b == b, b == b), 1)",
        ORACLE,
    ),
    Mutant("R without smoothing's share", LOSS, "if self.smoothing:  # the same class", "if False:  #", ORACLE),
    Mutant("λ_s of the other class", LOSS, "sigmoid(a - b)", "sigmoid(b - a)", LAM),
    Mutant("λ0 of 0 or 1 gets λ", LOSS, "torch.logical_and(active, lam0.frac())", "active", LAM),
    Mutant(
        "a clamped λ passes λ_s' gradient on",
        LOSS,
        "lam.clamp(0, 1), lam0)",
        "lam + (lam.clamp(0, 1) - lam).detach(), lam0)",
        ORACLE,
    ),
    Mutant("smoothing on ↔ off", LOSS, "weights = (1 - self.smoothing) *", "weights = self.smoothing *", ORACLE),
    Mutant("smoothing's sign wrong", LOSS, "total.add(rows", "total.sub(rows", ORACLE),
    Mutant("BCE without smoothing", LOSS, "loss = loss.sub(z.mean(1), alpha=self.smoothing)", "pass", ORACLE),
    Mutant("gradient without smoothing's share", LOSS, ".sub_(grad * (ctx.smoothing / p.shape[1]))", "", ORACLE),
    Mutant(
        "loss in the logits' half precision",
        LOSS,
        "return torch.float64 if logits.dtype == torch.float64 else torch.float32",
        "return logits.dtype",
        tests("loss", "loss_is_at_least_float32_and_the_gradient_has_the_logits_dtype"),
    ),
    Mutant(
        "Beta(2, 2) is not the median",
        LOSS,
        "c.clamp(torch.minimum(a, b), torch.maximum(a, b))",
        "torch.minimum(a, b)",
        tests("loss", "noise_follows_its_distribution"),
    ),
    Mutant(
        "check_target lets -100 through",
        LOSS,
        "(labels >= 0) &",
        "((labels >= 0) | (labels == -100)) &",
        tests("loss", "check_target_names_the_first_wrong_value"),
    ),
    Mutant(
        "a masked class is 0·∞ in the loss",
        LOSS,
        "gain = weights * _without_masked(logp, weights)",
        "gain = weights * logp",
        MASKED,
    ),
    Mutant(
        "a masked class is 0·∞ in BCE",
        LOSS,
        "weights * _without_masked(z.gather(1, columns), weights)",
        "weights * z.gather(1, columns)",
        tests("loss", "a_masked_class_without_weight_adds_nothing_to_bce"),
    ),
    Mutant(
        "an infinite loss is hidden",
        LOSS,
        "values.masked_fill(weights == 0, 0)",
        "values.nan_to_num(neginf=0.0, nan=torch.nan)",
        MASKED,
    ),
    Mutant(
        "λ_s of two masked classes is 0/0",
        LOSS,
        "columns.clamp(min=torch.finfo(columns.dtype).min)",
        "columns",
        tests("loss", "two_masked_classes_are_infinite_and_not_nan"),
    ),
    Mutant(
        "a schedule of floats",
        LOSS,
        'return torch.tensor(float(value), dtype=torch.float64, device="cpu")',
        "return float(value)",
        SCHEDULE,
    ),
    Mutant(
        "a number set in inference mode",
        LOSS,
        "torch.inference_mode(False)",
        "torch.inference_mode(torch.is_inference_mode_enabled())",
        tests("loss", "a_number_set_in_inference_mode_works_in_training"),
    ),
    Mutant(
        "the shares' sum is checked too early",
        LOSS,
        "self._set_lam0_share()\n\n    @property\n    def eta",
        "self._set_lam0_share()\n        self._check_shares()\n\n    @property\n    def eta",
        SHARES,
    ),
    Mutant(
        "the loss is a copy",
        LOSS,
        "return total / -len(all_logp) if mean else -total",
        "return (total / -len(all_logp) if mean else -total).clone()",
        tests("loss", "nothing_is_copied"),
    ),
    # the pipelines
    Mutant(
        "flip after mixing",
        PIPELINES,
        "    return _normalised(images, transform), target, lam0",
        "    images = fn.flip(images, horizontal=fn.random.coin_flip())\n"
        "    return _normalised(images, transform), target, lam0",
        DELIVERED,
    ),
    Mutant(
        "mean not subtracted",
        PIPELINES,
        "mean=[255 * m for m in output.mean] if scaled else 0.0",
        "mean=0.0",
        DELIVERED,
    ),
    Mutant(
        "centre of the crop rounded up",
        PIPELINES,
        "half + (half & margin & 1)",
        "half + (margin & 1)",
        tests("classification", "evaluation_matches_timms_within_three_tenths_of_a_grey_level"),
    ),
    Mutant(
        "scale and ratio exchanged",
        PIPELINES,
        "random_area=list(transform.scale),",
        "random_area=[0.5, 1.0],",
        tests("classification", "the_training_crop_follows_timms_distribution"),
    ),
    Mutant(
        "images turned by EXIF",
        DECODING,
        "        adjust_orientation=False,\n        **options",
        "        adjust_orientation=True,\n        **options",
        tests("classification", "exif_orientation_is_ignored"),
    ),
    # the loader and its order
    Mutant(
        "ranks draw alike",
        LOADER,
        "SeedSequence([order.seed, place.epoch, order.rank])",
        "SeedSequence([order.seed, place.epoch])",
        tests("loader", "ranks_share_the_order_and_differ_in_their_draws"),
    ),
    Mutant(
        "epochs draw alike",
        LOADER,
        "SeedSequence([order.seed, place.epoch, order.rank])",
        "SeedSequence([order.seed, order.rank])",
        tests("loader", "seeds_and_epochs_differ"),
    ),
    Mutant(
        "resumed where the batch before was",
        LOADER,
        "checkpoint=self._pipe.checkpoint()",
        "checkpoint=self.place.checkpoint",
        tests("loader", "every_state_leads_to_the_same_stream"),
    ),
    Mutant(
        "label of the bad file kept",
        FEED,
        "((index, image, label),) = self._read([self._faults",
        "((index, image, _),) = self._read([self._faults",
        tests("loader", "a_damaged_file_is_named_and_replaced"),
    ),
    Mutant(
        "a decoder without the peek",
        DECODING,
        "region(fn.peek_image_shape(encoded, adjust_orientation=False))",
        "region(np.int64([8, 8, 3]) + fn.cast(fn.random.coin_flip(), dtype=types.INT64))",
        tests("feed", "every_decoder_waits_for_a_peek_at_the_same_image"),
    ),
    Mutant(
        "JPEG of four components to DALI",
        FORMATS,
        "components in (1, 3)",
        "components in (1, 3, 4)",
        tests("feed", "dali_never_sees_an_odd_header"),
    ),
    Mutant(
        "arithmetic JPEG to DALI",
        FORMATS,
        "marker in (0xC0, 0xC1, 0xC2)",
        "marker in (0xC0, 0xC1, 0xC2, 0xC9)",
        tests("feed", "dali_never_sees_an_odd_header"),
    ),
    Mutant(
        "PNG without its end to DALI",
        FORMATS,
        "        place += 12 + length\n    return None",
        "        place += 12 + length\n    return height, width",
        tests("feed", "what_pillow_decodes"),
    ),
    Mutant("animated PNG to DALI", FORMATS, 'kind == b"acTL"', 'kind == b"actl"', tests("feed", "what_pillow_decodes")),
    Mutant(
        "WebP with EXIF to DALI", FORMATS, "_WEBP_EXIF = 0x08", "_WEBP_EXIF = 0", tests("feed", "what_pillow_decodes")
    ),
    Mutant("EPS to Ghostscript", FORMATS, '_REFUSED = {"EPS"}', "_REFUSED = set()", tests("feed", "what_is_bad")),
    Mutant(
        "no limit of pixels",
        FORMATS,
        "    check_pixels(found.height, found.width, max_pixels)\n",
        "",
        tests("feed", "what_is_bad"),
    ),
    Mutant(
        "a FIFO is waited for",
        FORMATS,
        "not stat.S_ISREG(os.fstat(handle).st_mode)",
        "False",
        tests("feed", "paths_that_are_not_regular_files"),
    ),
    Mutant(
        "bitmaps freed at once",
        FEED,
        "        self._memory.append(memory)\n",
        "        del memory\n",
        tests("feed", "pillows_pixels_arrive_bit_for_bit"),
    ),
    Mutant(
        "what DALI refused is forgotten",
        LOADER,
        'self._faults.restore(state["bad"], state["refused"])',
        'self._faults.restore(state["bad"], [])',
        tests("feed", "a_refusal_is_part_of_the_state"),
    ),
    Mutant(
        "evaluation without the filter's support",
        PIPELINES,
        "* _FILTER_RADIUS[transform.interpolation] + 1.0",
        "* 0.0",
        "tests/test_evaluation_parity.py",
    ),
    Mutant(
        "evaluation decodes everything",
        PIPELINES,
        "return low, high - low",
        "return low * 0, full",
        "tests/test_evaluation_parity.py",
    ),
    Mutant(
        "checksum not looked at",
        LOADER,
        '!= state.get("checksum"):',
        "is None:",
        tests("loader", "a_damaged_state_is_refused"),
    ),
    Mutant(
        "every epoch in one order",
        ORDER,
        "default_rng([self.seed, epoch]).permutation(self.n)",
        "default_rng([self.seed]).permutation(self.n)",
        tests("order", "epochs_and_seeds_differ_and_ranks_are_disjoint"),
    ),
    Mutant(
        "ranks read the same samples",
        ORDER,
        "order[self.rank :: self.world_size]",
        "order[:: self.world_size]",
        tests("order", "training_is_fair_by_brute_force"),
    ),
    # the visit to a GPU host
    Mutant(
        "a batch is copied on its way out",
        LOADER,
        "(from_dlpack(output.as_tensor()) for",
        "(from_dlpack(output.as_tensor()).clone() for",
        tests("gpu", "batches_share_dalis_memory"),
    ),
    Mutant(
        "the loss of low-precision logits in their own type",
        LOSS,
        "torch.float64 else torch.float32\n",
        "torch.float64 else logits.dtype\n",
        tests("gpu", "low_precision_logits_only_round_the_gradient"),
    ),
    Mutant(
        "what a stopped step started lives on",
        VISIT,
        "os.killpg(process.pid, number)",
        "os.kill(process.pid, number)",
        tests("visit", "a_visit_continues_whatever_a_step_does"),
    ),
    Mutant(
        "results come at the end alone",
        VISIT,
        "        results.flush()\n",
        "",
        tests("visit", "a_visit_continues_whatever_a_step_does"),
    ),
    Mutant(
        "a visit's step has a flag that its program lacks",
        VISIT,
        '"--steps", "20"',
        '"--stepps", "20"',
        tests("visit", "every_step_is_a_command_line_that_its_program_accepts"),
    ),
    Mutant(
        "unpaired seeds are compared",
        VISIT,
        'if f"training cutmix {seed}" in top1]',
        "]",
        tests("visit", "trainings_are_compared_over_the_seeds_that_both_finished"),
    ),
    Mutant(
        "tests of minutes in a visit",
        VISIT,
        '"gpu and not slow"',
        '"gpu"',
        tests("visit", "every_test_that_needs_a_gpu_is_part_of_the_visit"),
    ),
    Mutant(
        "a row without an error ends the visit",
        VISIT,
        'row.get("error")',
        'row["error"]',
        tests("visit", "results_are_read_whatever_is_in_them"),
    ),
    Mutant(
        "the mixed decoder is always the GPU",
        "benchmarks/probe.py",
        'difference["most"] else',
        "True else",
        tests("visit", "the_decoder_that_ran_is_identified_by_its_pixels"),
    ),
    Mutant(
        "training's region is another in every run",
        "benchmarks/probe.py",
        "device_id=device, seed=0",
        "device_id=device",
        tests("visit", "the_probe_decodes_what_the_pipelines_decode"),
    ),
    Mutant(
        "statistics of an executor that rejects the graph",
        "benchmarks/cost.py",
        'if readers := operators(build(s, threads, len(LOADER_STAGES)))["read_from_gpu"]:',
        "if readers := []:",
        tests("benchmarks", "operators_and_copies_are_counted_in_a_gpu_graph"),
    ),
    Mutant(
        "any thread can fail a capture",
        "benchmarks/loss.py",
        ', capture_error_mode="thread_local"',
        "",
        tests("benchmarks", "no_other_thread_can_fail_a_capture"),
    ),
    Mutant(
        "a blend with the weights exchanged",
        "benchmarks/mix.py",
        "(1.0 - drawn.weight) * own + drawn.weight * other",
        "drawn.weight * own + (1.0 - drawn.weight) * other",
        tests("visit", "every_blend_is_mixup"),
    ),
    # augmentation
    Mutant(
        "an image is rotated the other way", AUGMENT, "rotation(angle=degrees", "rotation(angle=-degrees", OPERATIONS
    ),
    Mutant(
        "a translation goes by the height alone",
        AUGMENT,
        "fn.stack(shape[1], shape[0])",
        "fn.stack(shape[0], shape[0])",
        OPERATIONS,
    ),
    Mutant(
        "a translation goes by the height alone, the size known",
        AUGMENT,
        "fn.stack(share[0] * width,",
        "fn.stack(share[0] * height,",
        tests("augment", "a_known_size_changes_nothing"),
    ),
    Mutant(
        "bits are rounded down where timm rounds up",
        AUGMENT,
        "whole = math.ceil if",
        "whole = math.floor if",
        OPERATIONS,
    ),
    Mutant(
        "contrast about mid-grey",
        AUGMENT,
        "_blend(fn.reductions.mean(_grey(images), axes=[0, 1], keep_dims=True)",
        "_blend(fn.reductions.mean(_grey(images), axes=[0, 1], keep_dims=True) * 0 + 128",
        OPERATIONS,
    ),
    Mutant(
        "no sign is drawn",
        AUGMENT,
        "slopes += [slope, -slope if signed else slope]",
        "slopes += [slope, slope]",
        OPERATIONS,
    ),
    Mutant(
        "a layer is always applied",
        AUGMENT,
        "chances = [1 - policy.prob] + [policy.prob /",
        "chances = [0] + [1 /",
        tests("augment", "draws_follow_timms_distribution"),
    ),
    Mutant(
        "magnitudes twice as spread",
        AUGMENT,
        "stddev=policy.std, shape=[policy.layers])",
        "stddev=2 * policy.std, shape=[policy.layers])",
        tests("augment", "draws_follow_timms_distribution"),
    ),
    Mutant(
        "erased areas up to a third and more",
        AUGMENT,
        "(1 / 3 - 0.02) + 0.02",
        "(1 / 3) + 0.02",
        tests("augment", "regions_match_timms"),
    ),
    Mutant(
        "noise in units of the whole range",
        AUGMENT,
        "std=[1 / s for s in std],",
        "std=[1 / 255 for s in std],",
        tests("augment", "what_is_erased"),
    ),
    Mutant(
        "an epoch is repeated as a whole",
        ORDER,
        "np.repeat(self._shuffled(epoch), self.repeats)",
        "np.tile(self._shuffled(epoch), self.repeats)",
        tests("order", "repeated_augmentation_matches_timms"),
    ),
    # integration with other programs
    Mutant(
        "no sampler to set the epoch of",
        LOADER,
        "def sampler(self)",
        "def no_sampler(self)",
        tests("timm_loader", "a_run_resumed_at_epoch_2_sees_epoch_2"),
    ),
    Mutant(
        "resumed at the start of the epoch",
        "examples/with_accelerate.py",
        'loader.load_state_dict(state["loader"])',
        "pass",
        tests("frameworks", "one_process"),
    ),
    Mutant(
        "the mean rank sets the pace, not the slowest",
        "benchmarks/scaling.py",
        "max(ready.max(),",
        "max(ready.mean(),",
        tests("scaling", "the_slowest_of_n_exponential_times"),
    ),
    Mutant(
        "a queue of one, however deep",
        "benchmarks/scaling.py",
        "begin[step - ahead] if step >= ahead",
        "begin[step - 1] if step >= 1",
        tests("scaling", "a_long_queue_hides_what_one_rank_varies"),
    ),
    # the paper's evaluations
    Mutant(
        "calibration bins of unsorted samples",
        METRICS,
        '[np.argsort(confidence, kind="stable")]',
        "[:]",
        tests("metrics", "calibration_error_by_hand"),
    ),
    Mutant(
        "the rest makes a bin of its own",
        METRICS,
        "max(1, len(gap) // bin_size)",
        "-(-len(gap) // bin_size)",
        tests("metrics", "calibration_error_of_a_loop"),
    ),
    Mutant(
        "response rate from the least confident",
        METRICS,
        "np.argsort(-np.asarray(confidence, float)",
        "np.argsort(np.asarray(confidence, float)",
        tests("metrics", "aurra"),
    ),
    Mutant(
        "cells put where they are taken from",
        METRICS,
        "device=images.device)[:, None], order]",
        "device=images.device)[:, None], order.argsort(1)]",
        tests("metrics", "shuffled_cells"),
    ),
    Mutant(
        "mass takes a cell less",
        METRICS,
        "value.cumsum(-1) - value",
        "value.cumsum(-1)",
        tests("metrics", "top_mass_by_hand", "top_mass_is_the_fewest_cells"),
    ),
    Mutant(
        "void left out of the truth alone",
        METRICS,
        "masks = masks & (target != 255)",
        "pass",
        tests("metrics", "best_jaccard"),
    ),
    Mutant("mean over heads", METRICS, ".amax(1).mean())", ".mean(1).mean())", tests("metrics", "best_jaccard")),
    Mutant(
        "a box ends before its last cell",
        METRICS,
        "(x1 + 1) / columns, (y1 + 1) / rows",
        "x1 / columns, y1 / rows",
        tests("metrics", "mask_box", "a_box_holds_its_pixels"),
    ),
    Mutant(
        "labels are the folders' numbers",
        EVALUATE,
        "return relabelled(samples, names)",
        "return samples",
        tests("evaluate", "top1_by_the_names_of_the_folders"),
    ),
    Mutant(
        "non-salient drops what is salient",
        EVALUATE,
        "[~metrics.top_mass(attention",
        "[metrics.top_mass(attention",
        OCCLUSION,
    ),
    Mutant(
        "attention of the first block",
        EVALUATE,
        'f"blocks.{len(blocks) - 1}.attn.attn_drop"',
        '"blocks.0.attn.attn_drop"',
        OCCLUSION,
    ),
    Mutant(
        "position embedding resampled with antialiasing",
        EVALUATE,
        "antialias=False",
        "antialias=True",
        tests("evaluate", "wsas_at_512"),
    ),
    Mutant(
        "all 1000 outputs",
        EVALUATE,
        "subject.logits(images)[:, outputs].softmax(1)",
        "subject.logits(images).softmax(1)[:, outputs]",
        tests("evaluate", "imagenet_a", "imagenet_o"),
    ),
    Mutant(
        "confidence as score",
        EVALUATE,
        "scores = [-confidences(",
        "scores = [confidences(",
        tests("evaluate", "imagenet_o"),
    ),
    Mutant(
        "all validation images are in distribution",
        EVALUATE,
        "relabelled(validation, outside.classes)",
        "validation",
        tests("evaluate", "imagenet_o"),
    ),
    Mutant("the objects of the image before", EVALUATE, "annotations[number]", "annotations[number - 1]", WSOL),
    Mutant(
        "one permutation a batch where each image has one",
        EVALUATE,
        'batch if perm == "sample" else 1',
        "1",
        tests("evaluate", "shuffle"),
    ),
    Mutant(
        "a damaged image is replaced",
        EVALUATE,
        'on_bad_sample="raise"',
        'on_bad_sample="replace"',
        tests("evaluate", "a_damaged_image_ends_the_evaluation"),
    ),
]


class Verdict(NamedTuple):
    caught: bool
    by: str
    seconds: float


def line_of(mutant):
    """Line of the fault; ValueError unless `old` occurs exactly once."""
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}")
    return text[: text.index(mutant.old)].count("\n") + 1


def run_tests(arguments, mutant=None):
    """Runs pytest in a copy of the tree that contains the mutant."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)
        if mutant:
            source = tree / mutant.file
            source.write_text(source.read_text().replace(mutant.old, mutant.new))
        caught, by = judge(tree, ["-x", *arguments.split()])
    return Verdict(caught, by, time.monotonic() - start)


def judge(tree, arguments):
    """(whether a test failed, which one)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *arguments]
    # the copy shadows an installed package, also in the processes that tests start
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no verdict: {SECONDS} s are over"
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return True, failed[1].removeprefix("tests/")
    last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [""]
    return False, "SURVIVED" if done.returncode == 0 else f"no verdict: exit {done.returncode}, {last[0]}"


def chosen(words):
    return [
        mutant
        for mutant in MUTANTS
        if not words or any(word.lower() in f"{mutant.file} {mutant.fault}".lower() for word in words)
    ]


def main(words):
    mutants, stale = chosen(words), []
    for mutant in mutants:
        try:
            line_of(mutant)
        except ValueError as error:
            stale.append(f"mutant {MUTANTS.index(mutant) + 1} no longer applies ({mutant.fault}): {error}")
    if stale or not mutants:
        sys.exit("\n".join(stale) or f"no mutant is named {' or '.join(words)}")

    named = " ".join(dict.fromkeys(name for mutant in mutants for name in mutant.tests.split()))
    print(f"{len(mutants)} mutants; first their tests on the unchanged tree", flush=True)
    control = run_tests(named)
    if control.by != "SURVIVED":
        sys.exit(f"the tests fail without any fault: {control.by}")

    rows, alive = [], 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda mutant: run_tests(mutant.tests, mutant), mutants)
        for mutant, verdict in zip(mutants, verdicts, strict=True):
            number, place = MUTANTS.index(mutant) + 1, f"{mutant.file}:{line_of(mutant)}"
            rows.append((str(number), mutant.fault, place, verdict.by, f"{verdict.seconds:.1f}"))
            alive += not verdict.caught
            print(f"[{len(rows)}/{len(mutants)}] {mutant.fault}: {verdict.by}", file=sys.stderr, flush=True)

    table = [("#", "mutant", "file:line", "caught by", "s"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows) - alive} of {len(rows)} caught")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
