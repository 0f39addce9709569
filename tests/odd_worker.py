"""Runs cases of the corpus of odd files, each in its own process.

``python -m tests.odd_worker FOLDER`` reads one case per line of its input, as JSON, and answers each with a line.
It imports the package once and then forks for each case, before any part of DALI has started: a tenth of the cost
of a fresh interpreter. If a signal ended a case, the answer has the signal's name.

A case has
    kinds: names of `odd.odd()`. The first replaces the good sample whose label is `label`; without `label`, all of
        them follow the good samples, one label each. An empty list means only good samples.
    source: "folder", "tar" or "tfrecord"; or "list", a list of files of which one is `path`, see `odd.odd_path`.
    mode: "training", "evaluation", "check" or "check --full".
    threads: number of the loader's threads, or of the check's processes.

An answer has
    labels: as delivered. bad: {name: reason}. warnings: their messages.
    differences: {label: mean absolute difference of an odd file's pixels from the expected ones}.
    names, reasons: of the files that a check reports as bad.
    error: message of an exception. died: name of the signal. memory: peak, in bytes. printed: end of the output.
    ghostscript: whether Ghostscript was started.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path

# Decoding of good files must be in progress when an error unwinds the decoder. With 31 samples after the bad one the
# process nearly always dies; with 15, of any size, it never does.
GOOD = 64
TIME_LIMIT = 60  # seconds after which a case counts as hung


def main(folder):
    import lumix_dali.data.check
    import lumix_dali.loading.loader  # noqa: F401  (before the fork, which makes each case cheap)
    from tests.odd import odd

    odd()
    good = make_good(Path(folder))
    for line in sys.stdin:
        print(json.dumps(in_child(json.loads(line), good)), flush=True)


def make_good(folder):
    """Paths of JPEGs, all different."""
    import numpy as np
    from PIL import Image

    paths = [folder / f"good {number:02}.jpg" for number in range(GOOD)]
    y, x = np.mgrid[:240, :320]
    for number, path in enumerate(paths):
        if not path.exists():
            noise = np.random.default_rng(number).integers(0, 40, (240, 320, 3))
            pixels = np.uint8(noise + np.stack([x / 2, y / 2, 3 * number + 0 * x], -1))
            scratch = path.with_suffix(f".{os.getpid()}")
            Image.fromarray(pixels).save(scratch, "JPEG", quality=90)
            scratch.replace(path)  # another worker may create the same
    return paths


def in_child(case, good):
    """The answer to a case, from a child process."""
    temporary = tempfile.TemporaryFile
    with tempfile.TemporaryDirectory() as folder, temporary() as printed, temporary() as out:
        if not (pid := os.fork()):
            child(case, good, Path(folder), printed, out)
        _, status, usage = os.wait4(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a hung check has left
        code = os.waitstatus_to_exitcode(status)
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - 2000))
        out.seek(0)
        return (
            dict(error="", memory=usage.ru_maxrss * 1024)
            | json.loads(out.read() or "{}")
            | dict(
                case=case,
                died=signal.Signals(-code).name if code < 0 else f"exit status {code}" * bool(code),
                printed=printed.read().decode(errors="replace"),
            )
        )


def child(case, good, folder, printed, out):
    """Writes the answer to `out` and never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        signal.alarm(TIME_LIMIT)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        answer = run(case, good, folder)
        out.write(json.dumps(answer).encode())
        out.flush()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)  # must not re-enter the parent's loop


def run(case, good, folder):
    ghost = fake_ghostscript(folder)
    kinds = make_samples(case, good, folder / "images")
    source = folder / "images"
    if case["source"] == "list":
        source = make_list(case, folder / "images")
    elif case["source"] != "folder":
        source = folder / case["source"]
        shards(folder / "images", source)
    answer = (check if case["mode"].startswith("check") else load)(case, source, kinds)
    return answer | dict(ghostscript=ghost.exists())


def fake_ghostscript(folder):
    """Puts a fake `gs` first on PATH; returns the file that it creates if it is run."""
    ghost, tool = folder / "gs was run", folder / "bin" / "gs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho x > '{ghost}'\n")
    tool.chmod(0o755)
    os.environ["PATH"] = f"{tool.parent}:{os.environ['PATH']}"
    return ghost


def make_samples(case, good, root):
    """One class per sample, so that the label identifies it; returns {label: kind} of the odd samples."""
    from tests.odd import odd

    contents = dict(enumerate(good))
    label = case.get("label")
    kinds = {label if label is not None else GOOD + k: kind for k, kind in enumerate(case["kinds"])}
    count = len(contents.keys() | kinds.keys())
    contents |= dict.fromkeys(range(count, -(-count // GOOD) * GOOD), good[0])  # full batches
    for number in sorted(contents.keys() | kinds.keys()):
        path = root / f"{number:03}" / f"image {number:03}.jpg"
        path.parent.mkdir(parents=True)
        if number in kinds:
            path.write_bytes(odd()[kinds[number]].content)
        else:
            path.symlink_to(contents[number])
    return kinds


def make_list(case, root):
    """A list of all files, in which the file at `label` is replaced by the case's `path`."""
    from tests.odd import odd_path

    names = sorted(str(path.relative_to(root)) for path in root.glob("*/*"))
    names[case["label"]] = f"{case['path']}.jpg"
    odd_path(case["path"], root / names[case["label"]])
    (root / "list.txt").write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    return root / "list.txt"


def shards(root, out):
    from lumix_dali import create_loader
    from lumix_dali.data.convert import convert
    from tests.archives import as_records

    samples = create_loader(root, batch_size=1, is_training=False, device="cpu").samples
    if out.name == "tar":
        convert(samples, out)
    else:
        as_records(samples, out, 10_000)


def load(case, source, kinds):
    """One epoch whose crops are the whole images."""
    from lumix_dali import create_loader

    training = case["mode"] == "training"
    crop = dict(scale=(1, 1), ratio=(1.5, 1.5), hflip=0.0) if training else dict(crop_pct=1.0)
    answer = dict(labels=[], differences={}, bad={}, names=[], error="")
    rows = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with create_loader(
                source,
                batch_size=GOOD,
                input_size=(64, 96),
                is_training=training,
                device="cpu",
                dtype="uint8",
                num_threads=case["threads"],
                max_bad=1000,
                **crop,
            ) as loader:
                for images, target in loader:
                    labels = (target.labels if training else target).tolist()
                    answer["labels"] += labels
                    rows |= {label: image.clone().numpy() for label, image in zip(labels, images, strict=True)}
                answer["bad"] = {index: found[0] for index, found in loader.state_dict()["bad"].items()}
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    answer["warnings"] = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    # Before the comparison, which decodes the odd image again.
    answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer["differences"] = {label: difference(kinds[label], rows[label]) for label in kinds.keys() & rows}
    return answer


def difference(kind, image):
    """Difference from the expected pixels, in grey levels; None if they have another size."""
    import numpy as np

    from tests.odd import odd, pillow

    each = odd()[kind]
    try:
        expected = pillow(each.content) if each.pixels is None else each.pixels
    except Exception:
        return None  # a bad sample, replaced by its substitute
    found = image.transpose(1, 2, 0)
    return float(np.abs(found.astype(float) - expected).mean()) if found.shape == expected.shape else None


def check(case, source, kinds):
    from lumix_dali.data.check import scan

    report = scan(source, full=case["mode"] == "check --full", workers=case["threads"])
    return dict(
        names=list(report.bad),
        reasons=list(report.bad.values()),
        labels=report.labels.tolist(),
        error="",
        warnings=[],
        bad={},
        differences={},
    )


if __name__ == "__main__":
    main(sys.argv[1])
