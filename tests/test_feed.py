"""Which decoder reads what, and what DALI never sees. The oracles are Pillow's pixels and the graph itself."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import chunk
from images import encoded
from nvidia.dali import fn
from PIL import Image

from lumix_dali import create_loader, decoding
from lumix_dali.data import formats
from lumix_dali.data.files import Files
from lumix_dali.data.formats import BadImage, Decoder
from lumix_dali.loading import pipelines
from lumix_dali.loading.faults import Faults
from lumix_dali.loading.feed import Feed
from lumix_dali.loading.plan import Plan

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)


def png(*extra, width=18, height=12, depth=8, colour=2, end=True):
    """A PNG of `PIXELS` with the given chunks between its header and its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    chunks = [header, *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND") * end]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg(*segments, marker=0xC0, bits=8, components=3):
    """The header of a JPEG of 18x12 pixels, with segments before its frame."""
    frame = struct.pack(">BHHB", bits, 12, 18, components) + bytes(3 * components)
    return b"\xff\xd8" + b"".join(segments) + struct.pack(">BBH", 0xFF, marker, len(frame) + 2) + frame


def webp(kind, content):
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        jpeg(components=4),
        jpeg(bits=12),
        jpeg(marker=0xC3),
        jpeg(marker=0xC9),
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xda\0\4ab",
        b"\xff\xd8\xff\xe0\0\1" + jpeg()[2:],
        b"\xff\xd8" + b"\xff" * 5000,
        png(depth=3),
        png(width=0),
        webp(b"VP8 ", bytes(20)),
        encoded(PIXELS, "WEBP")[:-20],
    ],
    ids=lambda content: f"{content[:4]}{len(content)}",
)
def test_dali_never_sees_an_odd_header(content):
    assert isinstance(formats._dali(io.BytesIO(content)), str)  # why Pillow decodes it


# The graph


def behind(name, makers, user=None):
    """The operators that produce an edge of the graph, or all inputs of `user`, and all that they depend on."""
    found, names = [], [edge.name for edge in user.inputs] if user else [name]
    while names:
        if (maker := makers[names.pop()]) not in found:
            found.append(maker)
            names += [edge.name for edge in maker.inputs]
    return found


@pytest.mark.parametrize("regions", [True, False, None])
@pytest.mark.parametrize("device_id", [None, 0], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("define", "transform"),
    [
        (pipelines.train_pipeline, pipelines.TrainTransform()),
        (pipelines.val_pipeline, pipelines.EvalTransform()),
    ],
    ids=["train", "val"],
)
def test_every_decoder_waits_for_a_peek_at_the_same_image(define, transform, device_id, regions, tmp_path):
    faults = Faults(write_files(tmp_path / "a", {"0.png": png()}), 0, 10**8)
    plan = Plan(0, 0, 0, transform.size, None, training=define is pipelines.train_pipeline)
    feed = Feed(faults, np.zeros(4, np.int64), 4, plan, 1, 1)
    pipe = define(feed, transform, decoder={"regions": regions}, batch_size=4, num_threads=1, device_id=device_id)
    pipe._build_graph()
    makers = {edge.name: operator for operator in pipe._ops for edge in operator.outputs}
    (decoder,) = (operator for operator in pipe._ops if ".decoders" in type(operator._op).__module__)
    (reader,) = (operator for operator in pipe._ops if type(operator._op).__name__ == "Read")
    peeks = [operator for operator in behind(decoder.inputs[0].name, makers, decoder) if is_peek(operator)]
    wanted = device_id is None if regions is None else regions
    assert len(decoder.inputs) == (3 if wanted else 1)
    assert peeks
    for peek in peeks:
        assert reader in behind(peek.inputs[0].name, makers)


def is_peek(operator):
    return type(operator._op).__name__ == "PeekImageShape"


def test_whole_and_region_decoding_give_the_same_crops(tmp_path):
    """The GPU's form on the CPU: the same draws, and at most one grey level between the two."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:90, :120]
    smooth = np.stack([2 * x, 2 * y, x + y], -1)
    contents = {
        f"{i}.{kind}": encoded(
            (smooth + rng.integers(0, 9, smooth.shape)).astype(np.uint8)[i:, : 120 - i], kind.upper()
        )
        for i, kind in enumerate(["jpeg", "png", "webp"] * 4)
    }
    samples = write_files(tmp_path / "a", contents)
    for is_training in (True, False):
        whole, parts = (
            delivered(make(samples, is_training=is_training, input_size=40, decode_regions=regions)).astype(int)
            for regions in (False, True)
        )
        assert len(whole) == 12
        assert np.abs(whole - parts).max() <= 1
        assert np.abs(whole - parts).mean() < 0.01


def test_bytes_are_not_copied_and_live_as_long_as_dali_reads_them(monkeypatch):
    """DALI gets our own arrays; overwriting those that the feed has let go of changes nothing."""
    # Large enough that DALI is still decoding the first while the callback makes those ahead.
    noise = np.random.default_rng(0).integers(0, 9, (600, 800, 3), dtype=np.uint8)
    rows = [(encoded(noise + np.uint8(9 * i), "PNG"), i) for i in range(24)]
    options = dict(is_training=False, batch_size=2, prefetch_queue_depth=4, num_threads=1)
    want = delivered(make(rows, **options))
    buffers, let_go = {}, []
    original = Feed._make

    def writable(self, iteration):
        batch = original(self, iteration)
        images = [image.copy() for image in batch.images]
        buffers[iteration] = images
        alive = {kept.iteration for kept in self._batches}
        for old in [number for number in buffers if number < iteration and number not in alive]:
            for image in buffers.pop(old):
                image[:] = 0
            let_go.append(old)
        return batch._replace(images=images)

    monkeypatch.setattr(Feed, "_make", writable)
    np.testing.assert_array_equal(delivered(make(rows, **options)), want)
    assert let_go


def test_a_known_file_that_becomes_a_fifo_is_replaced(tmp_path):
    """Looked at each time before DALI opens it, since opening a FIFO waits for ever."""
    samples = write_files(tmp_path / "a", {f"{i:02}.png": png() for i in range(24)})
    loader = make(samples)
    list(loader)
    path = Path(samples.path(9))
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match=r"09\.png' cannot be used \(not a regular file\)"):
        stream = [list(loader) for _ in range(2)]
    assert len(stream[1]) == 6


def test_files_for_pillow_take_no_file_descriptors(tmp_path):
    contents = {f"{i:02}.bmp": encoded(PIXELS, "BMP") for i in range(60)}
    loader, before = make(write_files(tmp_path / "a", contents), batch_size=20), len(os.listdir("/proc/self/fd"))
    next(batches := iter(loader))
    assert len(os.listdir("/proc/self/fd")) < before + 20
    assert len(list(batches)) == 2


def test_neither_pillows_limit_nor_a_warning_filter_decides(tmp_path, monkeypatch):
    animated = Image.new("P", (20, 20))
    animated.putpalette([i % 256 for i in range(768)])
    other = animated.copy()
    other.putpixel((3, 3), 7)
    (tmp_path / "a").mkdir()
    animated.save(tmp_path / "a" / "0.png", save_all=True, append_images=[other], transparency=bytes(range(256)))
    Image.new("RGB", (100, 100), "red").save(tmp_path / "a" / "1.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        loader = make(tmp_path, is_training=False)
        assert len(delivered(loader)) == 2
        assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (before, 1000)
    assert loader.bad == {}


def test_a_loader_with_a_lower_limit_takes_nothing_from_another():
    image = encoded(np.zeros((100, 100, 3), np.uint8), "BMP")
    with formats._limits_replaced(10):  # as a thread of the other loader does
        assert formats.pillow_pixels(io.BytesIO(image), 10**4).size == (100, 100)
        with pytest.raises(BadImage, match="the limit is 9999"):
            formats.pillow_pixels(io.BytesIO(image), 9999)


def test_stray_markers_are_found_without_decoding():
    """Every JPEG that Pillow refuses has one, of 200 with 512 random bytes in their scan; no intact one has."""
    y, x = np.mgrid[:192, :256]
    pixels = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}, {"comment": b"x"}):
        for content in (encoded(pixels, "JPEG", **options), encoded(pixels[..., 0], "JPEG", **options) + b"tail"):
            assert not formats.has_stray_marker(io.BytesIO(content))
    good, rng, refused = encoded(pixels, "JPEG"), np.random.default_rng(0), 0
    start = good.index(b"\xff\xda") + 14
    for _ in range(200):
        at = int(rng.integers(start, len(good) - 700))
        content = good[:at] + rng.integers(0, 256, 512).astype(np.uint8).tobytes() + good[at + 512 :]
        try:
            formats.pillow_pixels(io.BytesIO(content))
        except BadImage:
            refused += 1
            assert formats.has_stray_marker(io.BytesIO(content))
    assert refused > 50


def test_a_broken_decoder_is_one_error(tmp_path, monkeypatch):
    """It names decoder, versions and remedy after a bounded number of pipelines; no sample is blamed."""
    real, build, pipes = decoding.decode, decoding.decode_pipeline, []

    def broken(images, region, **options):
        return real(images, lambda shape: region(fn.reshape(fn.reshape(shape, shape=[5]), shape=[3])), **options)

    monkeypatch.setattr(decoding, "decode", broken)
    monkeypatch.setattr(pipelines, "decode", broken)
    monkeypatch.setattr(decoding, "decode_pipeline", lambda *a, **k: pipes.append(1) or build(*a, **k))
    loader = make(write_files(tmp_path / "a", {f"{i:02}.png": png() for i in range(32)}), batch_size=32)
    with pytest.raises(
        RuntimeError, match=r"fn\.decoders\.image_slice on cpu fails .*DALI 2.*decode_regions=False"
    ) as e:
        list(loader)
    assert len(str(e.value)) < 400
    assert len(pipes) <= 16
    assert loader.bad == {}
    assert loader.state_dict()["refused"] == []


def test_a_batch_of_damaged_files_is_no_broken_decoder(tmp_path):
    """Most of a batch is refused, and a decoder that decodes a good image goes on."""
    images = {f"{i:02}.jpg": encoded(PIXELS, "JPEG") for i in range(16)}
    cut = {name: content[: len(content) // 2] if int(name[:2]) % 4 else content for name, content in images.items()}
    loader = make(write_files(tmp_path / "a", cut), batch_size=16, is_training=False, max_bad=16)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert sum(len(labels) for _, labels in loader) == 16
    assert len(loader.bad) == 12


# Delivered pixels


def write_files(root, contents):
    root.mkdir()
    for name, content in contents.items():
        (root / name).write_bytes(content)
    count = len(contents)
    return Files(str(root), sorted(contents), np.arange(count), [str(k) for k in range(count)])


def make(source, **options):
    fixed = {"batch_size": 4, "input_size": (12, 18), "num_threads": 2, "device": "cpu", "dtype": "uint8"}
    return create_loader(source, **fixed | options)


def delivered(loader):
    return torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_pillows_pixels_arrive_bit_for_bit(tmp_path, batch_size):
    """A data set entirely of formats that DALI must not see, with more files than the queue holds."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (12, 18, 3), dtype=np.uint8) for _ in range(70)]
    kinds = ["BMP", "TIFF", "PPM", "TGA", "ICO"]
    contents = {f"{i:02}.img": encoded(image, kinds[i % 4]) for i, image in enumerate(images)}
    samples = write_files(tmp_path / "a", contents)
    before = len(os.listdir("/proc/self/fd"))
    with make(samples, batch_size=batch_size, is_training=False, crop_pct=1.0, prefetch_queue_depth=3) as loader:
        np.testing.assert_array_equal(delivered(loader), images)
        np.testing.assert_array_equal(delivered(loader), images)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("is_training", [True, False])
def test_a_refusal_is_part_of_the_state(tmp_path, is_training):
    contents = {f"{i:02}.png": png(chunk(b"ABCD")) if i == 5 else png() for i in range(12)}
    samples = write_files(tmp_path / "a", contents)
    loader = make(samples, is_training=is_training, batch_size=3)
    for _ in loader:
        pass
    state, after = loader.state_dict(), delivered(loader)
    resumed = make(samples, is_training=is_training, batch_size=3)
    resumed.load_state_dict(state)
    assert resumed._faults.decoders[5] == Decoder.PILLOW
    np.testing.assert_array_equal(delivered(resumed), after)


SHAPES = {"2x30000": (2, 30_000), "30000x2": (30_000, 2), "10000x10000": (10_000, 10_000), "1x60000": (1, 60_000)}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, id=name, marks=[pytest.mark.slow] * (name != "2x30000")) for name, shape in SHAPES.items()],
)
def test_evaluation_needs_only_the_memory_of_the_crop(tmp_path, shape):
    """White stays white to the corners, in half a GB more than an ordinary image takes.

    DALI decodes a PNG whole (300 MB for 10000x10000) before it takes the region (230 MB).
    """
    (tmp_path / "a").mkdir()
    Image.new("L", shape[::-1], 255).save(tmp_path / "a" / "0.png")
    Image.new("L", (256, 256), 255).save(tmp_path / "a" / "1.png")
    code = rf"""
        import re
        from pathlib import Path
        from lumix_dali import create_loader, decoding
        peaks = []
        for name in ("1.png", "0.png"):
            open({str(tmp_path / "list.txt")!r}, "w").write(f"a/{{name}} 0")
            options = dict(batch_size=1, is_training=False, device="cpu", num_threads=1, dtype="uint8")
            ((images, _),) = create_loader({str(tmp_path / "list.txt")!r}, **options)
            assert images.min() == 255, images
            # Not ru_maxrss, which starts at the peak of the process that started this one.
            peaks.append(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
        print((peaks[1] - peaks[0]) / 2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.split("\n"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < (0.55 if shape == SHAPES["10000x10000"] else 0.5)  # GiB
