"""The loader and the loss in Lightning, with validation after every epoch and resuming within an epoch.

python -m examples.with_lightning data/digits
python -m examples.with_lightning data/digits --devices 8 --resume runs/lightning/last.ckpt
"""

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import timm
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.classification import MulticlassAccuracy

from lumix_dali import LUMixLoss, MixTarget, create_loader
from lumix_dali.data.sources import load_files


class Classifier(lightning.LightningModule):
    """A timm model, trained on root/train with CutMix and LUMix, validated on root/val."""

    def __init__(self, root: str, model: str = "resnet10t", size: int = 32, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()
        self.train_data = load_files(f"{root}/train")
        self.val_data = load_files(f"{root}/val", classes=self.train_data.classes)
        self.model = timm.create_model(model, num_classes=len(self.train_data.classes))
        self.criterion = LUMixLoss()
        self.top1 = MulticlassAccuracy(len(self.train_data.classes), average="micro")

    def loader(self, samples: Any, **options: Any) -> Any:
        """One loader per rank; Lightning sets its epoch, and adds a distributed sampler only to a DataLoader."""
        return create_loader(
            samples,
            batch_size=self.hparams["batch_size"],
            input_size=self.hparams["size"],
            device=self.trainer.strategy.root_device,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            **options,
        )

    def train_dataloader(self) -> Any:
        return self.loader(self.train_data, cutmix_alpha=1.0)

    def val_dataloader(self) -> Any:
        return self.loader(self.val_data, is_training=False)

    def on_fit_start(self) -> None:
        torch.manual_seed(self.global_rank)  # else all ranks draw the same λ_r

    def training_step(self, batch: tuple[torch.Tensor, MixTarget], index: int) -> torch.Tensor:
        images, target = batch
        return self.criterion(self.model(images), target)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        images, labels = batch
        self.top1(self.model(images), labels)
        self.log("top1", self.top1, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)

    # Lightning saves the loader's position only for rank 0; the other ranks are at different images.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        loader: Any = self.trainer.train_dataloader
        positions = [loader.state_dict()] * self.trainer.world_size
        if dist.is_initialized():
            dist.all_gather_object(positions, loader.state_dict())
        checkpoint["loaders"] = positions

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        position = checkpoint["loaders"][self.global_rank]
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [position]


def main(argv: Sequence[str] | None = None) -> lightning.Trainer:
    """Trains and returns the trainer."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.with_lightning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--output", default="runs/lightning")
    parser.add_argument("--resume", metavar="CKPT")
    args = parser.parse_args(argv)
    lightning.seed_everything(0)
    saver = ModelCheckpoint(args.output, every_n_train_steps=args.save_every, save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        accelerator=args.accelerator, devices=args.devices, max_epochs=args.epochs, callbacks=saver, logger=False
    )
    trainer.fit(Classifier(args.root, args.model), ckpt_path=args.resume)
    return trainer


if __name__ == "__main__":
    main()
