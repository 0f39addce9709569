"""The benchmarks' mixing methods match their papers: pixels, labels and λ0 against NumPy and hand-worked numbers."""

import math

import numpy as np
import pytest

pytest.importorskip("tqdm")
torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from experiments import mixing  # noqa: E402
from lumix_dali.target import MixTarget  # noqa: E402

COUNT = 64


def plain_images(size, count=COUNT):
    """Images of one colour each, any two at least two levels apart, and unique labels."""
    colours = np.arange(count) * 3
    return np.broadcast_to(colours[:, None, None, None], (count, *size, 3)).astype(np.uint8), np.arange(count)


def partners(labels, target):
    np.testing.assert_array_equal(target.labels, labels)
    assert (target.partner_labels != labels).all()
    assert sorted(target.partner_labels) == sorted(labels)
    return target.partner_labels  # labels are indices


# --- ResizeMix


def test_resizemix_pastes_the_whole_partner_into_the_box(graph):
    size = (40, 60)
    y, x = np.mgrid[:40, :60]
    # Red falls from left to right, green from top to bottom, blue identifies the image.
    images = np.stack([np.stack([250 - 4 * x, 240 - 5 * y, 0 * x + 3 * k], -1) for k in range(COUNT)])
    images = images.astype(np.uint8)
    labels = np.arange(COUNT)
    mixed, target = graph(mixing.resizemix, COUNT)(images, labels)
    other, taus = partners(labels, target), []
    for i, (y0, x0, y1, x1) in enumerate(target.box):
        height, width = y1 - y0, x1 - x0
        assert 0 <= y0 and y1 <= 40 and 0 <= x0 and x1 <= 60
        assert math.floor(0.1 * 40) <= height <= 0.8 * 40
        assert abs(height / 40 - width / 60) < 1 / 40 + 1 / 60  # one τ for both sides, each rounded down
        taus.append(width / 60)
        inside = np.zeros(size, bool)
        inside[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(mixed[i][~inside], images[i][~inside])
        patch = mixed[i, y0:y1, x0:x1].astype(float)
        np.testing.assert_array_equal(patch[..., 2], 3 * other[i])
        # The smaller ramp, at the centres of its own pixels; resizing may distort its ends.
        ramp_x = 250 - 4 * ((np.arange(width) + 0.5) * 60 / width - 0.5)
        ramp_y = 240 - 5 * ((np.arange(height) + 0.5) * 40 / height - 0.5)
        np.testing.assert_allclose(patch[..., 0].mean(0)[1:-1], ramp_x[1:-1], atol=2)
        np.testing.assert_allclose(patch[..., 1].mean(1)[1:-1], ramp_y[1:-1], atol=2)
        np.testing.assert_allclose(target.lam0[i], inside.mean(), rtol=1e-6)
    assert (target.kind == 2).all()
    assert min(taus) < 0.25 and max(taus) > 0.65 and abs(np.mean(taus) - 0.45) < 0.1  # U(.1, .8)


def test_resizemix_puts_the_box_anywhere(graph):
    images, labels = plain_images((20, 20))
    run = graph(mixing.resizemix, COUNT)
    boxes = np.concatenate([run(images, labels)[1].box for _ in range(20)])
    free = 20 - (boxes[:, 2:] - boxes[:, :2])
    assert (boxes[:, :2] == 0).any(0).all() and (boxes[:, :2] == free).any(0).all()
    np.testing.assert_allclose((boxes[:, :2] / free).mean(0), 0.5, atol=0.05)


# --- the input space's ablations


def shuffled(images, labels, *, size, patch):
    from lumix_dali import fn as mixfn

    return mixing.shuffle_patches(images, size, patch), mixfn.unmixed(labels, images.device)


def test_patches_are_permuted_whole_and_differently_for_each_sample(graph):
    rows, columns, patch = 2, 3, 4
    size = (rows * patch, columns * patch)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, *size, 3), dtype=np.uint8)
    run = graph(shuffled, COUNT, size=size, patch=patch)
    orders = []
    for _ in range(20):
        mixed, _ = run(images, np.arange(COUNT))
        for own, after in zip(cut(images, patch), cut(mixed, patch), strict=True):
            order = [[np.array_equal(piece, other) for other in own].index(True) for piece in after]
            assert sorted(order) == list(range(rows * columns))
            orders.append(order)
    found = np.array(orders)
    assert len(np.unique(found[:COUNT], axis=0)) > COUNT / 2
    for place in range(rows * columns):  # each patch lands in each position equally often
        share = np.bincount(found[:, place], minlength=rows * columns) / len(found)
        np.testing.assert_allclose(share, 1 / (rows * columns), atol=0.04)


def cut(images, patch):
    """[B, patches, patch, patch, 3]."""
    count, height, width, _ = images.shape
    split = images.reshape(count, height // patch, patch, width // patch, patch, 3)
    return split.swapaxes(2, 3).reshape(count, -1, patch, patch, 3)


def test_each_patch_has_its_own_weight_and_lam0_is_their_mean(graph):
    size, patch = (8, 12), 4
    images, labels = plain_images(size)
    images, all_weights = np.where(labels[:, None, None, None] % 2, 255, images // 3), []
    images = images.astype(np.uint8)
    mixed, target = graph(mixing.patch_mixup, COUNT, size=size, patch=patch)(images, labels)
    other = partners(labels, target)
    assert (target.kind == 3).all() and not target.box.any()
    for i, pieces in enumerate(cut(mixed, patch)):
        own, theirs = float(images[i, 0, 0, 0]), float(images[other[i], 0, 0, 0])
        values = pieces.reshape(6, -1)
        assert (values == values[:, :1]).all()  # one weight per patch
        if abs(theirs - own) > 150:
            weights = (values[:, 0] - own) / (theirs - own)
            np.testing.assert_allclose(target.lam0[i], weights.mean(), atol=0.5 / abs(theirs - own) + 1e-6)
            all_weights.extend(weights)
    assert len(all_weights) > 60 and len(np.unique(np.round(all_weights, 2))) > 30
    assert abs(np.mean(all_weights) - 0.5) < 0.12 and abs(np.var(all_weights) - 1 / 12) < 0.04  # Beta(1, 1)


# --- SaliencyMix


@pytest.mark.parametrize("point", [(10, 20), (25, 9), (16, 40)])
def test_the_most_salient_point_is_the_only_object(point):
    pytest.importorskip("cv2")
    image = np.full((64, 64, 3), 40, np.uint8)
    image[point] = 255
    assert mixing.most_salient(image) == point


def test_saliencymix_pastes_around_the_partners_point(monkeypatch):
    images, labels = plain_images((10, 20), 6)
    points = {3 * k: (k, 2 * k) for k in range(6)}
    monkeypatch.setattr(mixing, "most_salient", lambda image: points[int(image[0, 0, 0])])
    mixed, target = mixing.saliency_mix(images, labels, np.random.default_rng(1))
    other = partners(labels, target)
    drawn = np.random.default_rng(1)
    drawn.permutation(6)
    for i, lam in enumerate(drawn.beta(1, 1, 6)):
        (cy, cx), height, width = points[3 * other[i]], int(10 * lam**0.5), int(20 * lam**0.5)
        y0, x0 = cy - height // 2, cx - width // 2
        box = max(y0, 0), max(x0, 0), min(y0 + height, 10), min(x0 + width, 20)
        assert tuple(target.box[i]) == box
        inside = mixed[i, ..., 0] == 3 * other[i]
        assert inside.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert inside[box[0] : box[2], box[1] : box[3]].all()
        np.testing.assert_array_equal(mixed[i][~inside], images[i][~inside])
        np.testing.assert_allclose(target.lam0[i], inside.mean(), rtol=1e-6)
    types = ["int64", "int64", "float32", "int32", "int32", "int64"]
    assert [np.asarray(field).dtype.name for field in target] == types


# --- TransMix


def boxes(*rows, kind=2):
    box = torch.tensor(rows, dtype=torch.int32)
    lam0 = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).float() / 64
    n = len(rows)
    return MixTarget(
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n, dtype=torch.int64),
        lam0,
        box,
        torch.full((n,), kind, dtype=torch.int32),
        torch.zeros(n, dtype=torch.int64),
    )


def test_transmix_equals_a_loop_in_numpy():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 9, (50, 2, 2)), axis=1).reshape(50, 4)
    target, attention = boxes(*corners.tolist()), rng.random((50, 9)).astype(np.float32)
    found = mixing.transmix(target, torch.from_numpy(attention), (8, 8)).lam0
    for i, (y0, x0, y1, x1) in enumerate(corners):
        near = [(int(r * 8 / 3), int(c * 8 / 3)) for r in range(3) for c in range(3)]
        share = sum(a for a, (r, c) in zip(attention[i], near, strict=True) if y0 <= r < y1 and x0 <= c < x1)
        expected = ((y1 - y0) * (x1 - x0) / 64 + share / attention[i].sum()) / 2
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-7)


def test_class_attention_is_the_last_blocks():
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    images = torch.randn(2, 3, 16, 16)
    fused = model(images)
    attention = mixing.class_attention(model)
    torch.testing.assert_close(model(images), fused)  # keeping the attention changes nothing

    model.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    seen: list = []
    model(images)
    block = model.blocks[-1]
    with torch.no_grad():
        q, k, _ = block.attn.qkv(block.norm1(seen[0])).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = np.exp(np.einsum("bhd,bhnd->bhn", q[:, :, 0].numpy(), k.numpy()) / 2)
    expected = (weights / weights.sum(-1, keepdims=True))[..., 1:].mean(1)
    found = attention()
    assert not found.requires_grad
    np.testing.assert_allclose(found, expected, rtol=1e-5)
