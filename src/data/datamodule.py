"""Training and validation batches from the caches, in an order that is a pure function of (seed, position).

Position n counts images since the start of training. It decides epoch and image, noise, t and caption dropout, so any
micro-batch, worker count or resume sees the same images with the same draws, and so does every other method.
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src import rng
from src.data.cache import TensorStore
from src.data.order import StreamOrder
from src.types import Batch, TextCond


@dataclass(frozen=True)
class Stores:
    """The cached rows of one split. ids, captions: one per row; empty_text: the encoded empty prompt.

    zero_conditions: (1, ...) the encoded black picture, one per image size; it stands in for every condition of a
    no-control arm. buckets: the rows of each image size, where there are several.
    """

    ids: list[str]
    captions: list[str]
    latents: TensorStore
    text: TensorStore
    conditions: TensorStore
    empty_text: TextCond
    zero_conditions: tuple[Tensor, ...]
    buckets: tuple[np.ndarray, ...] = ()

    def text_rows(self, rows: list[int]) -> TextCond:
        return TextCond.of({name: self.text.rows(name, rows).float() for name in self.empty_text.fields()})

    def condition_rows(self, rows: list[int]) -> Tensor:
        """In the adapter's condition space, float32; pictures are stored as bytes."""
        stored = self.conditions.rows("condition", rows)
        return stored if stored.dtype.is_floating_point else stored.float() / 255

    def zero_rows(self, rows: list[int]) -> Tensor:
        """The black picture's condition for rows of one size."""
        size = next((n for n, bucket in enumerate(self.buckets) if rows[0] in bucket), 0)
        zero = self.zero_conditions[size]
        return zero.expand(len(rows), *zero.shape[1:])


class ImageStream(Dataset):
    """Positions of the training stream -> a `Batch`.

    stores: training rows; seed: of the run; caption_dropout: share of images whose caption is replaced by the empty
    prompt, drawn per position; with_condition: False replaces every condition by the black picture's; effective_batch: images
    per optimizer step, which are all of one size.
    stream: name of the random stream; held-out data has its own, so that its draws never change.
    """

    def __init__(
        self,
        stores: Stores,
        seed: int,
        caption_dropout: float,
        with_condition: bool = True,
        stream: str = "train",
        effective_batch: int = 1,
    ):
        self.stores, self.seed, self.caption_dropout = stores, seed, caption_dropout
        self.with_condition, self.stream = with_condition, stream
        self._order = StreamOrder(seed, stores.buckets or [np.arange(len(stores.ids))], effective_batch)

    def row(self, position: int) -> int:
        """The data row at a position: `StreamOrder`'s; the plain order for held-out data."""
        return self._order.row(position) if self.stream == "train" else position % len(self.stores.ids)

    def __getitems__(self, positions: list[int]) -> Batch:
        rows = [self.row(n) for n in positions]
        latents = self.stores.latents.rows("latents", rows)
        text = self.stores.text_rows(rows)
        dropped = rng.uniform(self.seed, f"{self.stream}-caption", positions) < self.caption_dropout
        text = text.where(~dropped, self.stores.empty_text)
        condition = self.stores.condition_rows(rows) if self.with_condition else self.stores.zero_rows(rows)
        return Batch(
            index=list(positions),
            ids=[self.stores.ids[r] for r in rows],
            latents_BCHW=latents,
            noise_BCHW=rng.normal(self.seed, f"{self.stream}-noise", positions, tuple(latents.shape[1:])),
            uniform_B=rng.uniform(self.seed, f"{self.stream}-t", positions),
            text=text,
            condition=condition,
        )


class PositionSampler:
    """Lists of positions, one per micro-batch, from `start` to `stop`. Its length is that of the whole run: the trainer
    counts batches from the beginning, also after a resume.

    rank, ranks: this process among those that train together; each takes its own, equal part of every optimizer step of
    `step` images, so that together they see what one process would.
    """

    def __init__(self, start: int, stop: int, micro_batch: int, rank: int = 0, ranks: int = 1, step: int = 0):
        self.start, self.stop, self.micro_batch = start, stop, micro_batch
        self.rank, self.ranks, self.step = rank, ranks, step

    def __iter__(self):
        if self.ranks == 1:
            yield from self._cut(self.start, self.stop)
            return
        share = self.step // self.ranks
        for first in range(self.start, self.stop, self.step):
            yield from self._cut(first + self.rank * share, first + (self.rank + 1) * share)

    def __len__(self) -> int:
        return -(-self.stop // (self.micro_batch * self.ranks))

    def _cut(self, start: int, stop: int):
        for first in range(start, stop, self.micro_batch):
            yield list(range(first, min(first + self.micro_batch, stop)))


class ControlData(pl.LightningDataModule):
    """train and val streams as loaders.

    total_images: length of the training stream (a whole number of optimizer steps); start: images already seen;
    micro_batch, workers: speed only. val_images: how many held-out rows the validation loss reads. waited_s: seconds that
    training has waited for its next batch so far. rank, ranks, step: see `PositionSampler`.
    """

    rank, ranks, step = 0, 1, 0

    def __init__(
        self, train: ImageStream, val: ImageStream, total_images: int, micro_batch: int, workers: int, val_images: int
    ):
        super().__init__()
        self.train_stream, self.val_stream = train, val
        self.total_images, self.micro_batch, self.workers, self.val_images = total_images, micro_batch, workers, val_images
        self.start = 0
        self.waited_s = 0.0

    def train_dataloader(self) -> "TimedLoader":
        among = (self.rank, self.ranks, self.step)
        positions = PositionSampler(self.start, self.total_images, self.micro_batch, *among)
        return TimedLoader(self._loader(self.train_stream, positions, self.workers), self)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_stream, PositionSampler(0, self.val_images, self.micro_batch), 0)

    def _loader(self, stream: ImageStream, positions: PositionSampler, workers: int) -> DataLoader:
        return DataLoader(
            stream,
            batch_sampler=positions,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_alone if workers else None,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch


class TimedLoader:
    """A loader that adds up in `clock.waited_s` how long it lets others wait."""

    def __init__(self, loader: DataLoader, clock: ControlData):
        self.loader, self.clock = loader, clock

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        began = time.perf_counter()
        for batch in self.loader:
            self.clock.waited_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()


def _leave_signals_alone(_worker: int) -> None:
    """What asks a whole process group to end is for the training to answer: it still wants its batches."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
