"""What callbacks share: the run they serve, and a hook that fires once per optimizer step."""

from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl

from src.control_score import HeldOut
from src.data.datamodule import ControlData
from src.events import Events, Heart
from src.ranks.place import ALONE, Ranks
from src.types import UserError


@dataclass
class Stop:
    """Whether an end was asked for; one for all who train together. requested: the signal, or the key, that asked.

    at_step: the number of optimizer steps after which the first of them left, and the others must.
    """

    requested: str | None = None
    at_step: int | None = None


@dataclass
class RunContext:
    """One training run as its callbacks see it.

    root: the run's own folder; folder: the same, or an arm's below it;
    meta: identity for checkpoints (adapter, backbone, backbone_hash, config_sha); loggers: see `src.loggers`;
    with_condition: False in a no-control arm, which is shown black pictures only;
    validation: how often and how much; label: what to call it where several train together; heart: a callback sets how
    often it beats; ranks: the processes that train it, each with a device.
    """

    root: Path
    folder: Path
    effective_batch: int
    total_images: int
    stop_at_images: int | None
    with_condition: bool
    data: ControlData
    held: HeldOut
    validation: dict
    ema_decay: float
    meta: dict
    loggers: list
    stop: Stop = field(default_factory=Stop)
    label: str = ""
    ranks: Ranks = ALONE
    scores: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        arm = "" if self.folder == self.root else self.folder.name
        self.events = Events(self.root, arm, writes=self.ranks.first)
        self.heart = Heart(self.root, writes=self.ranks.first)

    def say(self, line: str) -> None:
        """Print a line, with the label in front where several train together."""
        print(f"{self.label}: {line}" if self.label else line, flush=True)

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Scalars to every logger; the x axis is images seen."""
        for logger in self.loggers:
            logger.log_metrics({**values, "images_seen": images_seen}, step=images_seen)


class Preempted(Exception):
    """The run was asked to end and has saved itself. folder: of the run; by_signal: False for budget.stop_at_images.

    saved: False where the disk had no room: the checkpoint before is what it goes on from.
    """

    def __init__(self, reason: str, folder: Path, by_signal: bool, saved: bool = True):
        super().__init__(reason)
        self.folder, self.by_signal, self.saved = folder, by_signal, saved


class TrainingDiverged(UserError):
    """Losses, gradients or weights are not finite; nothing was saved after it."""


class StepCallback(pl.Callback):
    """Calls `on_step` after each optimizer step, whatever the accumulation.

    injected: constructor arguments that the build gives and no configuration may.
    """

    injected = ("run",)

    def __init__(self, run: RunContext):
        self.run = run
        self._last = 0

    def on_train_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, adapter: pl.LightningModule, *_) -> None:
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            self.on_step(trainer, adapter, trainer.global_step * self.run.effective_batch)

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        """images_seen: images whose gradients are in the weights."""
