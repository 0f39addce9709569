"""How long a loader of very many samples takes to start, and how much memory a rank needs for them.

The sources are a folder of ImageNet's size (hard links to a few tiny images), the same files as a list, a manifest and
(path, label) pairs, and tar shards with eleven times as many samples (links to one shard, which is read as often as if
they were different). Each is opened in its own process, from a warm page cache; "again" is a start with the cached
index. Memory is the private memory of the process (RssAnon) beyond that of a loader with few samples; the index is a
mapped file that all ranks of a node share.

    python -m benchmarks.start --out benchmarks/results/start.json
    python -m benchmarks.start --out FILE.json --files 10000 --index 100000  # a smoke test
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import harness, readings

CLASSES, FEW, PER_SHARD, LINKS = 1000, 1000, 10_000, 30_000


def measure(kind: str, path: str) -> dict[str, Any]:
    """Seconds to open one source and to its first batch, and bytes of memory, in this process."""
    from lumix_dali import create_loader
    from lumix_dali.data import sources
    from lumix_dali.data.files import file_list

    given: Any = path
    if kind == "pairs":
        files = file_list(path)
        given = [(files.path(i), int(label)) for i, label in enumerate(files.labels)]
        del files
    gc.collect()
    begin = time.perf_counter()
    source = sources.load(given)
    opened = time.perf_counter()
    del given
    with create_loader(source, batch_size=256, input_size=32, cutmix_alpha=1.0, device="cpu") as loader:
        next(iter(loader))
        first = time.perf_counter()
        status = Path("/proc/self/status").read_text()
    held = {key: 1024 * int(status.partition(f"{key}:")[2].split()[0]) for key in ("RssAnon", "RssFile")}
    return dict(
        samples=len(source), open=opened - begin, first=first - begin, anonymous=held["RssAnon"], mapped=held["RssFile"]
    )


def write_folder(root: Path, count: int) -> None:
    """Class folders of hard links, few enough per file for any file system."""
    root.mkdir(parents=True)
    for number in range(count):
        if number % LINKS == 0:
            original = root.parent / f"original {root.name} {number}.png"
            original.write_bytes(picture(number))
        folder = root / f"n{number % CLASSES:08}"
        if number < CLASSES:
            folder.mkdir()
        os.link(original, folder / f"{folder.name}_{number}.png")


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shards(root: Path, count: int) -> None:
    """Links to one shard."""
    root.mkdir()
    image = picture(0)
    with tarfile.open(root / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(min(count, PER_SHARD)):
            for name, content in ((f"{number:09}.png", image), (f"{number:09}.cls", b"%d" % (number % CLASSES))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for number in range(1, count // PER_SHARD):
        os.link(root / "000000.tar", root / f"{number:06}.tar")


def prepare(root: Path, files: int, index: int) -> list[tuple[str, str, str]]:
    """(name, kind, path) of each source."""

    write_folder(root / "few", FEW)
    write_folder(root / "folder", files)
    print(f"{files:,} files created", flush=True)
    from lumix_dali.data.files import class_folder, write_manifest

    samples = class_folder(root / "folder")
    write_manifest(samples, root / "manifest.json")
    with open(root / "list.txt", "w") as file:
        file.writelines(f"folder/{name} {label}\n" for name, label in zip(samples.names, samples.labels, strict=True))
    write_shards(root / "shards", index)
    print(f"{index:,} samples in shards created", flush=True)
    return [
        ("few files", "folder", str(root / "few")),
        ("folder", "folder", str(root / "folder")),
        ("list file", "list", str(root / "list.txt")),
        ("manifest", "manifest", str(root / "manifest.json")),
        ("pairs", "pairs", str(root / "list.txt")),
        ("tar shards, first time", "shards", str(root / "shards")),
        ("tar shards, again", "shards", str(root / "shards")),
    ]


def in_child(kind: str, path: str) -> dict[str, Any]:
    """Runs `measure` in its own process."""
    code = f"import json, sys; from {__spec__.name} import measure; print(json.dumps(measure(*sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, kind, path], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="FILE.json", help="where the result goes")
    add("--files", type=harness.positive, default=1_281_167, help="of the folder (default: ImageNet's 1281167)")
    add("--index", type=harness.positive, default=14_000_000, help="samples of the shards (default: 14000000)")
    add("--rounds", type=harness.positive, default=3, help="rounds, of which the median is reported (default: 3)")
    add("--folder", help="where the files are created; each needs an inode (default: a temporary folder)")
    add("--allow-dirty", action="store_true", help="write benchmarks/results with uncommitted code")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    args = parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.start", *(sys.argv[1:] if argv is None else argv)])
    meta = harness.metadata(command)
    harness.refuse_dirty(args.out, meta, args.allow_dirty)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, kind, path in prepare(Path(folder), args.files, args.index):
            rounds = [in_child(kind, path) for _ in range(1 if "first" in name else args.rounds)]
            found = {key: harness.summary([each[key] for each in rounds]) for key in rounds[0]}
            row: dict[str, Any] = {key: float(each["median"]) for key, each in found.items()}
            row |= dict(quartiles={key: found[key]["quartiles"] for key in ("open", "first")})
            base = rows[0]["anonymous"] if rows else row["anonymous"]
            rows.append(dict(name=name, **row, rounds=len(rounds), held=row["anonymous"] - base))
            print(f"{name}: measured", flush=True)
    note = "medians of rounds in processes of their own, page cache warm; 4x4 pixels, batch 256 at 32x32"
    result = dict(kind="start", unit="s", complete=True, rounds=args.rounds, meta=meta, note=note, rows=rows)
    harness.write(args.out, result)
    print(readings.report(result))


if __name__ == "__main__":
    main()
