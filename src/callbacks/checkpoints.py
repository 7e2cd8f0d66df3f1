"""Saving the adapter while it trains."""

import pytorch_lightning as pl
import torch

from src.callbacks.base import RunContext, StepCallback, TrainingDiverged
from src.checkpoint import META_KEY
from src.ranks.place import local_part


class SaveAdapter(StepCallback):
    """A checkpoint every `every_images` images and at the end; the `keep` newest stay.

    A new one is written and read back before an old one goes. Weights that are not finite are never saved.
    """

    def __init__(self, every_images: int, keep: int, *, run: RunContext):
        super().__init__(run)
        self.every_images, self.keep = every_images, keep
        self.root = run.folder / "checkpoints"

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        if images_seen // self.every_images > (images_seen - self.run.effective_batch) // self.every_images:
            self.save(trainer, adapter)

    def on_train_end(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        self.save(trainer, adapter)

    def save(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        """Write a checkpoint of the present step, unless it is there already."""
        target = self.root / f"images-{trainer.global_step * self.run.effective_batch:09d}"
        if self.run.ranks.agree(target.exists()):  # each may look at another moment
            return
        bad = [name for name, p in adapter.named_parameters() if not torch.isfinite(local_part(p)).all()]
        if self.run.ranks.any(bool(bad)):
            name = next(some[0] for some in self.run.ranks.gather(bad[:1]) if some)
            raise TrainingDiverged(
                f"{name} is not finite at step {trainer.global_step}; the last good checkpoint stays: {self.root}"
            )
        trainer.save_checkpoint(target)
        if not self.run.ranks.first:
            return
        others = sorted(p for p in self.root.glob("images-*") if p != target)
        for old in others[: max(0, len(others) - self.keep + 1)]:
            trainer.strategy.remove_checkpoint(old)

    def on_save_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        images = trainer.global_step * self.run.effective_batch
        checkpoint[META_KEY] = {**self.run.meta, "images_seen": images, "optimizer_steps": trainer.global_step}

    def on_load_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        # The trainer saves in the middle of a batch, as it counts them; the loader starts at the next image. Its batch
        # counters are set to what was learned from, in micro-batches of the present size, so that accumulation starts
        # at a boundary even if the hardware has changed.
        batches = checkpoint[META_KEY]["images_seen"] // self.run.effective_batch * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counters in (progress["current"], progress["total"]):
            for name in counters:
                counters[name] = batches
