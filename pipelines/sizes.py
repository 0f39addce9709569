"""The image size of each training epoch: timm's `--train-img-sizes`, whose sampler draws it.

timm draws a size for every batch; a DALI pipeline has one size, so here it is drawn once per epoch, from the same
probabilities (`timm.data.scheduled_sampler`, timm >= 1.0.31).
"""

import argparse


def check_sizes(args: argparse.Namespace) -> None:
    """Refuses a schedule that timm's sampler refuses, naming the flag.

    Raises:
        ValueError: the flags do not fit together, or this timm has no schedules.
    """
    if args.train_img_sizes:
        size_of_epoch(args, 0)


def size_of_epoch(args: argparse.Namespace, epoch: int) -> int | None:
    """Side of the training images in `epoch`, alike on all ranks; None without `--train-img-sizes`."""
    sizes = args.train_img_sizes
    if not sizes:
        return None
    try:
        from timm.data.scheduled_sampler import ScheduledBatchSampler

        sampler = ScheduledBatchSampler(
            range(1),  # type: ignore[arg-type]  # one batch of one sample: only its choice is of use
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
        raise ValueError("--train-img-sizes: it needs timm >= 1.0.31; upgrade timm, or leave it out") from error
    except ValueError as error:
        raise ValueError(f"--train-img-sizes {' '.join(map(str, sizes))}: {error}") from error
    sampler.epoch = epoch
    ((choice, _),) = sampler.schedule
    return int(sizes[choice])
