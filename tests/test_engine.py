"""No file, whatever its contents, crashes the process, hangs it, exhausts its memory or is delivered with wrong pixels.

Every case runs in its own process (`odd_worker`); `odd.odd()` gives the expected verdict on each kind of file.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from PIL import Image

from lumix_dali import create_loader, decoding
from lumix_dali.data.protocol import UNUSABLE
from tests.odd import CAUSES, PATHS, odd, pillow
from tests.odd_worker import GOOD

SOURCES, MODES, THREADS = ("folder", "tar", "tfrecord"), ("training", "evaluation"), (1, 2, 4)
PLACES = {"first": 0, "middle": GOOD // 2, "last": GOOD - 1}
PROCESSES = 2


# The corpus itself


@pytest.mark.parametrize("verdict", ["pillow", "dali", "bad"])
def test_pillow_agrees_with_the_corpus(verdict, monkeypatch):
    """A file is delivered if Pillow or DALI reads it; those that only DALI reads are listed here."""
    monkeypatch.setenv("PATH", "")  # no Ghostscript
    only_dali = {"png, false checksum of a text", "png, text that inflates to 64 MB"}
    for name, each in odd().items():
        if each.verdict == verdict:
            assert readable(each.content) is (verdict != "bad" and name not in only_dali), name


def readable(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pillow(content)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
    return True


# Running cases


class Workers:
    """`PROCESSES` interpreters that run cases side by side."""

    def __init__(self, folder):
        self.ran = self.died = 0
        self._idle = SimpleQueue()
        self._all = [self._start(folder) for _ in range(PROCESSES)]
        self._pool = ThreadPoolExecutor(PROCESSES)
        for each in self._all:
            self._idle.put(each)

    @staticmethod
    def _start(folder):
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.odd_worker", str(folder)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )

    def run(self, cases):
        """The workers' answers, in order."""
        return list(self._pool.map(self._ask, cases))

    def _ask(self, case):
        worker = self._idle.get()
        try:
            worker.stdin.write(json.dumps(case) + "\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
        finally:
            self._idle.put(worker)
        self.ran += 1
        self.died += bool(answer["died"])
        return answer

    def close(self):
        for worker in self._all:
            worker.stdin.close()
            worker.wait(60)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    workers = Workers(tmp_path_factory.mktemp("good"))
    yield workers
    workers.close()
    print(f"\n{workers.ran} cases of odd files, each in a process of its own: {workers.died} processes died")


@pytest.fixture(scope="module")
def orders(workers):
    """{(source, mode): the answer for only good samples}, which gives the label at each position."""
    cases = [dict(kinds=[], source=source, mode=mode, threads=2) for source in SOURCES for mode in MODES]
    answers = workers.run(cases)
    for answer in answers:
        assert not answer["died"] and not answer["error"] and not answer["bad"], answer
        assert sorted(answer["labels"]) == list(range(GOOD))
    return {(case["source"], case["mode"]): answer for case, answer in zip(cases, answers, strict=True)}


def case_of(kind, source, mode, place, threads, orders):
    order = orders[source, mode if mode in MODES else "evaluation"]["labels"]
    return dict(kinds=[kind], label=order[PLACES[place]], source=source, mode=mode, threads=threads)


def label_named(text, labels):
    """Label of the first sample that a text names; `labels` are those of the samples in source order."""
    match = re.search(r"image (\d{3})|\b(\d{9})\b|record (\d+)", text)
    if match is None:
        return None
    return labels[int(match[3])] if match[3] else int(match[1] or match[2])


def problems(answer, orders, kinds=None, labels=None):
    """What is wrong with an answer.

    Args:
        answer: a worker's answer.
        orders: the answers of good samples.
        kinds: {label: kind} of the odd samples; None for the case's only one.
        labels: labels of all samples in source order; None for those in `orders`.
    """
    case = answer["case"]
    kinds = {case["label"]: case["kinds"][0]} if kinds is None else kinds
    source = orders[case["source"], "evaluation"]
    labels = source["labels"] if labels is None else labels
    if answer["died"] or answer["error"]:
        return [f"{answer['died']} {answer['error']} {answer['printed'][-300:]}"]
    found = {label_named(name, labels) for name in answer["names"]} | {labels[int(i)] for i in answer["bad"]}
    verdicts = {label: odd()[kind].verdict for label, kind in kinds.items()}
    texts = answer.get("reasons") or answer["warnings"]
    wrong = [
        f"{kinds.get(label, 'a good file')} is bad: {[text for text in texts if f'{label:03}' in text][:1]}"
        for label in found
        if verdicts.get(label) not in ("bad", "either")
    ]
    wrong += [f"{kinds[label]} is not bad" for label in kinds if verdicts[label] == "bad" and label not in found]
    if answer["ghostscript"]:
        wrong.append("a program was run on what the file says")
    # Two threads may each hold one large image, decoded and as a bitmap.
    limit = max(odd()[kind].memory for kind in kinds.values()) * (1 if len(kinds) == 1 else 2.5)
    if (memory := answer["memory"] - source["memory"]) > limit:
        wrong.append(f"{memory / 1e9:.1f} GB")
    return wrong + (of_check if case["mode"].startswith("check") else of_loader)(answer, kinds, labels, found)


def of_check(answer, kinds, labels, found):
    wrong = ["no reason"] * (not all(answer["reasons"]))
    return wrong + ["other samples are left"] * (sorted(answer["labels"]) != sorted(set(labels) - found))


def of_loader(answer, kinds, labels, found):
    replaced = {labels[int(i)]: labels[j] for i, j in answer["bad"].items()}
    wrong = [f"{label} is replaced by the bad {to}" for label, to in replaced.items() if to in found]
    ours = [text for text in answer["warnings"] if " takes its place" in text or " is bad" in text]  # not Pillow's
    named = [label_named(text, labels) for text in ours]
    if sorted(named, key=str) != sorted(found, key=str):
        wrong.append(f"bad are {sorted(found)}, named are {named}: {answer['warnings'][:2]}")
    taken = dict.fromkeys(replaced, UNUSABLE) if answer["case"]["mode"] == "evaluation" else replaced
    if sorted(answer["labels"]) != sorted(taken.get(label, label) for label in labels):
        wrong.append(f"delivered are {answer['labels']}")
    for label, difference in answer["differences"].items():
        each = odd()[kinds[int(label)]]
        if int(label) not in found and difference is not None and difference > each.tolerance:
            wrong.append(f"{kinds[int(label)]}: pixels differ by {difference:.2f}")
    return wrong


# The fast sample


# Each source and each mode once.
FAST = {("folder", "check --full"), ("folder", "training"), ("tar", "evaluation")}


def spread(kinds, sources=SOURCES, modes=MODES):
    """Each kind once, cycling through the circumstances in steps coprime with their number."""
    circumstances = list(product(sources, modes, PLACES, THREADS))
    return [(kind, *circumstances[17 * number % len(circumstances)]) for number, kind in enumerate(kinds)]


def test_each_cause_in_its_own_process(workers, orders):
    answers = workers.run(case_of(*each, orders) for each in spread(CAUSES))
    assert_right(answers, orders)


@pytest.mark.parametrize(
    ("source", "mode"),
    [
        pytest.param(source, mode, marks=[pytest.mark.slow] * ((source, mode) not in FAST))
        for source in SOURCES
        for mode in (*MODES, "check --full")
    ],
)
def test_all_kinds_in_one_data_set(workers, orders, source, mode):
    kinds = dict(enumerate(odd(), GOOD))
    case = dict(kinds=list(kinds.values()), source=source, mode=mode, threads=2)
    (answer,) = workers.run([case])
    labels = list(range(-(-(GOOD + len(kinds)) // GOOD) * GOOD))
    if source != "folder":
        (good,) = workers.run([case | dict(kinds=["png"] * len(kinds), mode="evaluation")])
        labels = good["labels"]
    wrong = problems(answer, orders, kinds, labels)
    assert not wrong, "\n".join(wrong)


def assert_right(answers, orders):
    wrong = [f"{answer['case']}: {'; '.join(found)}" for answer in answers if (found := problems(answer, orders))]
    assert not wrong, f"{len(wrong)} of {len(answers)} cases:\n" + "\n".join(wrong)


def test_what_is_not_a_file_is_named_and_replaced(workers, orders):
    """A folder, a FIFO, a device, a socket, a broken link or a missing file in a list of files."""
    answers = workers.run(
        dict(kinds=[], path=path, label=2, source="list", mode=mode, threads=2)
        for path in PATHS
        if path != "unreadable" or os.geteuid()  # root reads everything
        for mode in [*MODES, "check"]
    )
    wrong = [f"{answer['case']}: {found}" for answer in answers if (found := of_path(answer))]
    assert not wrong, "\n".join(wrong)


def of_path(answer):
    if answer["died"] or answer["error"]:
        return answer["died"] + answer["error"]
    texts = answer["names"] or answer["warnings"]
    if len(texts) != 1 or answer["case"]["path"] not in texts[0]:
        return f"named are {texts}"
    if answer["case"]["mode"] in MODES and answer["bad"] != {"2": 3}:
        return f"bad are {answer['bad']}"
    return ""


@pytest.mark.parametrize("text", ["%d", "%d\n", "%d ", "%d\r\n", "%d\t\n\n"])
def test_labels_of_a_tar(tmp_path, text):
    with labelled(tmp_path, text) as loader:
        assert delivered(loader) == [0, 1, 2, 3]
        assert not loader.bad


@pytest.mark.parametrize(
    "text",
    [
        "1 %d",
        "%d 2",
        "",
        "\n",
        "-%d",
        "+%d",
        "%d.0",
        "0x%d",
        "1_%d",
        "٣",
        "a%d",
        "%d\n1",
        "9" * 11,
    ],
)
def test_a_wrong_label_of_a_tar_is_named(tmp_path, text):
    """The result is an error or a replaced sample, never another label."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with labelled(tmp_path, "%d", {2: text}) as loader:
                assert delivered(loader) == [0, 1, UNUSABLE, 3]
            said = [str(each.message) for each in caught]
        except ValueError as error:
            said = [str(error)]
    content = text.replace("%d", "2")
    shown = {repr(content)[1:-1], repr(content.encode())[2:-1]}
    assert any("sample2" in each and any(part in each for part in shown) for each in said), said


def labelled(folder, text, others=()):
    """A loader of a tar of four samples whose labels are written as `text`."""
    path, index = folder / "a.tar", "v1.2 4\n"
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            label = dict(others).get(number, text).replace("%d", str(number)).encode()
            for kind, content in (("png", odd()["png"].content), ("cls", label)):
                member = tarfile.TarInfo(f"sample{number}.{kind}")
                member.size = len(content)
                index += f"{kind} {archive.offset + 512} {len(content)} {member.name} "
                archive.addfile(member, io.BytesIO(content))
            index += "\n"
    path.with_suffix(".idx").write_text(index)
    return create_loader(str(path), batch_size=4, input_size=8, is_training=False, device="cpu", num_threads=1)


def delivered(loader):
    return [label for _, labels in loader for label in labels.tolist()]


# The full product


@pytest.mark.slow
@pytest.mark.parametrize("kind", odd())
def test_every_kind_everywhere(workers, orders, kind):
    """Every position, source and mode; all thread counts for the causes, one in turn for the others."""
    combinations = list(product(SOURCES, MODES, PLACES, THREADS))
    if kind not in CAUSES:
        first = list(odd()).index(kind)
        combinations = [each for n, each in enumerate(combinations) if (n // 3 + n - first) % 3 == 0]
    assert_right(workers.run(case_of(kind, *each, orders) for each in combinations), orders)


@pytest.mark.slow
@pytest.mark.parametrize("kind", odd())
def test_every_kind_in_the_full_check(workers, orders, kind):
    first, places = list(odd()).index(kind), list(PLACES)
    cases = [
        case_of(kind, source, "check --full", places[n % 3], THREADS[n // 3 % 3], orders)
        for n, source in enumerate(SOURCES, first)
    ]
    assert_right(workers.run(cases), orders)


def test_what_we_read_in_dalis_messages_is_still_there():
    """`decoding` finds the sample, the operator and the reason in the text of an error."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file, "PNG")
    good = file.getvalue()
    bad = good[: len(good) // 2] + b"\xff" * 20 + good[len(good) // 2 + 20 :]
    images = [np.frombuffer(content, np.uint8) for content in (good, good, bad)]
    with pytest.raises(RuntimeError) as caught:
        decoding.decode_pipeline(images, {}, batch_size=3, num_threads=1, device_id=None).run()
    assert decoding.sample_of(caught.value) == 2
    assert decoding.is_decoders(caught.value)
    assert "ailed to decode" in decoding.reason_of(caught.value)
    assert list(decoding.refused(dict(enumerate(images)))) == [2]
    assert decoding.refused({0: images[0]}, regions=False) == {}
