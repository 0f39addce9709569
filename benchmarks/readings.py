"""Interprets a result in words, without a verdict if the numbers do not allow one, and suggests what to do next."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .harness import ratio
from .tables import BOTH, CEILING, CUTMIX, TABLES, TIMM, TIMM_RECIPE, read_accuracy, stages

SMOKE = "One round is a smoke test: everything ran, and no figure of it is a verdict."
PEERS = {
    "timm soft target": "timm's mixup_target with SoftTargetCrossEntropy",
    "torch probabilities": "torch.nn.functional.cross_entropy with probability targets",
}
ROUNDS = 5  # with fewer, quartiles are little more than single rounds


class Reading(NamedTuple):
    """Sentences about a result, and suggestions what to do next."""

    said: list[str]
    then: str


def is_shown(found: dict[str, Any]) -> bool:
    """Whether a ratio's quartiles lie on one side of 1."""
    low, high = found["quartiles"]
    return high < 1 or low > 1


def compared(what: str, found: dict[str, Any] | None, below: str, above: str) -> list[str]:
    """A sentence about a ratio and its quartiles, worded `below` or `above` 1; none without a ratio."""
    if not found or found["median"] is None:
        return []
    words = (below if found["median"] < 1 else above) if is_shown(found) else "no difference shown"
    low, high = found["quartiles"]
    return [f"{what}: {found['median']:.3f} ({low:.3f} – {high:.3f}), {words}."]


def ratio_of(rows: Sequence[dict[str, Any]], name: str, reference: str) -> dict[str, Any] | None:
    """The ratio of a row to a reference, of the last row of this name."""
    found = [row["ratios"][reference] for row in rows if row["name"] == name and reference in row.get("ratios", {})]
    return found[-1] if found else None


def to_best_peer(result: dict[str, Any]) -> list[dict[str, Any]]:
    """LUMix' time relative to the fastest loss it can replace, one row per size and way to run it.

    A step captured in a CUDA graph is compared only with captured steps.

    Returns:
        name, B, K, dtype, peer (its name), and the ratio round by round: values, median, quartiles.
    """
    found = []
    for row in result["rows"]:
        graphed = row["name"].endswith(" graphed")
        names = [name + " graphed" * graphed for name in PEERS]
        where = {key: row[key] for key in ("B", "K", "dtype")}
        rivals = [r for r in result["rows"] if r["name"] in names and r["values"] and where.items() <= r.items()]
        if row["name"].startswith("LUMix") and row["values"] and rivals:
            best = min(rivals, key=lambda rival: rival["median"])
            peer = best["name"].removesuffix(" graphed")
            found.append(dict(name=row["name"], **where, peer=peer, **ratio(row["values"], best["values"])))
    return found


def read_loss(result: dict[str, Any]) -> Reading:
    """One sentence about all sizes for each way to run the loss."""
    found = to_best_peer(result)
    said = []
    for name in dict.fromkeys(row["name"] for row in found):
        rows = [row for row in found if row["name"] == name]
        if len(rows) == 1:
            said += compared(f"{name} ÷ the best peer", rows[0], "faster", "slower")
            continue
        ratios = sorted(row["median"] for row in rows)
        faster = sum(is_shown(row) and row["median"] < 1 for row in rows)
        slower = sum(is_shown(row) and row["median"] > 1 for row in rows)
        said.append(
            f"{name} takes {ratios[0]:.2f} to {ratios[-1]:.2f} times the time of the best peer: faster at {faster} of "
            f"{len(rows)} sizes, slower at {slower}, no difference shown at {len(rows) - faster - slower}."
        )
    sizes = [{(row["B"], row["K"], row["dtype"]) for row in found if row["peer"] == peer} for peer in PEERS]
    best = [f"{PEERS[peer]} ({len(where)})" for peer, where in zip(PEERS, sizes, strict=True) if where]
    if best:
        said.append(f"The best peer, and at how many sizes: {'; '.join(best)}.")
    return Reading(
        said,
        "python -m benchmarks.cost --parts step --model M --out FILE weighs the loss against a whole step",
    )


WHOLE_STEPS = {
    "LUMix ÷ CutMix, whole step": ("lumix replayed", "cutmix replayed"),
    "CutMix ÷ no mixing, whole step": ("cutmix replayed", "none replayed"),
    "fed by the loader ÷ replayed": ("lumix loaded", "lumix replayed"),
    "DLPack ÷ copied": ("dlpack", "copied"),
    "CutMix ÷ no mixing, tiny images": ("tiny cutmix", "tiny none"),
    "CutMix + Mixup ÷ no mixing, tiny images": ("tiny cutmix+mixup", "tiny none"),
}
BOTTLENECK = 1.05


def read_cost(result: dict[str, Any]) -> Reading:
    """The longest stage of each part, the ratios of whole steps, and the bottleneck."""
    said, found = [], stages(result)
    for part in ("loader", "model"):
        ours = [stage for stage in found if stage["part"] == part]
        if len(ours) > 1:
            longest, total = max(ours, key=lambda stage: stage["ms"]), sum(stage["ms"] for stage in ours)
            share = f"{longest['ms']:.1f} of {total:.1f} ms per batch"
            said.append(f"The {part}'s longest stage is {longest['name']}: {share}.")
    for what, (name, reference) in WHOLE_STEPS.items():
        said += compared(what, ratio_of(result["rows"], name, reference), "less time", "more time")
    fed = ratio_of(result["rows"], "lumix loaded", "lumix replayed")
    if not fed or fed["median"] is None:
        return Reading(said, "--parts step, without --only, says whether the loader or the model is the bottleneck")
    if is_shown(fed) and fed["median"] >= BOTTLENECK:
        said.append("The loader is the bottleneck.")
        return Reading(said, "python -m benchmarks.tune finds the loader's fastest arguments on this machine")
    if fed["quartiles"][1] < BOTTLENECK:
        said.append("The loader is not the bottleneck.")
        return Reading(said, "a faster model, or --amp: the loader can feed it")
    return Reading(said, "more --rounds: whether the loader or the model is the bottleneck is open")


def read_loaders(result: dict[str, Any]) -> Reading:
    """Compares this loader with timm's and with the ceiling."""
    rows, said = result["rows"], []
    for name, reference in ((BOTH, TIMM), (CUTMIX, "dali+torchvision cutmix"), (CUTMIX, CEILING), (BOTH, "lumix/none")):
        said += compared(f"{name} ÷ {reference}", ratio_of(rows, name, reference), "slower", "faster")
    recipes = [row["name"] for row in rows if row["name"].startswith("lumix") and "recipe" in row["name"]]
    for name in dict.fromkeys(recipes):
        said += compared(f"{name} ÷ {TIMM_RECIPE}", ratio_of(rows, name, TIMM_RECIPE), "slower", "faster")
    if result["kind"] == "loaders-threads" and said:
        said.append(f"These are of {max(row['count'] for row in rows)} threads.")
    return Reading(
        said or ["There is no pair of loaders here that is worth a ratio: --only left the others out."],
        "python -m benchmarks.tune finds this loader's fastest arguments, python -m benchmarks.cost its longest stage",
    )


def read_mix(result: dict[str, Any]) -> Reading:
    """The loader's mixing, relative to copying a batch and to normalising it."""
    said = []
    for name in ("loader: cutmix elem", "loader: cutmix+mixup elem"):
        if (found := ratio_of(result["rows"], name, "floor: copy")) and found["median"] is not None:
            low, high = found["quartiles"]
            said.append(f"{name} takes the time of {found['median']:.2f} copies ({low:.2f} – {high:.2f}).")
        what = f"{name} ÷ normalising the batch"
        said += compared(what, ratio_of(result["rows"], name, "normalise"), "less time", "more time")
    return Reading(said, "python -m benchmarks.cost --parts loader --out FILE weighs it against a whole batch")


def read_start(result: dict[str, Any]) -> Reading:
    """Whether the sources for repeated use open within 5 s."""
    quick = ("manifest", "tar shards, again")
    slow = [row["name"] for row in result["rows"] if row["open"] > 5 and row["name"] in quick]
    said = f"opened within 5 s: {'all but ' + ', '.join(slow) if slow else 'manifest and kept index'}"
    slowest = max(result["rows"], key=lambda row: row["first"])
    return Reading(
        [f"{said}; the slowest first batch is that of {slowest['name']}, after {slowest['first']:.1f} s."],
        "where a folder is slow to open, lumix-dali check DIR --manifest FILE, and FILE instead of DIR",
    )


BOUND = {
    "decode": "more cores per GPU (--cores-per-gpu), or smaller images",
    "read": "shards instead of files (lumix-dali convert), or a copy on each node",
    "network": "a copy of the images on each node, or a faster link or store (--link, --store)",
    "GPU": "nothing: the loaders keep up",
}


def read_scaling(result: dict[str, Any]) -> Reading:
    """The number of GPUs up to which the loaders keep up, for each location of the images."""
    said, rate = ["A model of a cluster, not a measurement of one."], result["assumed"]["gpu_rate"]
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        enough = [row["ranks"] for row in rows if row["median"] >= 0.95 * rate]
        last = rows[-1]
        share = f"at {last['ranks']} they get {last['median'] / rate:.0%}, bound by {last['bound']}"
        most = f"up to {max(enough)} GPU(s) get 95 % of what they take" if enough else "no number of GPUs gets 95 %"
        said.append(f"With {name}, {most}; {share}.")
    return Reading(said, BOUND[result["rows"][-1]["bound"]])


def read_augment(result: dict[str, Any]) -> Reading:
    """How many operations agree with timm's, and which differs most."""
    rows = result["rows"]
    same, worst = sum(row["largest"] <= 1 for row in rows), max(rows, key=lambda row: row["mean"])
    said = f"{same} of {len(rows)} operations are within one grey level of timm's; {worst['name']} is the farthest, "
    said += f"by {worst['mean']:.2f} grey levels in the mean."
    return Reading([said], "docs/performance.md says why they differ")


def read_tune(result: dict[str, Any]) -> Reading:
    """The chosen values."""
    moved = [row for row in result["rows"] if row["chosen"] and row["ratios"]["default"]["median"] != 1]
    said = [
        "{name}: {median:.3f} ({:.3f} – {:.3f}) of the default, faster.".format(
            *row["ratios"]["default"]["quartiles"], name=row["name"], median=row["ratios"]["default"]["median"]
        )
        for row in moved
    ]
    given = ", ".join(f"{name}={value!r}" for name, value in result.get("chosen", {}).items())
    return Reading(said or ["No value is faster than the default by more than noise."], f"create_loader(..., {given})")


READINGS: dict[str, Callable[[dict[str, Any]], Reading]] = {
    "loaders": read_loaders,
    "loaders-threads": read_loaders,
    "cost": read_cost,
    "loss": read_loss,
    "mix": read_mix,
    "accuracy": lambda result: Reading([read_accuracy(result)], "more seeds, where an interval is too wide"),
    "scaling": read_scaling,
    "start": read_start,
    "augment": read_augment,
    "tune": read_tune,
}


def read(result: dict[str, Any]) -> Reading:
    """Interprets a result of any kind and suggests what to do next; a single round is not interpreted."""
    if result.get("rounds") == 1:
        return Reading([SMOKE], f"the same without --quick, and with --rounds {ROUNDS} or more")
    said, then = READINGS[result["kind"]](result)
    if not result.get("complete", True):
        said = ["The run was broken off: this is of the rounds until then.", *said]
    return Reading(said, then)


def report(result: dict[str, Any]) -> str:
    """The closing output of every benchmark: its table, the failures, the interpretation, and what to do next."""
    cells = [[textwrap.shorten(cell, 40) for cell in line] for line in TABLES[result["kind"]](result)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    failed = [f"{row['name']} failed: {row['error']}" for row in result["rows"] if row.get("error")]
    said, then = read(result)
    return "\n".join([*(line.rstrip() for line in lines), "", *failed, *said, f"Next: {then}"])
