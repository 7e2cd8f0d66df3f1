"""Who makes the frozen pass that adapters in training read: one for all of them, for several steps, ahead of time, or
from a cache (see `src.adapters.frozen`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from src.adapters.frozen import FrozenPass
from src.types import Batch


@dataclass
class _Kept:
    frozen: FrozenPass
    left: int  # how often it will still be asked for
    aside: bool  # made beside the main stream, which has not waited for it yet


class Passes:
    """One frozen pass per batch, whoever asks; a batch is known by the indices of its images.

    make: batch -> its pass; uses: how often each is asked for (adapters x optimizer steps per pass), after which it is let
    go; most: batches whose passes wait at once (micro-batches of a step, if several steps use a pass). overlap: make the next
    batch's pass while the present one goes backward, on a stream of its own; it costs a second set of features, and on a
    CPU, which has no streams, saves nothing. device: where training goes on.

    A pass of a run that was resumed in the middle of its uses is asked for less often, and goes when the next ones come.
    """

    def __init__(
        self,
        make: Callable[[Batch], FrozenPass],
        uses: int = 1,
        most: int = 1,
        overlap: bool = False,
        device: torch.device | None = None,
    ):
        self.make, self.uses, self.most, self.overlap, self.device = make, uses, most, overlap, device
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._stream: torch.cuda.Stream | None = None

    def take(self, batch: Batch) -> FrozenPass:
        """The pass of a batch, made now if nobody has asked for it yet."""
        key = tuple(batch.index)
        if key not in self._kept:
            while len(self._kept) >= self.most + self.overlap:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = _Kept(self.make(batch), self.uses, aside=False)
        kept = self._kept[key]
        if kept.aside:
            self._join(kept.frozen)
            kept.aside = False
        kept.left -= 1
        if kept.left <= 0:
            del self._kept[key]
        return kept.frozen

    def ahead(self, batch: Batch) -> None:
        """Begin the pass of the batch that follows, if there is one and nobody has: call it before the backward pass."""
        following = getattr(batch, "following", None)
        if not self.overlap or following is None or tuple(following.index) in self._kept:
            return
        main = self._present()
        with self._aside():
            there = following.to(self.device)  # before the wait: a copy from pageable memory would hold up the host
            if main is not None:
                self._stream.wait_stream(main)
            frozen = self.make(there)
        self._kept[tuple(following.index)] = _Kept(frozen, self.uses, aside=True)

    def _aside(self) -> AbstractContextManager:
        """A stream beside the main one; on a CPU nothing."""
        if self._present() is None:
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._stream)

    def _present(self) -> torch.cuda.Stream | None:
        """The stream that training goes on; None on a CPU."""
        on_gpu = self.device is not None and self.device.type == "cuda"
        return torch.cuda.current_stream(self.device) if on_gpu else None

    def _join(self, frozen: FrozenPass) -> None:
        """Let the main stream wait for the other, and the allocator know who reads its memory."""
        if (main := self._present()) is None:
            return
        main.wait_stream(self._stream)
        for tensor in frozen.storages():
            tensor.record_stream(main)
