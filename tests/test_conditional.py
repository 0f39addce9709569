"""Graph functions in pipelines with and without conditionals, and the private names of DALI that they rest on."""

import inspect

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, pipeline_def, types

import lumix_dali.fn as mixfn
from lumix_dali import Mixing, augment, conditional

SIZE, COUNT = (16, 20), 6
MIXING = Mixing(mixup_alpha=0.8, prob=0.8)
IMAGES = list(np.random.default_rng(0).integers(0, 256, (COUNT, *SIZE, 3), np.uint8))


def number(value):
    return fn.constant(fdata=value, shape=[])


def laid(images, _):
    from lumix_dali import mixing

    drawn = mixing.draw(np.random.default_rng(0), COUNT, SIZE, MIXING)
    arrays = (*mixing.patches(drawn, SIZE), drawn.kind, np.where(drawn.kind == 1, drawn.weight, np.float32(1)))
    nodes = [fn.external_source(source=[array.astype(array.dtype)], cycle=True) for array in arrays]
    return mixfn.lay(images, *nodes, MIXING)


def pasted(images, _):
    return mixfn.paste(images, mixfn.draw(SIZE, Mixing()))


def mixed(function, **options):
    def call(images, labels):
        images, target = function(images, labels, **options)
        return images, *target

    return call


def applied(images, labels):
    images, target = mixfn.apply(images, labels, mixfn.draw(SIZE, MIXING), MIXING)
    return images, *target


def plain(function, *arguments):
    return lambda images, _: function(images, *(make() for make in arguments))


CALLS = {
    "fn.mix": mixed(mixfn.mix, mixup_alpha=0.8, prob=0.8),
    "fn.cutmix": mixed(mixfn.cutmix, prob=0.8),
    "fn.mixup": mixed(mixfn.mixup),
    "fn.unmixed": lambda _, labels: tuple(mixfn.unmixed(labels)),
    "fn.draw": lambda *_: tuple(mixfn.draw(SIZE, MIXING)),
    "fn.apply": applied,
    "fn.paste": pasted,
    "fn.lay": laid,
    "fn.box_lam0": lambda images, _: mixfn.box_lam0(images.shape(dtype=types.INT32), SIZE),
    "augment.rand_augment": lambda images, _: augment.rand_augment(images, "rand-m9-n2-p1-mstd0.5"),
    "augment.draw": lambda *_: augment.draw(augment.parse("rand-m9-mstd0.5")),
    "augment.warp": plain(
        lambda images, angle, pair: augment.warp(images, angle, pair, pair, fill=(0, 0, 0)),
        lambda: number(9.0),
        lambda: fn.constant(fdata=[0.1, 0.2]),
    ),
    "augment.color_jitter": lambda images, _: augment.color_jitter(images, (0.4, 0.4, 0.4, 0.1), prob=0.5),
    "augment.erase": lambda images, _: tuple(augment.erase(images, prob=0.5, mode=m) for m in augment.ERASE_MODES),
    "augment.region_of": lambda *_: augment.region_of(
        fn.constant(fdata=[16.0, 20.0]), fn.random.uniform(range=[0.0, 1.0], shape=[11, 3]), number(1.0)
    ),
    **{f"augment.{name}": plain(getattr(augment, name)) for name in ("invert", "auto_contrast", "equalize")},
    **{
        f"augment.{name}": plain(getattr(augment, name), lambda: number(2.0))
        for name in ("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "solarize_add")
    },
}
NO_GRAPH = {"augment.parse", "augment.jitter_of"}


def outputs(call, conditionals):
    @pipeline_def(batch_size=COUNT, num_threads=1, device_id=None, seed=5, enable_conditionals=conditionals)
    def define():
        images = fn.external_source(lambda: IMAGES, batch=True, layout="HWC")
        labels = fn.external_source(lambda: np.arange(COUNT), batch=True)
        return call(images, labels)

    pipe = define()
    pipe.build()
    return [[np.array(sample) for sample in output] for _ in range(2) for output in pipe.run()]


@pytest.mark.parametrize("name", CALLS)
def test_conditionals_change_nothing(name):
    without, with_them = (outputs(CALLS[name], conditionals) for conditionals in (False, True))
    assert without and len(without) == len(with_them)
    for ours, theirs in zip(without, with_them, strict=True):
        np.testing.assert_equal(ours, theirs)


def test_every_public_graph_function_is_called():
    public = {
        f"{module.__name__.rsplit('.')[-1]}.{name}"
        for module in (mixfn, augment)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - NO_GRAPH == set(CALLS)


def test_dali_still_splits_and_merges_as_an_if_does():
    """A canary for `lumix_dali.conditional`, which uses private names of DALI."""
    chosen = np.array([True, False, True, False, False, True])
    pipe = Pipeline(batch_size=COUNT, num_threads=1, device_id=None)
    with pipe:
        node = fn.external_source(lambda: np.arange(COUNT), batch=True)
        true, false = conditional.split(node, fn.external_source(lambda: chosen, batch=True))
        predicate = fn.external_source(lambda: chosen, batch=True)
        pipe.set_outputs(true, false, conditional.merge(true + 10, false, predicate))
    pipe.build()
    true, false, merged = ([int(np.array(sample)) for sample in output] for output in pipe.run())
    assert (true, false, merged) == ([0, 2, 5], [1, 3, 4], [10, 1, 12, 3, 4, 15])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_paste_moves_the_box_of_masks(dtype):
    """A mask whose pixels hold their sample and position shows what `paste` took from where."""
    masks = np.arange(COUNT * SIZE[0] * SIZE[1]).reshape(COUNT, *SIZE, 1).astype(dtype)
    pipe = Pipeline(batch_size=COUNT, num_threads=1, device_id=None, seed=3)
    with pipe:
        values = fn.external_source(lambda: list(masks), batch=True, layout="HWC")
        drawn = mixfn.draw(SIZE, MIXING)
        pipe.set_outputs(mixfn.paste(values, drawn), drawn.partner, drawn.box, drawn.kind)
    pipe.build()
    kinds = set()
    for _ in range(4):
        found, partner, box, kind = (np.array(output.as_array()) for output in pipe.run())
        wanted = masks.copy()
        for i, (y0, x0, y1, x1) in enumerate(box):
            wanted[i, y0:y1, x0:x1] = masks[partner[i], y0:y1, x0:x1]
        np.testing.assert_array_equal(found, wanted)
        kinds |= set(kind.tolist())
    assert kinds == {0, 1, 2}
