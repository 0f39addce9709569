"""The loader and the loss in Accelerate, with validation after every epoch and resuming within an epoch.

    python -m examples.with_accelerate data/digits
    accelerate launch --num_processes 8 -m examples.with_accelerate data/digits --resume runs/accelerate

Only the model and the optimiser go through `Accelerator.prepare`; the loader handles ranks and device itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from lumix_dali import LUMixLoss, create_loader


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains and returns the losses of this process's steps."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.with_accelerate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--output", default="runs/accelerate")
    parser.add_argument("--resume", metavar="DIR")
    args = parser.parse_args(argv)
    accelerator = Accelerator()
    set_seed(0, device_specific=True)  # 0 + rank, else all ranks draw the same λ_r
    common = dict(
        batch_size=64,
        input_size=32,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader = create_loader(f"{args.root}/train", cutmix_alpha=1.0, **common)
    val_loader = create_loader(f"{args.root}/val", classes=loader.classes, is_training=False, **common)
    model = timm.create_model(args.model, num_classes=loader.num_classes)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05))
    criterion, losses, step = LUMixLoss(), [], 0
    # Not register_for_checkpointing, which saves only rank 0's position; the other ranks are at different images.
    position = f"loader_{accelerator.process_index}.pt"
    if args.resume:
        accelerator.load_state(args.resume)
        state = torch.load(Path(args.resume, position), weights_only=True)
        loader.load_state_dict(state["loader"])
        step = state["step"]
    while step < args.epochs * len(loader):
        for images, target in loader:  # a resumed loader yields the rest of its epoch first
            loss = criterion(model(images), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step % args.save_every == 0:
                accelerator.save_state(args.output)
                torch.save({"step": step, "loader": loader.state_dict()}, Path(args.output, position))
        recent = losses[-len(loader) :]
        top1 = accuracy(accelerator, model, val_loader)
        accelerator.print(f"step {step:6}  loss {sum(recent) / len(recent):.4f}  top-1 {top1:.2%}")
    return losses


@torch.inference_mode()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> float:
    """Share of correct predictions over all ranks; a rank may have one batch fewer or empty ones."""
    model.eval()
    hits = torch.zeros((), device=accelerator.device)
    for images, labels in loader:
        hits += (accelerator.unwrap_model(model)(images).argmax(1) == labels).sum()
    model.train()
    return accelerator.reduce(hits).item() / len(loader.dataset)


if __name__ == "__main__":
    main()
