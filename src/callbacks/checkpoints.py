"""Saving the adapter while it trains."""

import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from src.callbacks.base import RunContext, StepCallback, TrainingDiverged
from src.callbacks.guard import StepGuard
from src.checkpoint import META_KEY, CheckpointError, NotSaved, verify
from src.faults import free_memory, kind_of
from src.ranks.place import local_part
from src.types import UserError


class SaveAdapter(StepCallback):
    """A checkpoint every `every_images` images and at the end; the `keep` newest stay.

    A new one is written and read back before an old one goes. Weights that are not finite are never saved. Where the disk
    has no room, the run goes on with the last good one, and tries again after `retry_seconds`.
    """

    def __init__(self, every_images: int, keep: int, retry_seconds: float, *, run: RunContext):
        super().__init__(run)
        self.every_images, self.keep, self.retry_seconds = every_images, keep, retry_seconds
        self.root = run.folder / "checkpoints"
        self._failed_at: float | None = None

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        due = images_seen // self.every_images > (images_seen - self.run.effective_batch) // self.every_images
        if due or (self._failed_at is not None and self._tries_again(self._failed_at)):
            self.save(trainer, adapter)

    def _tries_again(self, failed_at: float) -> bool:
        return self.run.ranks.agree(time.monotonic() - failed_at >= self.retry_seconds)

    def on_train_end(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        if not self.save(trainer, adapter):
            raise UserError(
                f"the last checkpoint cannot be written to {self.root}; free some space and go on from the one before: "
                f"python -m src.train resume={self.run.root}"
            )

    def on_exception(self, trainer: pl.Trainer, adapter: pl.LightningModule, exception: BaseException) -> None:
        """Save what is whole where a run can go on: after the last optimizer step, and not in the middle of one. Of several
        ranks one alone cannot save; those go on from the last checkpoint."""
        guard = next(c for c in trainer.callbacks if isinstance(c, StepGuard))
        if kind_of(exception) is None or guard.stepping or not trainer.global_step or self.run.ranks.several:
            return
        free_memory(exception)
        adapter.zero_grad(set_to_none=True)
        self.save(trainer, adapter)

    def save(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> bool:
        """Write a checkpoint of the present step, unless it is there already. -> whether it is there now."""
        images_seen = trainer.global_step * self.run.effective_batch
        target = self.root / f"images-{images_seen:09d}"
        if self.run.ranks.agree(target.exists() and _whole(target)):  # each may look at another moment
            return True
        self._refuse_broken(trainer.global_step, images_seen, adapter)
        began = time.monotonic()
        try:
            trainer.save_checkpoint(target)
        except NotSaved as error:
            self._failed_at = time.monotonic()
            self.run.events.note("not_saved", images_seen, why=str(error))
            self.run.say(
                f"checkpoint not saved, {error}; the last good one stays, and it is tried again after {self.retry_seconds:g} s"
            )
            return False
        self._failed_at = None
        if not self.run.ranks.first:
            return True
        self.run.events.note("saved", images_seen, seconds=round(time.monotonic() - began, 3), checkpoint=target.name)
        others = sorted(p for p in self.root.glob("images-*") if p != target)
        for old in others[: max(0, len(others) - self.keep + 1)]:
            trainer.strategy.remove_checkpoint(old)
        return True

    def _refuse_broken(self, step: int, images_seen: int, adapter: pl.LightningModule) -> None:
        """Raises TrainingDiverged on all ranks where a weight of one is not finite."""
        bad = [name for name, p in adapter.named_parameters() if not torch.isfinite(local_part(p)).all()]
        if not self.run.ranks.any(bool(bad)):
            return
        name = next(some[0] for some in self.run.ranks.gather(bad[:1]) if some)
        self.run.events.note("fault", images_seen, kind="weights not finite", parameter=name)
        raise TrainingDiverged(f"{name} is not finite at step {step}; the last good checkpoint stays: {self.root}")

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


def _whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True
