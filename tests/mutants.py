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
LEFT_BEHIND = {"build", "data", "mutants", "runs", "site"}  # of this folder only, as are hidden ones


def left_behind(folder, names):
    """What `shutil.copytree` leaves out of a copy of the tree: environments, caches and results."""
    if Path(folder) != ROOT:
        return {"__pycache__"}
    return {name for name in names if name in LEFT_BEHIND or name.startswith(".")}


SECONDS = 300


class Mutant(NamedTuple):
    """`old` occurs once in `file` and becomes `new`; `tests` are pytest's arguments, one of which must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


FN, TARGET, LOSS = "lumix_dali/fn.py", "lumix_dali/target.py", "lumix_dali/loss.py"
LAW, PLAN, DECODING = "lumix_dali/mixing.py", "lumix_dali/loading/plan.py", "lumix_dali/decoding.py"
PIPELINES, LOADER, FEED, EPOCH = (f"lumix_dali/loading/{name}.py" for name in ("pipelines", "loader", "feed", "epoch"))
AUGMENT = "lumix_dali/augment.py"


def tests(module, *names):
    return " ".join(f"tests/test_{module}.py::test_{name}" for name in names)


PIXELS = tests("fn", "pixels_match_the_target")
KINDS = tests("fn", "kinds_that_occur")
MINMAX = tests("fn", "minmax_counts_its_boxes")
BAD = tests("fn", "invalid_arguments_are_named_with_a_remedy")
DELIVERED = tests("loader", "delivered_pixels_match_the_target")
BOXES = tests("fn_law", "boxes")
TRAINED = tests("contracts", "no_cpu_operator_of_training_reads_gpu_data")
LIKE_A_CPU = tests("contracts", "a_gpus_graph_pastes_and_blends_like_a_cpus")
ERASING = tests("contracts", "pastes_of_erasing")
WEIGHTS = tests("fn_law", "kinds_and_drawn_weights")
ORACLE = tests("loss", "every_option_matches_the_oracle")
MASKED = tests("loss", "a_masked_target_class_without_weight_matches_pytorch")
LAM = tests("loss", "lam_matches_the_oracle_and_is_lam0_where_lumix_does_not_apply")
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
    Mutant(
        "λ0 ↔ 1 - λ0 of Mixup",
        FN,
        "as_words(_scale(images, 1.0 - weight)) + as_words(_scale(partners, weight))",
        "as_words(_scale(images, weight)) + as_words(_scale(partners, 1.0 - weight))",
        PIXELS,
    ),
    Mutant(
        "blend wraps white around to black",
        FN,
        "BELOW_HALF = -1e-3 / 255",
        "BELOW_HALF = 0.0",
        tests("fn", "every_pair_of_levels_blends_within_one_level"),
    ),
    Mutant(
        "centre cast without floor: ends at half weight",
        FN,
        "math.floor(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size)",
        "(share(fn.random.uniform(range=[0.0, 1.0], shape=[2])) * size)",
        BOXES,
    ),
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
    Mutant("labels not permuted", FN, "fn.permute_batch(labels, indices=drawn.partner)", "labels", PIXELS),
    Mutant(
        "labels permuted apart from the images",
        FN,
        "fn.permute_batch(images, indices=drawn.partner)",
        "fn.permute_batch(images, indices=fn.batch_permutation())",
        PIXELS,
    ),
    Mutant("own partner", FN, "fn.batch_permutation(no_fixed_points=True)", "fn.batch_permutation()", PIXELS),
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
    Mutant("mode swapped", FN, 'if mode == "elem":', 'if mode != "elem":', PIXELS),
    Mutant("batch mode draws per sample", FN, "same = partner * 0", "same = partner", PIXELS),
    Mutant("mode='pair' taken for batch", LAW, "self.mode not in get_args(Mode)", 'self.mode[0] not in "ebp"', BAD),
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
        "cutmix_prob *= mixing.switch_prob",
        "cutmix_prob = mixing.switch_prob",
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
    Mutant(
        "a plan's partner labels are its labels",
        PLAN,
        "labels, labels[drawn.partner]",
        "labels, labels",
        LAWS["pixels"],
    ),
    Mutant(
        "plans of all ranks alike",
        PLAN,
        "self.epoch, self.rank, iteration, 1]",
        "self.epoch, iteration, 1]",
        LAWS["differ"],
    ),
    Mutant("λ0 counts the height twice", LAW, "full_width, x1 - x0)", "full_width, y1 - y0)", LAWS["pixels"]),
    Mutant("whole images in λ0 of Mixup", LAW, "np.where(is_mixup, full_height, y1 - y0)", "y1 - y0", LAWS["pixels"]),
    Mutant("plans of all iterations alike", PLAN, "self.rank, iteration, 1]", "self.rank, 1]", LAWS["differ"]),
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
    Mutant("λ ↔ 1 - λ in the loss", LOSS, "(lam, 1 - lam)", "(1 - lam, lam)", ORACLE),
    Mutant(
        "same class twice is two elements of P",
        LOSS,
        "torch.stack((a != b, b == b), 1)",
        "torch.stack((b == b, b == b), 1)",
        ORACLE,
    ),
    Mutant("λ_s of the other class", LOSS, "sigmoid(a - b)", "sigmoid(b - a)", LAM),
    Mutant("λ0 of 0 or 1 gets λ", LOSS, "torch.logical_and(active, lam0.frac())", "active", LAM),
    Mutant(
        "a clamped λ passes λ_s' gradient on",
        LOSS,
        "lam.clamp(0, 1), lam0)",
        "lam + (lam.clamp(0, 1) - lam).detach(), lam0)",
        ORACLE,
    ),
    Mutant(
        "loss in the logits' half precision",
        LOSS,
        "return torch.float64 if logits.dtype == torch.float64 else torch.float32",
        "return logits.dtype",
        tests("loss", "loss_is_at_least_float32_and_the_gradient_has_the_logits_dtype"),
    ),
    Mutant(
        "an infinite loss is hidden",
        LOSS,
        "values.masked_fill(weights == 0, 0)",
        "values.nan_to_num(neginf=0.0, nan=torch.nan)",
        MASKED,
    ),
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
        "the loss of low-precision logits in their own type",
        LOSS,
        "torch.float64 else torch.float32\n",
        "torch.float64 else logits.dtype\n",
        tests("gpu", "low_precision_logits_only_round_the_gradient"),
    ),
    # What only a GPU would suffer from
    Mutant(
        "a GPU decodes regions by default",
        DECODING,
        "return not on_gpu if regions is None",
        "return True if regions is None",
        tests("feed", "every_decoder_waits_for_a_peek_at_the_same_image"),
    ),
    Mutant("a GPU does not blend", FN, "if opacity is None:", 'if "is_mixup" not in inputs:', LIKE_A_CPU),
    Mutant(
        "λ0 is computed on the CPU",
        PIPELINES,
        "mixfn.lam0(inputs, plan.size, _put)",
        "mixfn.lam0(inputs, plan.size, lambda node: node)",
        LIKE_A_CPU,
    ),
    Mutant(
        "images are freed while DALI reads them",
        FEED,
        "maxlen=ahead + 2",
        "maxlen=1",
        tests("feed", "bytes_are_not_copied_and_live_as_long_as_dali_reads_them"),
    ),
    Mutant(
        "the next epoch is built on the training thread",
        EPOCH,
        "self._thread.start()",
        "self._thread.run()",
        tests("lifecycle", "the_next_epoch_is_built_on_a_thread_of_its_own"),
    ),
    Mutant(
        "a broken decoder is many bad files",
        EPOCH,
        "if suspicious and",
        "if False and",
        tests("feed", "a_broken_decoder_is_one_error"),
    ),
    Mutant(
        "erasing pastes an empty region",
        AUGMENT,
        "return branch(fn.reductions.min(sides) > 0",
        "return branch(fn.reductions.min(sides) > -1",
        ERASING,
    ),
    Mutant("erasing pastes a small input", AUGMENT, "axes=[0, 1], shape=size)", "axes=[0, 1])", ERASING),
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
        shutil.copytree(ROOT, tree, ignore=left_behind)
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
