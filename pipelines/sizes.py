"""The image size of each training epoch, drawn by timm's sampler for `--train-img-sizes`.

timm draws a size per batch. A DALI pipeline has a fixed size, so it is drawn once per epoch here, with the same
probabilities (`timm.data.scheduled_sampler`, timm >= 1.0.31).
"""

import argparse


def check_sizes(args: argparse.Namespace) -> None:
    """Checks that timm's sampler accepts the schedule.

    Raises:
        ValueError: the flags are inconsistent, or this version of timm has no schedules.
    """
    if args.train_img_sizes:
        size_of_epoch(args, 0)


def size_of_epoch(args: argparse.Namespace, epoch: int) -> int | None:
    """Side of the training images in `epoch`, the same on all ranks; None without `--train-img-sizes`."""
    sizes = args.train_img_sizes
    if not sizes:
        return None
    try:
        from timm.data.scheduled_sampler import ScheduledBatchSampler

        sampler = ScheduledBatchSampler(
            range(1),  # type: ignore[arg-type]  # one batch of one sample: only its size is used
            [1] * len(sizes),
            args.train_size_probs,
            args.seed,
            num_batches=1,
            choice_schedule=args.train_size_schedule,
            schedule_epochs=args.epochs,
            schedule_spread=args.train_size_schedule_spread,
            schedule_random_mix=args.train_size_random_mix,
        )
    except ImportError as error:
        raise ValueError("--train-img-sizes: requires timm >= 1.0.31; upgrade timm, or leave it out") from error
    except ValueError as error:
        raise ValueError(f"--train-img-sizes {' '.join(map(str, sizes))}: {error}") from error
    sampler.epoch = epoch
    ((choice, _),) = sampler.schedule
    return int(sizes[choice])
