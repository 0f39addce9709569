"""`check` on damaged bytes: it never fails, and its verdict on a file is the loader's.

Small images of each format are truncated, changed, partly duplicated and spliced together. The loader's verdict
comes from `faults.Faults`, which it consults for each sample.
"""

import io
import warnings
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lumix_dali.data import check
from lumix_dali.data.files import Files
from lumix_dali.data.formats import BadImage, Decoder, pillow_pixels
from lumix_dali.loading.faults import Faults
from tests import odd

MAX_PIXELS = 10**6  # a damaged header may claim anything
KINDS = {
    "JPEG": [dict(), dict(progressive=True), dict(mode="L"), dict(mode="CMYK")],
    "PNG": [dict(), dict(mode="P"), dict(mode="RGBA"), dict(save_all=True, append_images=[Image.new("RGB", (20, 16))])],
    "WEBP": [dict(), dict(lossless=True), dict(mode="RGBA"), dict(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")],
    "GIF": [dict(mode="P")],
    "BMP": [dict(), dict(mode="L")],
    "TIFF": [dict(), dict(compression="tiff_lzw"), dict(mode="I;16")],
    "JPEG2000": [dict(), dict(no_jp2=True)],
    "PPM": [dict(), dict(mode="L")],
    "TGA": [dict(compression="tga_rle")],
    "ICO": [dict(mode="RGBA")],
    "DDS": [dict()],
    "AVIF": [dict()],
    "EPS": [dict()],
}


@cache
def originals():
    """(format, content) of small images, some with bytes after their end."""
    small = Image.fromarray(odd.base()).resize((20, 16))
    found = []
    for kind, variants in KINDS.items():
        for options in variants:
            deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16))
            image = deep if options.get("mode") == deep.mode else small
            found.append((kind, odd.encoded(kind, image=image, **options)))
    motion = odd.encoded("JPEG", image=small) + bytes(5000)
    return [*found, ("JPEG", motion), ("JPEG", motion[:-5002])]


PLACES = st.integers(0, 10**6)  # millionths of the length


@st.composite
def damaged(draw):
    """An image's bytes with up to three faults."""
    _, content = draw(st.sampled_from(originals()))
    for _ in range(draw(st.integers(0, 3))):
        low, high = sorted(place * len(content) // 10**6 for place in (draw(PLACES), draw(PLACES)))
        if draw(st.booleans()):  # the decisive bytes are in the header
            low, high = min(low, draw(st.integers(0, 60))), min(high, 64)
        fault = draw(st.sampled_from(["cut", "change", "double", "drop", "splice"]))
        if fault == "cut":
            content = content[:high]
        elif fault == "change":
            content = content[:low] + draw(st.binary(max_size=8)) + content[low + 8 :]
        elif fault == "double":
            content = content[:high] + content[low:]
        elif fault == "drop":
            content = content[:low] + content[high:]
        else:
            content = content[:low] + draw(st.sampled_from(originals()))[1][low:]
    return content


def of_the_loader(content):
    """(decoder, reason) in training; the reason is None if the image can be used."""
    faults = Faults(Files("", ["x"], np.zeros(1, np.int64), ["c"]), 1, MAX_PIXELS)
    try:
        faults.bitmap(0, io.BytesIO(content))
    except BadImage as error:
        return Decoder(faults.decoders[0]), str(error)
    return Decoder(faults.decoders[0]), None


def of_check(content):
    """(decoder, reason)."""
    try:
        return check._look(io.BytesIO(content), False, MAX_PIXELS).decoder, None
    except BadImage as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=250, deadline=None, database=None)
@given(content=damaged())
@example(content=b"")
def test_check_says_what_the_loader_says(content):
    decoder, reason = of_the_loader(content)
    chosen, found = of_check(content)
    if decoder == Decoder.UNKNOWN:  # by its header
        assert found == reason
    elif decoder == Decoder.DALI:  # bad only if a JPEG's scan is odd and Pillow cannot decode it
        assert reason is None
        if found:
            assert content[:2] == b"\xff\xd8"
            with pytest.raises(BadImage), warnings.catch_warnings():
                pillow_pixels(io.BytesIO(content), MAX_PIXELS)
    else:  # for other formats only the header is inspected; decoding is left to the full scan
        assert found in (reason, None)
        assert found == reason or not content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"))
    if not found:
        assert chosen == decoder
