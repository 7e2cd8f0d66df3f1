"""Noised images that come again: several optimizer steps on one batch, a fixed number of draws per image, and the frozen
features of those draws on disk.

The frozen features of (image, noise, t, caption) depend on nothing that trains, so they can be kept wherever these come
again. In ordinary training they do not; both ways to make them do change what is learned from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.data.cache import TensorStore, blocks_to_do, check_space
from src.data.datamodule import ControlData, ImageStream, TimedLoader
from src.data.stores import _Filling, _Progress, _split
from src.types import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class StreamBatch(Batch):
    """A micro-batch that knows more. states: its frozen features by name, where they were kept; following: the batch that
    comes next, still where the loader left it, for whoever works ahead."""

    states: dict[str, Tensor] | None = None
    following: Batch | None = None

    def to(self, device: torch.device) -> "StreamBatch":
        states = None if self.states is None else {name: t.to(device) for name, t in self.states.items()}
        return replace(super().to(device), states=states)


class RepeatingStream(ImageStream):
    """The training stream with repetition. Which image is learned from when, and with which draw, stays a pure function of
    the position, so that a resumed run sees what an uninterrupted one would.

    reuse: optimizer steps in a row that learn from one batch; all of them count as images seen. draws: None for a new draw
    of noise, t and caption each time an image comes; or so many fixed ones per image, which take turns, epoch by epoch.
    `Batch.index` then names the draw: row x draws + number. features: a store with a row for each draw, in that order.
    The rest: see `ImageStream`.
    """

    def __init__(
        self, *stream: Any, reuse: int = 1, draws: int | None = None, features: TensorStore | None = None, **more: Any
    ):
        super().__init__(*stream, **more)
        self.reuse, self.draws, self.features = reuse, draws, features
        self.stream = "train" if draws is None else "draw"

    def drawn(self, position: int) -> int:
        """The position, or the draw, whose noise, t and caption are seen at a position."""
        step, within = divmod(position, self._order.batch)
        first = step // self.reuse * self._order.batch + within
        if self.draws is None:
            return first
        return self._order.row(first) * self.draws + first // self._order.epoch_length % self.draws

    def row(self, position: int) -> int:
        return super().row(position) if self.draws is None else position // self.draws

    def __getitems__(self, positions: list[int]) -> StreamBatch:
        return self.of([self.drawn(n) for n in positions], self.features)

    def of(self, drawn: list[int], features: "FeatureStore | None" = None) -> StreamBatch:
        """The batch of some results of `drawn`, with their frozen features if there is a store of them."""
        states = None if features is None else {name: features.rows(name, drawn) for name in features.names()}
        return StreamBatch(**vars(super().__getitems__(drawn)), states=states)


class FeatureStore(TensorStore):
    """A store whose rows have as many tensors as a frozen pass keeps."""

    def names(self) -> list[str]:
        """The tensors of a row."""
        return sorted(self._opened(0).keys())


def fill_features(
    store: FeatureStore,
    stream: RepeatingStream,
    compute: Callable[[StreamBatch], dict[str, Tensor]],
    dtype: torch.dtype,
    batch: int,
    say: Callable[[str], None],
) -> None:
    """Compute what is missing of the frozen features of every draw; bytes are told before the first is computed.

    compute: a batch on the CPU -> its features. batch: how many at once, the micro-batch of the training, so that sums are
    taken in the same shapes. Processes that want the same store share the work. Raises UserError if the disk has no room.
    """
    check_space([store], store.folder.parent, say)
    progress = _Progress("frozen features", store.count, say)
    try:
        for block, (wanted,) in blocks_to_do([store], say):
            filling = _Filling(wanted, block)
            for shard in filling.missing:
                for rows in _split(shard, batch):
                    made = compute(stream.of(list(rows)))
                    filling.add(rows, {name: t.to("cpu", dtype) for name, t in made.items()})
                    progress.add(len(rows))
    finally:
        store.locks.close()


class WithFollowing:
    """A loader of `StreamBatch`es each of which is told the one that follows."""

    def __init__(self, loader: TimedLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[StreamBatch]:
        present = None
        for batch in self.loader:
            if present is not None:
                present.following = batch
                yield present
            present = batch
        if present is not None:
            yield present


class AheadData(ControlData):
    """`ControlData` whose training batches know the one that follows."""

    def train_dataloader(self) -> WithFollowing:
        return WithFollowing(super().train_dataloader())
