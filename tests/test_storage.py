"""Remote sources in memory, on a local web server and on an S3 server on the loopback; and the cache of copies."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from archives import as_records, pack
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from images import ramp_samples

from lumix_dali.data import check, index, sources, storage
from lumix_dali.data.convert import convert
from lumix_dali.data.files import write_manifest

N, PER_SHARD = 23, 5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMIX_DALI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ramp_samples(tmp_path_factory.mktemp("ramps"), N, (8, 9))


@pytest.fixture(scope="module")
def shards(files, tmp_path_factory):
    """Five tars with a description."""
    root = tmp_path_factory.mktemp("described") / "tars"
    convert(files, root, shard_size=PER_SHARD)
    return root


@pytest.fixture
def memory():
    fs = MemoryFileSystem()
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def put(fs, folder, root):
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and ".lumix_dali" not in path.parts:
            fs.pipe(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def contents(source):
    """All images and labels."""
    images, labels = source.read(range(len(source)))
    return [bytes(image) for image in images], labels.tolist()


@pytest.fixture
def fetched(monkeypatch):
    """A list that receives the path of each copied file."""
    found, get = [], MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "get_file",
        lambda self, source, *rest, **options: (
            found.append(os.path.basename(source)),
            get(self, source, *rest, **options),
        )[1],
    )
    return found


# In memory


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_remote_shards_hold_what_local_ones_hold(memory, files, shards, kind, tmp_path, fetched):
    folder = shards if kind == "webdataset" else as_records(files, tmp_path / "records", PER_SHARD)
    put(memory, folder, "/data")
    suffix = {"webdataset": "tar", "tfrecord": "tfrecord"}[kind]
    expected = contents(sources.load(folder))
    names = [f"memory://data/shard-{k:06}.{suffix}" for k in range(5)]
    for source in (
        "memory://data",
        "memory://data/",
        f"memory://data/shard-*.{suffix}",
        names,
        f"memory://data/shard-{{000000..000004}}.{suffix}",
        [names[0], *names[1:]],
    ):
        found = sources.load(source)
        assert contents(found) == expected
        assert found.remote
        assert found.counts.tolist() == [5, 5, 5, 5, 3]
    assert len(fetched) == 5
    assert found.name(7).startswith(f"'memory://data/shard-000001.{suffix}', ")
    if kind == "webdataset":
        assert found.classes == files.classes


def test_a_description_saves_the_index_pass(memory, shards, fetched):
    put(memory, shards, "/data")
    source = sources.load("memory://data")
    assert len(source) == N
    assert fetched == []
    source.read([12])
    assert fetched == ["shard-000002.tar"]


def test_the_counts_of_hugging_face(memory, shards, fetched):
    """timm's layout: a split's name, files and their lengths."""
    put(memory, shards, "/data")
    memory.rm("/data/shards.json")
    names = [f"shard-{k:06}.tar" for k in range(5)]
    split = dict(name="train", filenames=names, shard_lengths=[5, 5, 5, 5, 3], num_samples=N)
    for splits in ({"train": split}, [split]):
        memory.pipe("/data/_info.json", json.dumps({"splits": splits}).encode())
        source = sources.load("memory://data")
        assert source.counts.tolist() == [5, 5, 5, 5, 3]
        assert fetched == []
    memory.pipe("/data/_info.json", json.dumps({"splits": {"t": split | dict(shard_lengths=[5, 5, 4, 6, 3])}}).encode())
    source = sources.load("memory://data")
    assert source.read([0])[1].tolist()
    with pytest.raises(ValueError, match=r"shard-000002\.tar': it contains 5 samples, its description says 4"):
        source.read([10])
    for damage in (b"[]", b"x", b"{}", b'{"splits": {"t": {"filenames": ["a"], "shard_lengths": []}}}'):
        memory.pipe("/data/_info.json", damage)
        with pytest.raises(ValueError, match=r"source='memory://data/_info\.json': damaged .*; repair or remove it"):
            sources.load("memory://data")


def test_without_counts_an_index_pass_whose_result_is_kept(memory, shards, fetched, monkeypatch):
    put(memory, shards, "/data")
    memory.rm("/data/shards.json")
    steps = []

    def progress(items, total):
        for item in items:
            steps.append(total)
            yield item

    assert sources.load("memory://data", progress=progress).counts.tolist() == [5, 5, 5, 5, 3]
    assert (len(fetched), steps) == (5, [5] * 5)
    monkeypatch.setattr(index, "scan", None)
    source = sources.load("memory://data", cache_bytes=1)
    assert source.counts.tolist() == [5, 5, 5, 5, 3]
    assert contents(source) == contents(sources.load(shards))
    assert len(fetched) == 5


def test_hf_addresses(shards, fetched, monkeypatch):
    """The layout of timm/imagenet-1k-wds, on a stand-in for the Hub's file system."""

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix("hf://"))

        def info(self, path, **options):
            return (
                {key: value for key, value in super().info(path, **options).items() if key != "created"}
                | dict(blob_id=str(hash(self.cat_file(path))))
                if self.isfile(path)
                else super().info(path, **options)
            )

        def ls(self, path, detail=True, **options):
            found = super().ls(path, detail=True, **options)
            return (
                [self.info(each["name"]) if each["type"] == "file" else each for each in found]
                if detail
                else [each["name"] for each in found]
            )

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    hub = Hub()
    for k, path in enumerate(sorted(shards.glob("*.tar"))):
        hub.pipe(f"/datasets/timm/tiny-wds/tiny-train-{k:04}.tar", path.read_bytes())
    names = [f"tiny-train-{k:04}.tar" for k in range(5)]
    hub.pipe(
        "/datasets/timm/tiny-wds/_info.json",
        json.dumps({"splits": {"train": dict(name="train", filenames=names, shard_lengths=[5, 5, 5, 5, 3])}}).encode(),
    )
    for source in (
        "hf://datasets/timm/tiny-wds",
        "hf://datasets/timm/tiny-wds/tiny-train-{0000..0004}.tar",
        "hf://datasets/timm/tiny-wds/tiny-train-*.tar",
    ):
        found = sources.load(source)
        assert (len(found), fetched) == (N, [])
    assert contents(found) == contents(sources.load(shards))


def test_folders_lists_and_pairs(memory, files, tmp_path):
    for i, name in enumerate(files.names):
        memory.pipe(f"/train/class {i % 3}/deep/{name}", Path(files.path(i)).read_bytes())
    memory.pipe("/train/.hidden/a.jpg", b"")
    memory.pipe("/train/class 1/notes.txt", b"")
    found = sources.load("memory://train")
    assert found.remote
    assert found.classes == ["class 0", "class 1", "class 2"]
    assert found.labels.tolist() == sorted(i % 3 for i in range(N))
    images, _ = contents(found)
    assert images == [Path(files.path(i)).read_bytes() for k in range(3) for i in range(k, N, 3)]
    lines = "".join(f"{name} {label}\n" for name, label in zip(found.names, found.labels.tolist(), strict=True))
    memory.pipe("/train/list.txt", lines.encode())
    memory.pipe("/urls.txt", "".join(f"memory://train/{line}\n" for line in lines.splitlines()).encode())
    (tmp_path / "urls.txt").write_bytes(memory.cat("/urls.txt"))
    pairs = [(f"memory://train/{name}", label) for name, label in zip(found.names, found.labels, strict=True)]
    for source in ("memory://train/list.txt", "memory://urls.txt", tmp_path / "urls.txt", pairs):
        again = sources.load(source)
        assert again.remote
        assert contents(again) == (images, found.labels.tolist())
    write_manifest(found, tmp_path / "m.json")
    memory.pipe("/m.json", (tmp_path / "m.json").read_bytes())
    assert contents(sources.load("memory://m.json")) == (images, found.labels.tolist())
    memory.rm("/train/" + found.names[4])
    assert "does not exist" in str(found.read([4])[0][0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nowhere", "does not exist"),
        ("memory://nowhere.tar", "does not exist"),
        ("memory://none*.tar", "it matches no shard"),
        ("nosuch://a/b.tar", "Protocol not known: nosuch"),
        ("memory://empty", "no image in it"),
    ],
)
def test_missing_sources_are_named(memory, source, message):
    memory.pipe("/empty/readme.txt", b"")
    with pytest.raises(ValueError, match=f"source='{source.replace('*', '.')}.*{message}"):
        sources.load(source)
    with pytest.raises(ValueError, match=message):
        check.scan(source)


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_remote_shards_and_rows_are_checked(memory, shards, full):
    put(memory, shards, "/data")
    report = check.scan("memory://data", full=full, workers=1)
    assert report.ok
    assert list(report.shards.values()) == [5, 5, 5, 5, 3]
    good = bytes(sources.load(shards).read([0])[0][0])
    report = check.scan([(good, 0), (b"text", 0), (good, 1), (good, -1)], full=full, workers=1)
    assert list(report.bad) == ["row 1", "row 3"]
    assert report.labels.tolist() == [0, 1]


def test_braces_of_local_shards(shards, tmp_path):
    expected = sources.load(shards).digest
    assert sources.load(f"{shards}/shard-{{000000..000004}}.tar").digest == expected
    assert sources.load([f"{shards}/shard-{{000000..000003}}.tar", f"{shards}/shard-000004.tar"]).digest == expected
    assert len(sources.load(f"{shards}/shard-{{000001,000004}}.tar")) == 8
    with pytest.raises(ValueError, match=r"shard-000005\.tar': no such file"):
        sources.load(f"{shards}/shard-{{000000..000005}}.tar")
    pack(tmp_path / "a{1,2}.tar", ("0.jpg", b"x"), ("0.cls", b"1"))
    assert len(sources.load(tmp_path / "a{1,2}.tar")) == 1


# The cache


def test_a_changed_remote_is_never_served_stale(memory, cache):
    def write(label):
        pack(path := cache.parent.parent / "a.tar", ("0.jpg", b"image"), ("0.cls", b"%d" % label))
        memory.pipe("/a.tar", path.read_bytes())

    write(1)
    source = sources.load("memory://a.tar")
    assert source.read([0])[1].tolist() == [1]
    write(2)  # same length as before
    assert sources.load("memory://a.tar").read([0])[1].tolist() == [2]
    source = sources.load("memory://a.tar", cache_dir=cache / "another")
    write(3)
    again = storage.Cache(str(cache / "third"), 10**9)
    with pytest.raises(ValueError, match=r"source='memory://a\.tar': it changed"):
        again.open("memory://a.tar", source._entries[0])
    assert not [path for path in (cache / "third").iterdir() if path.name.endswith(".part")]


def test_the_limit_is_kept_and_readers_survive(memory, cache):
    contents = [os.urandom(1000 + k) for k in range(6)]
    for k, content in enumerate(contents):
        memory.pipe(f"/{k}", content)
    copies = storage.Cache(str(cache), 3100)
    entries = [storage.entry(f"memory://{k}") for k in range(6)]
    handles = [copies.open(f"memory://{k}", entry) for k, entry in enumerate(entries)]

    def kept():
        return sorted(path.stat().st_size - 1000 for path in cache.iterdir() if len(path.name) == 64)

    assert kept() == [3, 4, 5]
    for handle, content in zip(handles, contents, strict=True):
        assert os.pread(handle, 2000, 0) == content
        os.close(handle)
    os.close(copies.open("memory://4", entries[4]))  # the last use counts, not the first
    os.close(copies.open("memory://0", entries[0]))
    assert 4 in kept()
    large = storage.Cache(str(cache), 10)
    os.close(large.open("memory://1", entries[1]))
    assert kept() == [1]  # a shard in use is never removed for its own size


class Slow(LocalFileSystem):
    """Copies a kilobyte at a time and counts the copies, for tests that kill processes or let them race."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("slow://"))

    def get_file(self, source, target, **_):
        with open(os.environ["SLOW_LOG"], "a") as log:
            log.write(f"{os.path.basename(source)}\n")
        with open(source, "rb") as file, open(target, "wb", buffering=0) as out:
            while piece := file.read(1000):
                out.write(piece)
                time.sleep(float(os.environ["SLOW"]))


READER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import fsspec, hashlib, os
from test_storage import Slow
fsspec.register_implementation("slow", Slow)
from lumix_dali.data import sources
source = sources.load("slow://" + sys.argv[1])
sha = hashlib.sha256()
for i in range(len(source)):
    (image,), labels = source.read([i])
    sha.update(image + labels.tobytes())
print(sha.hexdigest())
os._exit(0)  # no copy that is under way is waited for
"""


def reader(shards, log, slow=0.0, **options):
    environment = os.environ | {"SLOW": str(slow), "SLOW_LOG": str(log)}
    return subprocess.Popen(
        [sys.executable, "-c", READER, shards], stdout=subprocess.PIPE, text=True, env=environment, **options
    )


def digest(source):
    sha = hashlib.sha256()
    for i in range(len(source)):
        (image,), labels = source.read([i])
        sha.update(bytes(image) + labels.tobytes())
    return sha.hexdigest()


def test_four_processes_copy_each_shard_once(shards, tmp_path):
    ranks = [reader(shards, tmp_path / "log", slow=0.01) for _ in range(4)]
    found = {rank.communicate(timeout=300)[0].strip() for rank in ranks}
    assert found == {digest(sources.load(shards))}
    assert sorted((tmp_path / "log").read_text().split()) == [f"shard-{k:06}.tar" for k in range(5)]


def test_a_killed_copy_is_never_taken_for_a_complete_one(shards, tmp_path, cache):
    killed = reader(shards, tmp_path / "log", slow=0.3)
    deadline = time.monotonic() + 120
    while not (parts := [path for path in cache.glob("*.part") if path.stat().st_size >= 1000]):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 0 < parts[0].stat().st_size < max(path.stat().st_size for path in shards.glob("*.tar"))
    orphan = cache / f"{'0' * 64}.part"  # from a remote that has since changed
    orphan.write_bytes(b"x" * 100)
    whole = reader(shards, tmp_path / "log")
    assert whole.communicate(timeout=300)[0].strip() == digest(sources.load(shards))
    assert not list(cache.glob("*.part"))


def test_a_short_copy_is_an_error(memory, shards, monkeypatch, cache):
    put(memory, shards, "/data")
    get = MemoryFileSystem.get_file

    def short(self, source, target, **options):
        get(self, source, target, **options)
        os.truncate(target, 700)

    monkeypatch.setattr(MemoryFileSystem, "get_file", short)
    source = sources.load("memory://data")
    with pytest.raises(ValueError, match=r"shard-000000\.tar.: it changed during the copy, or the copy ended at 700"):
        source.read([0])
    assert not [path for path in cache.iterdir() if not path.name.startswith("lock")]


def test_a_full_disk_is_an_error_that_names_the_shard(memory, shards, monkeypatch):
    put(memory, shards, "/data")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(
        ValueError, match=r"source='memory://data/shard-000000\.tar': no space for its copy .*set cache_dir"
    ):
        sources.load("memory://data").read([0])


def test_shards_are_copied_ahead_and_released(memory, shards, fetched):
    put(memory, shards, "/data")
    source = sources.load("memory://data")
    source.prefetch(np.array([7, 6, 11, 20]))
    for number in (1, 2, 4):
        source._open[number].result()
    assert sorted(fetched) == ["shard-000001.tar", "shard-000002.tar", "shard-000004.tar"]
    source.prefetch(np.array([20, 22]))
    assert list(source._open) == [4]
    assert source.read([20])[1].tolist() == sources.load(shards).read([20])[1].tolist()


# A web server


class Quiet(http.server.SimpleHTTPRequestHandler):
    listed = True

    def log_message(self, *_):
        pass

    def list_directory(self, path):
        if self.listed:
            return super().list_directory(path)
        self.send_error(403, "no listing")
        return None


@pytest.fixture(params=[True, False], ids=["listed", "not listed"])
def web(request, tmp_path):
    """(address, folder, whether the server lists it) for a web server."""
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Quiet,), {"listed": request.param})
    (tmp_path / "web").mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "web"))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "web", request.param
        server.shutdown()
        thread.join()


def test_shards_of_a_web_server(web, shards):
    address, folder, listed = web
    shutil.copytree(shards, folder / "data", ignore=shutil.ignore_patterns(".lumix_dali"))
    local = sources.load(shards)
    names = f"{address}/data/shard-{{000000..000004}}.tar"
    for source in [names, *([f"{address}/data", f"{address}/data/", f"{address}/data/*.tar"] if listed else [])]:
        found = sources.load(source)
        assert (contents(found), found.classes) == (contents(local), local.classes)
    (folder / "data" / "shards.json").unlink()
    assert sources.load(names).counts.tolist() == [5, 5, 5, 5, 3]
    shutil.copy(shards / "shard-000001.tar", folder / "data" / "shard-000000.tar")
    os.utime(folder / "data" / "shard-000000.tar", (1, 1))
    assert contents(sources.load(names))[1][:5] == contents(local)[1][5:10]
    with pytest.raises(ValueError, match=rf"source='{address}/data/shard-000005\.tar': it does not exist"):
        sources.load(f"{address}/data/shard-{{000004..000005}}.tar")


def test_folders_and_lists_of_a_web_server(web, files):
    address, folder, listed = web
    for i in range(6):
        (folder / "train" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(files.path(i), folder / "train" / f"{i % 2}" / files.names[i])
    local = sources.load(folder / "train")
    if listed:
        assert contents(sources.load(f"{address}/train")) == contents(local)
        assert sources.load(f"{address}/train/").digest == local.digest
    (folder / "list.txt").write_text("".join(f"train/{local.names[i]} {i}\n" for i in range(6)))
    assert contents(sources.load(f"{address}/list.txt")) == (contents(local)[0], list(range(6)))


# S3


@pytest.fixture(scope="module")
def bucket():
    """A file system on a loopback server, with an empty bucket."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ACCESS_KEY_ID": "id",
            "SECRET_ACCESS_KEY": "key",
            "DEFAULT_REGION": "us-east-1",
            "ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        fs = s3fs.S3FileSystem()
        fs.mkdir("images")
        yield fs
    server.kill()
    server.wait()


def test_s3_gives_what_the_disk_gives(bucket, files, shards, tmp_path):
    put(bucket, shards, "images/some/tars")
    local = sources.load(shards)
    for source in (
        "s3://images/some/tars",
        "s3://images/some/tars/shard-*.tar",
        "s3://images/some/tars/shard-{000000..000004}.tar",
    ):
        found = sources.load(source)
        assert (contents(found), found.classes) == (contents(local), local.classes)
    for i in range(6):
        (tmp_path / "root" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(files.path(i), tmp_path / "root" / f"class {i % 2}" / files.names[i])
    local = sources.load(tmp_path / "root")
    put(bucket, tmp_path / "root", "images/train")
    found = sources.load("s3://images/train")
    assert (contents(found), found.digest) == (contents(local), local.digest)
    bucket.pipe("images/list.txt", "".join(f"train/{name} 1\n" for name in local.names).encode())
    assert contents(sources.load("s3://images/list.txt")) == (contents(local)[0], [1] * 6)


def test_a_changed_object_is_never_served_stale(bucket, shards):
    put(bucket, shards, "images/changing")
    assert sources.load("s3://images/changing").read([0])[1].tolist() == sources.load(shards).read([0])[1].tolist()
    source = sources.load("s3://images/changing")
    bucket.pipe("images/changing/shard-000001.tar", (shards / "shard-000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"source='s3://images/changing/shard-000001\.tar': it changed"):
        source.read([5])
    again = sources.load("s3://images/changing")
    assert again.read(range(5, 10))[1].tolist() == sources.load(shards).read(range(5))[1].tolist()


def test_a_remote_shards_digest_tells_its_version(memory, tmp_path):
    digests = set()
    for label in (b"0", b"1"):
        pack(tmp_path / "a.tar", ("0.jpg", b"x"), ("0.cls", label))
        memory.pipe("/d/a.tar", (tmp_path / "a.tar").read_bytes())
        digests.add(sources.load("memory://d/a.tar").digest)
    assert len(digests) == 2


def test_a_server_that_fails_for_the_moment_is_asked_again(memory, shards, monkeypatch):
    put(memory, shards, "/data")
    get, failures = MemoryFileSystem.get_file, []

    def busy(self, *args, **options):
        failures.append(1)
        if len(failures) < 3:
            raise ConnectionResetError("gone")
        return get(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", busy)
    monkeypatch.setattr(storage, "_WAITS", (0, 0, 0))
    assert sources.load("memory://data").read([0])[1].tolist() == sources.load(shards).read([0])[1].tolist()
    assert len(failures) == 3
