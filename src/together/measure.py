"""What a step costs per adapter when frozen passes are shared, used for several steps, kept, or made ahead.

The steps are those of a training: `training_step`, gradient clipping and optimizer of each adapter, with the same `Passes`
in front of them; only the loop around them is not Lightning's.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from src.adapters.base import ControlAdapter
from src.adapters.frozen import FrozenPass, Reads
from src.adapters.passes import Passes
from src.build import union_of
from src.data.feature_cache import StreamBatch
from src.profiling.tracker import StorageTracker
from src.types import Batch


@dataclass(frozen=True)
class SharedCost:
    """step_ms: of each timed round, the time of one optimizer step of one adapter (the round's, over adapters x reuse).

    peak_bytes: at most allocated, everything included (a GPU's allocator; on a CPU the bytes of live tensors, without the
    library's workspaces). pass_bytes: of the frozen features of a batch. passes: how many frozen passes a round made.
    """

    step_ms: tuple[float, ...]
    peak_bytes: int
    pass_bytes: int
    passes: float


class SharedSteps:
    """Adapters in training on frozen passes, a round at a time, each of one batch.

    adapters: made for training (with a recipe), on their device, all on one loaded backbone; they are changed. batch: on the
    CPU; every round sees the same images as if they were new. share: one pass for all, or one for each adapter; reuse:
    optimizer steps per pass; cached: features come with the batch, as from a cache that the loader has read, and are copied
    to the device within the time. overlap: the next round's pass is made while the present one goes backward.
    Optimizers, their state and passes made ahead live as long as this. Raises ValueError for a method that writes into the
    backbone.
    """

    def __init__(
        self,
        adapters: Sequence[ControlAdapter],
        batch: Batch,
        *,
        share: bool = True,
        reuse: int = 1,
        cached: bool = False,
        overlap: bool = False,
    ):
        union = union_of(adapters)
        if union is None:
            raise ValueError("a method that writes into the backbone has no frozen pass to share")
        self.adapters, self.batch, self.reuse, self.cached = adapters, batch, reuse, cached
        self.device, self.passes_made = adapters[0].device, 0
        with torch.no_grad(), adapters[0].autocast():
            whole = adapters[0].frozen_pass(batch.to(self.device), union)
        self.pass_bytes = sum(t.nbytes for t in whole.storages())
        self._states = {name: t.cpu() for name, t in whole.tensors().items()} if cached else None
        del whole
        self._waiting: list[weakref.ref[FrozenPass]] = []
        for group in [list(adapters)] if share else [[adapter] for adapter in adapters]:
            make = self._maker(group[0], union if share else group[0].reads())
            passes = Passes(make, len(group) * reuse, overlap=overlap and not cached, device=self.device)
            for adapter in group:
                adapter.passes = passes
        self.optimizers = [adapter.configure_optimizers()["optimizer"] for adapter in adapters]
        self._number = 0
        self._next = self._numbered()

    def _maker(self, adapter: ControlAdapter, reads: Reads) -> Callable[[Batch], FrozenPass]:
        def make(batch: Batch) -> FrozenPass:
            self.passes_made += not self.cached  # that of a cached batch is put together from what it brings
            frozen = adapter.frozen_pass(batch, reads)
            self._waiting = [*(ref for ref in self._waiting if ref() is not None), weakref.ref(frozen)]
            return frozen

        return make

    def _numbered(self) -> StreamBatch:
        """The batch as if it were the next one of the stream."""
        first = self._number * len(self.batch)
        self._number += 1
        own = replace(self.batch, index=list(range(first, first + len(self.batch))))
        return StreamBatch(**vars(own), states=self._states)

    def round(self) -> None:
        """One optimizer step of every adapter, as often as a pass is used."""
        present, self._next = self._next, self._numbered()
        present.following = self._next
        for _ in range(self.reuse):
            for adapter, optimizer in zip(self.adapters, self.optimizers, strict=True):
                _step(adapter, optimizer, present)

    def time(self, rounds: int = 1) -> float:
        """Milliseconds of one optimizer step of one adapter, over some rounds between which nobody waits for the device."""

        def play() -> None:
            for _ in range(rounds):
                self.round()

        return _timed(play, self.device) / (rounds * len(self.adapters) * self.reuse)

    def peak_bytes(self) -> int:
        """At most allocated in one more round, everything included (a GPU's allocator; on a CPU the bytes of live tensors,
        without the library's workspaces)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.round()
            return torch.cuda.max_memory_allocated(self.device)
        tracker, net = StorageTracker(), self.adapters[0].backbone.net
        for module in (net, *self.adapters):
            tracker.hold("frozen_weights", [*module.parameters(), *module.buffers()])
        for adapter, optimizer in zip(self.adapters, self.optimizers, strict=True):
            tracker.hold("gradients", [p.grad for p in adapter.parameters() if p.grad is not None])
            tracker.hold("optimizer", [t for state in optimizer.state.values() for t in state.values()])
        tracker.hold("activations", [t for ref in self._waiting if (frozen := ref()) for t in frozen.storages()])
        with tracker:
            self.round()
        return sum(tracker.peak.values())

    def close(self) -> None:
        """Leave the adapters without passes."""
        for adapter in self.adapters:
            adapter.passes = None


def measure_shared(
    adapters: Sequence[ControlAdapter], batch: Batch, *, rounds: int = 10, warmup: int = 2, **shares: Any
) -> SharedCost:
    """Train adapters for some rounds and take the time of each. shares: see `SharedSteps`."""
    steps = SharedSteps(adapters, batch, **shares)
    try:
        for _ in range(warmup):
            steps.round()
        before = steps.passes_made
        times = tuple(steps.time() for _ in range(rounds))
        per_round = (steps.passes_made - before) / rounds
        return SharedCost(times, steps.peak_bytes(), steps.pass_bytes, per_round)
    finally:
        steps.close()


def _step(adapter: ControlAdapter, optimizer: torch.optim.Optimizer, batch: StreamBatch) -> None:
    moved = adapter.transfer_batch_to_device(batch, adapter.device, 0)
    with adapter.autocast():
        loss = adapter.training_step(moved, 0)
    optimizer.zero_grad()
    loss.backward()
    adapter.configure_gradient_clipping(optimizer)
    optimizer.step()


def _timed(fn: Callable[[], None], device: torch.device) -> float:
    """Milliseconds until everything that fn began has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)
