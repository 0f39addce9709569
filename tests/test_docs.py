"""README.md and docs/: links lead somewhere, Python blocks run as pasted, commands and their flags exist.

Blocks run on the CPU in a folder with a small ``imagenet``. Batches are small, models are timm's smallest, and
downloads are replaced by local files.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from archives import pack
from images import encoded, write

from lumix_dali import Kind, MixTarget
from lumix_dali.loading import loader as loading
from tests.consumer import blocks, dedented

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"^<!-- begin: (\S+) -->.*?^<!-- end: \1 -->", re.MULTILINE | re.DOTALL)
OURS = ("benchmarks", "experiments", "lumix_dali", "pipelines", "tests")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Links


def anchors(text):
    """The anchors that GitHub and this site give to a page's headings."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{anchor}-{count}" if (count := found.count(anchor)) else anchor)
    return found


def broken(page):
    """Relative links of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        if ":" in path:
            continue
        if not other.exists() or (anchor and anchor not in anchors(other.read_text())):
            yield target


@pages
def test_links_lead_somewhere(page):
    assert not list(broken(page))


# Python


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, one_thread):
    """A small stand-in for a reader's machine: 24 images of two classes in each split, and no GPU."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(24):
            write(rng.integers(0, 256, (40, 48, 3)), tmp_path / "imagenet" / split / f"c{i % 2}" / f"{i}.png")
    images = [encoded(rng.integers(0, 256, (40, 48, 3)), "PNG") for _ in range(8)]
    members = [((f"{i}.png", image), (f"{i}.cls", b"%d" % i)) for i, image in enumerate(images)]
    shard = pack(tmp_path / "shard.tar", *(member for pair in members for member in pair))
    create_loader = loading.create_loader

    def small(source, *, batch_size, **options):
        source = str(shard) if str(source).startswith("hf://") else source
        return create_loader(source, batch_size=min(batch_size, 8), **options | dict(device="cpu", num_threads=1))

    create_model = timm.create_model
    rows = [{"image": image, "label": i} for i, image in enumerate(images)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUMIX_DALI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "create_loader", small)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create_model("test_vit", **options))
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(
        torch, "compile", lambda function: function
    )  # compiling takes half a minute; test_loss.py covers it
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))


def pasted(page, names=()):
    """The variables of a page's blocks, run one after the other."""
    found = dict(names)
    for line, block in blocks(ROOT / page).items():
        exec(compile("\n" * (line - 1) + dedented(block), page, "exec"), found)
    return found


def check_batch(images, target, size, shape):
    assert images.shape == (size, 3, *shape)
    assert abs(images.mean()) < 1  # normalised
    assert isinstance(target, MixTarget)
    assert (target.partner != torch.arange(size)).all()
    assert torch.equal(target.partner_labels, target.labels[target.partner])
    y0, x0, y1, x1 = target.box.T
    pasted_in = target.kind == int(Kind.CUTMIX)
    assert torch.equal(target.lam0[pasted_in], ((y1 - y0) * (x1 - x0))[pasted_in].float() / np.prod(shape))


def test_readme(stand_ins, capsys):
    names = pasted("README.md")
    assert names["target"].labels.shape == (8,)
    assert names["loss"].isfinite()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 0", "epoch 1"]
    assert 0 <= names["right"] <= 24
    assert sorted(label for _, labels in names["val"] for label in labels.tolist()) == [0] * 12 + [1] * 12


def test_index(stand_ins, capsys):
    names = pasted("docs/index.md")
    check_batch(names["images"], names["target"], 8, (224, 224))
    assert capsys.readouterr().out.startswith("torch.Size([8, 3, 224, 224]) torch.float32\n")


def test_loop(stand_ins, capsys):
    names = pasted("docs/loop.md")
    check_batch(names["images"], names["target"], 8, (160, 160))
    assert names["soft"].shape == (8, 1000)
    torch.testing.assert_close(names["soft"].sum(1), torch.ones(8))
    accuracy, place, again, bad = capsys.readouterr().out.splitlines()
    assert float(accuracy) in [k / 24 for k in range(25)]
    assert again == f"tensor({float(accuracy):.4f})"
    assert place == "1 2"  # one batch of epoch 1 was taken, and the next one is the second
    assert bad == "{}"


def test_pipeline(stand_ins):
    pipe = pasted("docs/pipeline.md")["train"]("imagenet/train", batch_size=8)
    images, *target = (torch.from_dlpack(each.as_tensor()) for each in pipe.run())
    check_batch(images, MixTarget(*target), 8, (224, 224))


def test_dynamic(stand_ins):
    names = pasted("docs/dynamic.md")
    assert names["images"].torch().shape == (8, 224, 224, 3)
    epoch = list(names["epoch"](1))
    assert len(epoch) == 3
    for pixels, target in epoch:
        check_batch(pixels, target, 8, (224, 224))
    again = list(names["epoch"](1))
    assert [t.lam0.tolist() for _, t in again] == [t.lam0.tolist() for _, t in epoch]
    assert names["loss"] > 0


def test_data(stand_ins):
    """The last two blocks with more rows, one of them bad, and images that identify themselves."""
    names = pasted("docs/data.md")
    images = [path.read_bytes() for path in sorted(Path("imagenet/train").rglob("*.png"))[:16]]
    table = names["Table"]([(image, i % 2) for i, image in enumerate([*images, None])])
    loader = names["create_loader"](table, batch_size=4, input_size=32, cutmix_alpha=1.0, return_index=True)
    with pytest.warns(UserWarning, match="row 16 cannot be used .the row is empty.; row 0 takes its place"):
        batches = [batch for _ in range(4) for batch in loader]
    labels = torch.eye(17)
    for _, target, index in batches:
        assert (target.labels == index % 2).all()
        soft = target.mix(labels[index])
        for row, (own, other, weight) in enumerate(zip(index, index[target.partner], target.lam0, strict=True)):
            assert soft[row, other] == pytest.approx(float(weight) + (own == other) * (1 - float(weight)))
            assert soft[row, own] == pytest.approx(1 - float(weight) + (own == other) * float(weight))
        loss = names["multi_hot_loss"](torch.zeros(4, 17), target, index, labels)
        assert loss == pytest.approx(np.log(2))


# Defaults of timm's train.py, apart from the data folder, mixup and cutmix.
TIMM = dict(
    data_dir="imagenet", train_split="train", batch_size=128, train_interpolation="random", scale=[0.08, 1.0],
    ratio=[3 / 4, 4 / 3], hflip=0.5, aa=None, color_jitter=0.4, reprob=0.0, remode="pixel", recount=1, aug_repeats=0,
    mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch", seed=42,
    rank=0, world_size=1, smoothing=0.1,
)  # fmt: skip


def test_timm(stand_ins):
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    names = pasted(
        "docs/timm.md", dict(os=os, device=torch.device("cpu"), data_config=config, args=SimpleNamespace(**TIMM))
    )
    for images, target in names["loader_train"]:
        check_batch(images, target, 8, (32, 32))
        assert len(set(target.kind.tolist())) == 1  # one draw per batch
        assert names["train_loss_fn"](torch.zeros(8, 2), target) > 0


def test_the_names_of_timms_arguments_are_those_of_the_errors():
    text = (ROOT / "docs/differences.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text[: text.index("## Defaults")], re.MULTILINE))
    assert {name: here.strip("`") for name, here in table.items()} == loading._HINTS
    assert ", ".join(f"`{name}`" for name in loading._NOT_NEEDED) in text


def test_every_page_with_python_is_run_here():
    run = {"README.md", *(f"docs/{name}.md" for name in ("index", "loop", "pipeline", "dynamic", "data", "timm"))}
    assert {str(page.relative_to(ROOT)) for page in PAGES if blocks(page)} == run


# Commands


def commands(page):
    """(argument vector, whether it is in a block) of each command of a page, including bare program names."""
    text = GENERATED.sub("", page.read_text())
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && ", line):
                if argv := shlex.split(command, comments=True):
                    yield argv[next(i for i, word in enumerate(argv) if not re.match(r"\w+=", word)) :], True
    for span in re.findall(r"`((?:python -m|torchrun|make|lumix-dali|pip install) [^`]+)`", FENCE.sub("", text)):
        yield [word for word in shlex.split(span) if word != "…"], False


class Parsed(Exception):
    """Carries a program's parser out of its `main`."""


@functools.cache
def parser_of(module):
    """The parser of ``python -m MODULE``; None for a program without arguments."""
    main = getattr(importlib.import_module(module), "main", None)
    if main is None:
        return None

    def stop(self, args=None, namespace=None):
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as found:
            main([])
    return found.value.args[0]


def unknown(parser, argv):
    """Flags and subcommands that a parser does not know, in any position."""
    flags = dict(parser._option_string_actions)
    subparsers = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    for word in argv:
        if subparsers and not word.startswith("-"):
            if word not in subparsers.choices:
                return [word]
            flags |= subparsers.choices[word]._option_string_actions
            subparsers = None
    return [word for word in argv if word.startswith("-") and word.partition("=")[0] not in flags]


def check(argv, whole=True):
    """Raises if a command names a program, target, extra or flag that does not exist.

    Args:
        whole: whether the command must be complete, so that the program itself can parse it.
    """
    if argv[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert {word for word in argv[1:] if "=" not in word} <= set(targets)
        made = subprocess.run(["make", "-n", *argv[1:]], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        for line in made.stdout.splitlines():
            if line.startswith(".venv/bin/python -m "):
                check(shlex.split(line, comments=True))
        return
    if argv[:2] == ["pip", "install"]:
        extras = {extra for name in argv[2:] for extra in re.sub(r"^\.\[(.*)\]$|.*", r"\1", name).split(",") if extra}
        assert extras <= set(importlib.metadata.metadata("lumix-dali").get_all("Provides-Extra"))
        return
    if argv[0] == "lumix-dali":
        module, rest = "lumix_dali.cli", argv[1:]
    elif "-m" in argv:
        place = argv.index("-m") + 1
        module, rest = argv[place], argv[place + 1 :]
    else:
        assert argv[0] in ("git", "python"), f"{argv[0]}: a test does not know it"  # timm's own train.py
        return
    if module.partition(".")[0] not in OURS:
        return
    assert importlib.util.find_spec(module), module
    parser = parser_of(module)
    if parser is None:
        assert not rest, f"{module} takes no arguments"
        return
    assert not unknown(parser, rest), f"{module}: {unknown(parser, rest)}"
    if whole:
        parser.parse_args(rest)


@pages
def test_commands_and_their_flags_exist(page):
    for argv, whole in commands(page):
        check(argv, whole)


# The site


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_a_network(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(html) > len(PAGES) - 1  # README.md is not among them; 404.html is
    loads = r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(?:https?:)?//|<link\b[^>]*\bhref="?(?:https?:)?//'
    assert not [path.name for path, text in html.items() if re.search(loads, text)]
    assert not [
        path.name for path in tmp_path.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", path.read_text())
    ]
    fn = (tmp_path / "api" / "fn.html").read_text()
    assert 'id="lumix_dali.fn.mix"' in fn
    assert "probability in [0, 1] that a sample is mixed" in fn


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/training.md", "tests/README.md"])
def test_the_tests_that_a_page_names_exist(page):
    """A test named without its file is of the file that was named before."""
    file, lost = "", []
    for named, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", (ROOT / page).read_text()):
        file = named or file
        path = ROOT / "tests" / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            lost.append(f"{file}::{test}")
    assert not lost
