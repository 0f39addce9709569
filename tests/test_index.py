"""The index of shards: tar archives and hand-made TFRecords, whole, truncated, and damaged anywhere."""

import os
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
from archives import pack
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.records import bytes_feature, example, image_record, int_feature, message, record, write_records
from lumix_dali.data import check, index, sources
from lumix_dali.data import shards as shards_module

FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMIX_DALI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def members(path):
    with open(path, "rb", buffering=0) as file:
        return list(index.members(file.fileno()))


def rows(path):
    with open(path, "rb", buffering=0) as file:
        return list(index.rows(str(path), file.fileno()))


def scan(path):
    with open(path, "rb", buffering=0) as file:
        return index.scan(str(path), file.fileno()).tolist()


def info(name, kind=tarfile.REGTYPE, **fields):
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in fields.items():
        setattr(made, key, value)
    return made


# Tar


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_at_the_offsets_are_those_written(tmp_path, format):
    """Long names, names of any bytes, and sizes around tar's blocks, between members that are passed over."""
    depth = 20 if format == tarfile.USTAR_FORMAT else 60
    contents = {
        f"{'folder/' * (depth if size % 2 else 1)}é犬 \udcff{size}.bin": os.urandom(size)
        for size in (0, 1, 511, 512, 513, 1600, 70_000)
    }
    packed = []
    for number, member in enumerate(contents.items()):
        packed += [
            info(f"{number}", tarfile.DIRTYPE),
            member,
            (f"d/.hidden{number}", b"x" * 600),
            info("link" * 20, tarfile.SYMTYPE, linkname="b/" * depth + "a"),
        ]
    content = pack(tmp_path / "any.tar", *packed, format=format).read_bytes()
    found = members(tmp_path / "any.tar")
    assert {each.name: content[each.offset_data : each.offset_data + each.size] for each in found} == contents


def test_sizes_in_base_256_and_in_pax_headers(tmp_path):
    """A member of 8 GiB and more, in a sparse file, is skipped up to the next header."""
    size = 2**33 + 5
    for number, format in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        path = tmp_path / f"{number}.tar"
        head = info("big.bin", size=size).tobuf(format=format)
        small = info("a.jpg", size=3)
        with open(path, "wb") as file:
            file.write(head)
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
            file.write(small.tobuf(format=format) + b"abc".ljust(512, b"\0") + bytes(1024))
        assert [(each.name, each.size) for each in members(path)] == [("big.bin", size), ("a.jpg", 3)]
        path.unlink()


def test_sparse_members_links_and_devices_are_skipped(tmp_path):
    """GNU's old sparse members have map blocks between header and content; pax names the stored size."""
    head = bytearray(info("hole.jpg", tarfile.GNUTYPE_SPARSE, size=512).tobuf(format=tarfile.GNU_FORMAT))
    head[482] = 1  # the map continues in two more blocks
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    more = bytearray(512)
    more[504] = 1
    good = [
        info(name, size=len(text)).tobuf() + text.ljust(512, b"\0")
        for name, text in [("a.jpg", b"abc"), ("a.cls", b"7")]
    ]
    sparse = bytes(head) + bytes(more) + bytes(512) + b"x" * 512
    (tmp_path / "a.tar").write_bytes(good[0] + sparse + good[1] + bytes(1024))
    assert [member.name for member in members(tmp_path / "a.tar")] == ["a.jpg", "a.cls"]
    keys = {"major": "1", "minor": "0", "name": "b.jpg", "realsize": "9000"}
    pax = info("GNUSparseFile.0/b.jpg", size=600, pax_headers={f"GNU.sparse.{key}": keys[key] for key in keys})
    links = [
        info(name, kind, size=5000, linkname="a.jpg")
        for name, kind in [
            ("hard", tarfile.LNKTYPE),
            ("soft", tarfile.SYMTYPE),
            ("device", tarfile.BLKTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("folder", tarfile.DIRTYPE),  # passed over without a word
        ]
    ]
    stored = b"1\n0\n88\n".ljust(512, b"\0") + bytes(512)
    content = pax.tobuf(format=tarfile.PAX_FORMAT) + stored + b"".join(link.tobuf() for link in links)
    (tmp_path / "b.tar").write_bytes(content + good[0] + info("c", tarfile.CONTTYPE, size=1).tobuf() + b"c".ljust(512))
    assert [member.name for member in members(tmp_path / "b.tar")] == ["a.jpg", "c"]
    ignored = []
    with open(tmp_path / "b.tar", "rb") as file:
        list(index.members(file.fileno(), ignored))
    assert ignored == ["b.jpg", "hard", "soft", "device", "pipe"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_in_a_header_is_an_error(tmp_path, format):
    """tarfile alone takes it for the end of the archive."""
    path = pack(tmp_path / "a.tar", *SAMPLES[:4], format=format)
    content = path.read_bytes()
    starts = {start for each in members(path) for start in (each.offset, each.offset_data - 512)}
    places = [start + k for start in sorted(starts) for k in (*range(148), *range(156, 512))]  # between is its checksum
    for place in places[::5]:  # 504 places in each header, which 5 does not divide
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"source='.*a\.tar': not a complete tar archive: .* cut short.*; repair or"
        ):
            scan(path)


@pytest.mark.parametrize("content", [b"12 size=abc\n", b"11 size=-1\n", b"0 path=a\n"])
def test_a_damaged_extended_header_is_an_error(tmp_path, content):
    pack(tmp_path / "a.tar", ("a.jpg", bytes(2000)))
    head = info("pax", tarfile.XHDTYPE, size=len(content)).tobuf()
    (tmp_path / "a.tar").write_bytes(head + content.ljust(512, b"\0") + (tmp_path / "a.tar").read_bytes()[:2560])
    with pytest.raises(ValueError, match="not a complete tar archive"):
        members(tmp_path / "a.tar")


def test_two_threads_may_read_one_descriptor(tmp_path):
    with open(pack(tmp_path / "a.tar", *SAMPLES), "rb") as file:
        both = zip(index.members(file.fileno()), index.members(file.fileno()), strict=True)
        assert [(one.name, other.name) for one, other in both] == [(name, name) for name, _ in SAMPLES]


@pytest.mark.parametrize("garbage", [b"", b"garbage", os.urandom(2000)])
def test_what_follows_the_end_mark_is_not_read(tmp_path, garbage):
    path = pack(tmp_path / "a.tar", ("a.jpg", b"x"), ("a.cls", b"1"))
    path.write_bytes(path.read_bytes()[:2048] + bytes(1024) + garbage)
    assert len(rows(path)) == 1


SAMPLES = [
    ("0.jpg", os.urandom(700)),
    ("0.cls", b"0"),
    ("folder/" * 20 + "1.jpg", b"y" * 512),
    ("folder/" * 20 + "1.cls", b"1"),
    ("2.jpg", b"z" * 30),
    ("2.cls", b"2"),
]


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_archive_is_usable_up_to_the_cut_or_an_error(tmp_path, format):
    """A cut between two members leaves no trace: there are fewer samples, and `check` reports the missing end mark."""
    path = pack(tmp_path / "a.tar", *SAMPLES, format=format)
    whole, content = rows(path), path.read_bytes()
    ends = [member.offset_data + -(-member.size // 512) * 512 for member in members(path)]
    stops = {*range(0, len(content), 512), *range(1, ends[-1], 97)}
    for stop in sorted(stops):
        path.write_bytes(content[:stop])
        if stop in ends or stop >= ends[-1]:
            found = [row for row in rows(path) if row.label >= 0]
            assert found == whole[: sum(end <= stop for end in ends) // 2]
        else:
            with pytest.raises(ValueError, match="cut short"):
                rows(path)
    path.write_bytes(content[: ends[3]])
    report = check._audit(str(path))
    assert report.warnings == ["a.tar: no end mark; if its original is longer it was cut short: copy it again"]


@pytest.mark.parametrize("magic", [b"ustar  \0", bytes(8)], ids=["GNU", "V7"])
def test_times_behind_a_name_are_no_part_of_it(tmp_path, magic):
    """GNU tar's --listed-incremental writes them where POSIX has a prefix of the name."""
    content = b""
    for name, each in (("a/0.jpg", b"image"), ("a/0.cls", b"1")):
        header = bytearray(info(name, size=len(each)).tobuf(format=tarfile.GNU_FORMAT))
        header[257:265], header[345:369] = magic, b"14713410000\0" * 2
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % sum(header)
        content += header + each.ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    assert rows(tmp_path / "a.tar") == [("a/0.jpg", 512, 5, 1)]


@pytest.mark.parametrize("size", [2**40, 2**70, -1, -600])
def test_an_impossible_size_is_an_error(tmp_path, size):
    """Of 1 TiB, which would take all memory, and one that leads back to its own header."""
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        head = info("a.jpg", kind, size=size).tobuf(format=tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(head + bytes(1024))
        with pytest.raises(ValueError, match="not a complete tar archive"):
            members(tmp_path / "a.tar")


@settings(max_examples=150, deadline=None, database=None)
@given(place=st.integers(0, 6000), bits=st.integers(1, 255), stop=st.integers(0, 12000))
def test_any_damage_is_an_error_or_rows(tmp_path_factory, place, bits, stop):
    path = pack(tmp_path_factory.getbasetemp() / "b.tar", *SAMPLES, format=tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= bits
    path.write_bytes(content[:stop])
    try:
        for row in rows(path):
            assert 0 <= row.offset <= row.offset + row.size <= stop
    except ValueError:
        pass


# TFRecord


def test_rows_of_records_match_what_was_written(tmp_path):
    images = [os.urandom(n) for n in (1, 200, 70_000)]
    path = write_records(tmp_path / "a.tfrecord", [(images[0], 0), (images[1], 300, "a b.JPEG"), (images[2], 999_999)])
    found, content = rows(path), path.read_bytes()
    assert [content[offset : offset + size] for _, offset, size, _ in found] == images
    assert [(row.name, row.label) for row in found] == [
        ("record 0", 0),
        ("record 1 (a b.JPEG)", 300),
        ("record 2", 999_999),
    ]
    assert scan(path) == [list(row[1:]) for row in found]


IMAGE, LABEL = {index.IMAGE: bytes_feature(b"image")}, {index.LABEL: int_feature(4)}


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (example(IMAGE | LABEL), 4),
        (example(LABEL | IMAGE), 4),
        (example({"image/width": int_feature(1, 2, 3), "x": message(2, message(1, b"1234"))} | IMAGE | LABEL), 4),
        (example(IMAGE | {index.LABEL: int_feature(4, packed=False)}), 4),
        (example(IMAGE) + example(LABEL), 4),  # protocol buffers merge them
        (b"\x20\x07" + example(IMAGE | LABEL) + b"\x29" + bytes(8) + b"\x35" + bytes(4), 4),  # unknown fields
        (example(IMAGE), index.Fault.RECORD),
        (example(LABEL), index.Fault.RECORD),
        (example(IMAGE | {index.LABEL: int_feature(4, 5)}), index.Fault.RECORD),
        (example(IMAGE | {index.LABEL: bytes_feature(b"4")}), index.Fault.RECORD),
        (example(IMAGE | {index.LABEL: int_feature(10**9)}), index.Fault.RECORD),
        (example(LABEL | {index.IMAGE: bytes_feature(b"a", b"b")}), index.Fault.RECORD),
        (example(LABEL | {index.IMAGE: int_feature(3)}), index.Fault.RECORD),
        (example(IMAGE | {index.LABEL: message(3, b"\x08" + b"\xff" * 9 + b"\x01")}), index.Fault.RECORD),  # -1
        (b"", index.Fault.RECORD),
        (b"\x0b", index.Fault.RECORD),
        (example(IMAGE | LABEL)[:-1], index.Fault.RECORD),
    ],
)
def test_examples(tmp_path, content, label):
    (tmp_path / "a.tfrecord").write_bytes(record(content))
    (row,) = rows(tmp_path / "a.tfrecord")
    assert row.label == label
    if label == 4:
        assert (tmp_path / "a.tfrecord").read_bytes()[row.offset : row.offset + row.size] == b"image"


@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=60))
def test_any_record_is_an_error_or_a_row(content):
    name, start, stop, _ = index.parse_record(bytes(12) + content + bytes(4))
    assert 12 <= start <= stop <= 12 + len(content)
    assert isinstance(name, str)


def test_truncated_records(tmp_path):
    contents = [image_record(b"a" * 30, 1), image_record(b"b" * 40, 2)]
    path, ends = tmp_path / "a.tfrecord", [0, len(contents[0]), sum(map(len, contents))]
    for stop in range(ends[2] + 1):
        path.write_bytes(b"".join(contents)[:stop])
        if stop in ends:
            assert len(rows(path)) == ends.index(stop)
        else:
            with pytest.raises(ValueError, match=rf"the record at byte {max(e for e in ends if e <= stop)} is cut"):
                rows(path)
    path.write_bytes(struct.pack("<QI", 2**62, 0) + bytes(100))
    with pytest.raises(ValueError, match="the record at byte 0 is cut short"):
        rows(path)


# The kept index


@pytest.fixture
def shards(tmp_path):
    """Three tars of two samples each, labels 0 to 5."""
    (tmp_path / "data").mkdir()
    for k in range(3):
        write_tar(tmp_path / "data" / f"{k}.tar", [2 * k, 2 * k + 1])
    return tmp_path / "data"


def write_tar(path, labels):
    return pack(
        path,
        *(
            member
            for label in labels
            for member in ((f"{label}.jpg", b"image %d" % label), (f"{label}.cls", b"%d" % label))
        ),
    )


def labels(source):
    found = sources.load(source)
    return found.read(range(len(found)))[1].tolist()


@pytest.fixture
def scans(monkeypatch):
    """A list that receives the path of each scanned shard."""
    found, scan = [], index.scan
    monkeypatch.setattr(index, "scan", lambda path, handle: found.append(os.path.basename(path)) or scan(path, handle))
    return found


def test_an_index_is_kept_beside_its_shards(shards, scans, cache):
    assert labels(shards) == [0, 1, 2, 3, 4, 5]
    assert sorted(scans) == ["0.tar", "1.tar", "2.tar"]
    assert labels(shards) == [0, 1, 2, 3, 4, 5]
    assert len(scans) == 3
    kept = [path for path in (shards / ".lumix_dali").iterdir() if path.suffix == ".npy"]
    assert len(kept) == 1
    assert not cache.exists()
    found = sources.load(shards)
    np.testing.assert_array_equal(found._rows, np.concatenate([scan(path) for path in sorted(shards.glob("*.tar"))]))
    image = found.read([4])[0][0]
    assert bytes(image) == b"image 4"


def test_a_changed_shard_is_scanned_again(shards, scans):
    labels(shards)
    write_tar(shards / "1.tar", [7, 8])  # of the same size
    assert labels(shards) == [0, 1, 7, 8, 4, 5]
    (shards / "0.tar").unlink()
    assert labels(shards) == [7, 8, 4, 5]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_index_is_rebuilt(shards, damage):
    labels(shards)
    (kept,) = (shards / ".lumix_dali").glob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-24] if damage is None else damage)
    assert labels(shards) == [0, 1, 2, 3, 4, 5]


def test_the_index_of_a_read_only_folder_goes_into_the_cache(shards, cache, scans, monkeypatch):
    (shards / ".lumix_dali").write_text("a file, so that no folder can be made, by root neither")
    for _ in range(2):
        assert labels(shards) == [0, 1, 2, 3, 4, 5]
    assert len(scans) == 3
    assert len(list(cache.glob("*.npy"))) == 1
    cache_again = shards / "another"
    cache_again.write_text("")
    monkeypatch.setenv("LUMIX_DALI_CACHE", str(cache_again))
    with pytest.raises(ValueError, match=r"its index cannot be written to .*; set LUMIX_DALI_CACHE"):
        labels(shards)


def test_processes_that_start_at_once_scan_once(shards, scans):
    """Threads are enough: the lock belongs to open files."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(labels(shards))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 1, 2, 3, 4, 5]] * 4
    assert sorted(scans) == ["0.tar", "1.tar", "2.tar"]


@pytest.fixture
def many(tmp_path):
    """16 shards, enough for two processes."""
    (tmp_path / "many").mkdir()
    for k in range(16):
        pack(
            tmp_path / "many" / f"{k:02}.tar",
            *[(f"{i}.{end}", b"1") for i in range(1 + k % 3) for end in ("jpg", "cls")],
        )
    return tmp_path / "many"


def test_no_main_guard_is_needed(many, tmp_path):
    """A script without a guard, which `multiprocessing` would execute again in each child."""
    script = tmp_path / "script.py"
    script.write_text(f"""print("once")
import os
os.sched_getaffinity = lambda _: {{0, 1}}
from lumix_dali.data import index, sources
index.scan = None  # none in this process
print(len(sources.load({str(many)!r})))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("once\n31\n", "")


def test_a_damaged_shard_is_named_from_its_process(many, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    path = many / "09.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=f"source='{path}': .*cut short.*; repair or remove it"):
        sources.load(many)


def test_a_full_disk_is_named(tmp_path):
    """A limit of the file's size stands for the disk: NumPy itself would only count bytes."""
    script = f"""import resource, signal, numpy
from lumix_dali.data import index
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    index.keep({str(tmp_path / "a.npy")!r}, numpy.zeros(10000, numpy.int64))
except OSError as error:
    print(error.strerror, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"File too large {tmp_path / 'a.npy'}\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named(shards):
    path = shards / "1.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=f"source='{path}': .*cut short.*; repair or remove it"):
        sources.load(shards)


def test_the_name_of_a_sample(shards):
    found = sources.load(shards)
    assert found.name(3) == f"'{shards}/1.tar', '3.jpg' (byte {found._rows[3, 0]})"
    write_records(shards / "a.tfrecord", [(b"x", 1, "y.jpg")])
    assert sources.load(shards / "a.tfrecord").name(0).startswith(f"'{shards}/a.tfrecord', record 0 (y.jpg) (byte ")


def test_descriptors_are_closed(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN", 1)
    before = len(os.listdir("/proc/self/fd"))
    found = sources.load(shards)
    for _ in range(3):
        assert found.read(range(6))[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # one shard, and the index
    del found
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_rewritten_with_its_size_and_time_kept_is_read_again(tmp_path):
    def write(shift):
        members = [m for i in range(6) for m in ((f"{i}.jpg", b"image"), (f"{i}.cls", str((i + shift) % 6).encode()))]
        pack(tmp_path / "a.tar", *members)

    write(0)
    before = os.stat(tmp_path / "a.tar")
    assert sources.load(tmp_path / "a.tar").read(range(6))[1].tolist() == [0, 1, 2, 3, 4, 5]
    write(1)
    os.utime(tmp_path / "a.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sources.load(tmp_path / "a.tar").read(range(6))[1].tolist() == [1, 2, 3, 4, 5, 0]


def test_a_flipped_bit_in_a_kept_index_changes_nothing(shards):
    sources.load(shards)
    (kept,) = (shards / ".lumix_dali").glob("*.npy")
    good, rng = kept.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        content, place = bytearray(good), int(rng.integers(len(good)))
        content[place] ^= 1 << int(rng.integers(8))
        kept.write_bytes(content)
        assert sources.load(shards).read(range(6))[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_labels_that_are_text_fail_at_once(tmp_path):
    pack(tmp_path / "a.tar", *(m for i in range(3) for m in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"n01440764"))))
    with pytest.raises(ValueError, match=r"3 of 3 labels are no numbers; .*b'n01440764'"):
        sources.load(tmp_path / "a.tar")


def test_mixed_or_incomplete_sets_of_shards_are_refused(tmp_path):
    pack(tmp_path / "whole.tar", ("0.jpg", b"x"), ("0.cls", b"0"))
    content = (tmp_path / "whole.tar").read_bytes()
    for names, said in (
        (["train-0000.tar", "train-0001.tar", "val-0000.tar"], "of 2 sets: train, val; give one of them"),
        (["train-00000-of-00003", "train-00002-of-00003"], "1 of train-.*-of-00003 are missing: 00001"),
        (["a.tar", "b.tar"], None),
        (["part-000.tar", "part-001.tar"], None),
    ):
        folder = tmp_path / names[0].replace(".", "")
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content)
        if said is None:
            assert len(sources.load(folder)) == 2
        else:
            with pytest.raises(ValueError, match=said):
                sources.load(folder)
