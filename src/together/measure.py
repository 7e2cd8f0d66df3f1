"""What a step costs per adapter when frozen passes are shared, used for several steps, kept, or made ahead.

The steps are those of a training: `training_step`, gradient clipping and optimizer of each adapter, with the same `Passes`
in front of them; only the loop around them is not Lightning's.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from src.adapters.base import ControlAdapter
from src.adapters.frozen import FrozenPass
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


def measure_shared(
    adapters: Sequence[ControlAdapter],
    batch: Batch,
    *,
    share: bool = True,
    reuse: int = 1,
    cached: bool = False,
    overlap: bool = False,
    rounds: int = 10,
    warmup: int = 2,
) -> SharedCost:
    """Train adapters for some rounds, each of one batch, and take the time.

    adapters: made for training (with a recipe), on their device, all on one loaded backbone; they are changed. batch: on the
    CPU; every round sees the same images as if they were new. share: one pass for all, or one for each adapter; reuse:
    optimizer steps per pass; cached: features come with the batch, as from a cache that the loader has read, and are copied
    to the device within the time. overlap: the next round's pass is made while the present one goes backward.
    Raises ValueError for a method that writes into the backbone.
    """
    union = union_of(adapters)
    if union is None:
        raise ValueError("a method that writes into the backbone has no frozen pass to share")
    device, made = adapters[0].device, []
    with torch.no_grad(), adapters[0].autocast():
        whole = adapters[0].frozen_pass(batch.to(device), union)
    pass_bytes = sum(t.nbytes for t in whole.storages())
    states = {name: t.cpu() for name, t in whole.tensors().items()} if cached else None
    del whole

    def maker(adapter: ControlAdapter) -> Callable[[Batch], FrozenPass]:
        return lambda given: made.append(1) or adapter.frozen_pass(given, union if share else adapter.reads())

    groups = [list(adapters)] if share else [[adapter] for adapter in adapters]
    for group in groups:
        passes = Passes(maker(group[0]), len(group) * reuse, overlap=overlap and not cached, device=device)
        for adapter in group:
            adapter.passes = passes
    optimizers = [adapter.configure_optimizers()["optimizer"] for adapter in adapters]
    stream = [_numbered(batch, n, states) for n in range(warmup + rounds + 2)]
    for present, following in itertools.pairwise(stream):
        present.following = following

    def play(n: int) -> None:
        for _ in range(reuse):
            for adapter, optimizer in zip(adapters, optimizers, strict=True):
                _step(adapter, optimizer, stream[n])

    try:
        for n in range(warmup):
            play(n)
        made.clear()
        times = [_timed(lambda n=n: play(n), device) for n in range(warmup, warmup + rounds)]
        per_round = 0.0 if cached else len(made) / rounds
        peak = _peak_bytes(lambda: play(warmup + rounds), adapters, optimizers, device)
    finally:
        for adapter in adapters:
            adapter.passes = None
    steps = len(adapters) * reuse
    return SharedCost(tuple(ms / steps for ms in times), peak, pass_bytes, per_round)


def _numbered(batch: Batch, number: int, states: dict | None) -> StreamBatch:
    """The batch as if it were another one of the stream."""
    own = replace(batch, index=[number * len(batch) + i for i in range(len(batch))])
    return StreamBatch(**vars(own), states=states)


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


def _peak_bytes(
    fn: Callable[[], None],
    adapters: Sequence[ControlAdapter],
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        return torch.cuda.max_memory_allocated(device)
    tracker, net = StorageTracker(), adapters[0].backbone.net
    for module in (net, *adapters):
        tracker.hold("frozen_weights", [*module.parameters(), *module.buffers()])
    for adapter, optimizer in zip(adapters, optimizers, strict=True):
        tracker.hold("gradients", [p.grad for p in adapter.parameters() if p.grad is not None])
        tracker.hold("optimizer", [t for state in optimizer.state.values() for t in state.values()])
    with tracker:
        fn()
    return sum(tracker.peak.values())
