"""What timm's train.py needs from its loaders and gets from this one: epochs, switches, every sample."""

from types import SimpleNamespace

import pytest
import torch
from images import colour_folder, ramp_samples
from torch import nn

from lumix_dali import LUMixLoss, MixTarget, create_loader

task = pytest.importorskip("timm.task", reason="this timm has no training tasks")
evaluator = pytest.importorskip("timm.task.evaluator", reason="this timm has no evaluators")

SIZE = (12, 18)
ARGS = {"batch_size": 3, "input_size": SIZE, "device": "cpu", "num_threads": 1}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """20 images, one class each."""
    return ramp_samples(tmp_path_factory.mktemp("ramps"), 20)


def training(samples):
    return create_loader(samples, **ARGS, mixup_alpha=0.8, cutmix_alpha=1.0, seed=5)


def stream(loader):
    return [(images.clone(), MixTarget(*(field.clone() for field in target))) for images, target in loader]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b)
        for our, their in zip(ours, theirs, strict=True)
        for a, b in zip((our[0], *our[1]), (their[0], *their[1]), strict=True)
    )


def set_epoch_1_0_11(loader, epoch):
    """Sets it on the data set or sampler, as train.py does up to 1.0.28."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    elif hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)


def set_epoch_1_0_29(loader, epoch):
    """Sets it on the data set and on the first sampler that supports it; both must exist."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    first = next(part for part in (loader.batch_sampler, loader.sampler) if hasattr(part, "set_epoch"))
    first.set_epoch(epoch)


@pytest.mark.parametrize("set_epoch", [set_epoch_1_0_11, set_epoch_1_0_29])
def test_a_run_resumed_at_epoch_2_sees_epoch_2(set_epoch, samples):
    with training(samples) as whole, training(samples) as resumed:
        epochs = [stream(whole) for _ in range(4)]
        for epoch in (2, 3):
            set_epoch(resumed, epoch)
            assert same(stream(resumed), epochs[epoch])
    assert not same(epochs[2], epochs[3])


def train_one_epoch(job, loader, optimizer, args, epoch):
    """The calls that train.py makes on loader, images and target; returns the number of updates and all kinds."""
    if args.off_epoch and epoch >= args.off_epoch and args.prefetcher and loader.mixup_enabled:
        loader.mixup_enabled = False
    steps, last = args.accum, len(loader) - 1
    rest = len(loader) % steps
    updates, kinds = 0, []
    for index, (images, target) in enumerate(loader):
        if index >= len(loader) - rest:
            steps = rest
        if not args.prefetcher:
            images, target = images.to(device=job.device, dtype=None), target.to(device=job.device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        (job(images, target)["loss"] / steps).backward()
        kinds += target.kind.tolist()
        if index == last or (index + 1) % args.accum == 0:
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    return updates, kinds


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 20))


@pytest.mark.parametrize("prefetcher", [True, False])
def test_train_one_epoch(prefetcher, samples):
    """Six batches in updates of four and two give the weights of plain steps over the same batches, concatenated."""
    args = SimpleNamespace(off_epoch=1, prefetcher=prefetcher, channels_last=not prefetcher, accum=4)
    model, whole, criterion = linear(), linear(), LUMixLoss(0.0, 0.5)  # without λ_r, which is drawn
    job = task.ClassificationTask(model, criterion, device=torch.device("cpu"), verbose=False)
    optimizer, plain = (torch.optim.SGD(each.parameters(), 0.1) for each in (model, whole))
    with training(samples) as loader, training(samples) as again:
        assert train_one_epoch(job, loader, optimizer, args, 0)[0] == 2
        batches = stream(again)
        assert len(loader) == len(batches) == 6  # of 20 images
        for group in (batches[:4], batches[4:]):
            images = torch.cat([each[0] for each in group])
            target = MixTarget(*(torch.cat(fields) for fields in zip(*(each[1] for each in group), strict=True)))
            plain.zero_grad()
            criterion(whole(images), target).backward()
            plain.step()
        torch.testing.assert_close(model.state_dict(), whole.state_dict())
        _, kinds = train_one_epoch(job, loader, optimizer, args, 1)
        assert (set(kinds) == {0}) == prefetcher  # without it, train.py would switch off its own Mixup


def test_a_target_without_mixing_gives_plain_cross_entropy(samples):
    """After --mixup-off-epoch; the images are those of the order."""
    with training(samples) as loader:
        loader.mixup_enabled = False
        for images, target in loader:
            logits = linear()(images)
            expected = nn.functional.cross_entropy(logits, target.labels, label_smoothing=0.1)
            torch.testing.assert_close(LUMixLoss()(logits, target), expected)


class Nearest(nn.Module):
    """Knows each class's colours: its top class is right if image and label match."""

    def __init__(self, colours, labels):
        super().__init__()
        self.colours, self.labels = torch.tensor(colours) / 255, labels

    def forward(self, images):
        found = (images.mean((2, 3))[:, None] - self.colours).square().sum(2).argmin(1)
        return 10.0 * nn.functional.one_hot(self.labels[found], 8).float()


def test_validate(tmp_path):
    """Every sample counts once, although the last batch is short: loss and accuracies are known in advance."""
    colours, labels = colour_folder(tmp_path, 24), torch.arange(24) // 3
    wrong = labels.clone()
    wrong[:5] = 7  # images 0 to 4 get another class's label
    job = task.ClassificationTask(Nearest(colours, wrong), device=torch.device("cpu"), verbose=False)
    grey = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    with create_loader(tmp_path, **ARGS | {"batch_size": 7}, is_training=False, **grey) as loader:
        counted = job.create_evaluator(max_samples=evaluator.evaluation_sample_limit(loader))
        for index, (images, target) in enumerate(loader):
            last = index == len(loader) - 1
            target = target.to(device=job.device)
            counted.update(job.get_eval_model()(images), target[0 : target.size(0) : 1])
        assert last
    found = counted.compute()
    right = torch.log(torch.exp(torch.tensor(10.0)) + 7) - 10
    assert counted.num_samples == 24
    assert found["top1"] == pytest.approx(100 * 19 / 24)
    assert found["loss"] == pytest.approx(right.item() + 10 * 5 / 24, rel=1e-5)
