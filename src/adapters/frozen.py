"""One forward pass of the frozen backbone, kept as far as somebody reads it.

An adapter that reads the backbone and never writes into it leaves the frozen features of (x_t, t, text) as they are: they
depend on no weight that trains. So one pass can serve several adapters, several optimizer steps, or be kept on disk.
Place p of a backbone of K steps is the state before step p; place K is the state after the last one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.backbones.base import Backbone
from src.types import StreamState, TextCond


@dataclass(frozen=True)
class Reads:
    """Places whose image features (x), text stream (text) and stack of skips are read."""

    x: frozenset[int]
    text: frozenset[int]
    skips: frozenset[int] = frozenset()

    def __or__(self, other: "Reads") -> "Reads":
        return Reads(self.x | other.x, self.text | other.text, self.skips | other.skips)

    @property
    def last(self) -> int:
        """The place behind which nothing is read, so that no step needs to run."""
        return max(self.x | self.text | self.skips)


class Walk:
    """States as they are asked for, from the first place to the last; none but the present one is kept."""

    def __init__(self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond):
        self._backbone, self._inputs = backbone, (x_BCHW, t_B, text)
        self._place, self._state = -1, None

    @torch.no_grad()
    def at(self, place: int) -> StreamState:
        """The state at a place, which does not lie before the last one that was asked for."""
        if place < self._place:
            raise ValueError(f"place {place} was asked for behind place {self._place}: a walk goes forward only")
        while self._place < place:
            here = self._place
            self._state = self._backbone.begin(*self._inputs) if here < 0 else self._backbone.run(here, self._state)
            self._place += 1
        return self._state


class FrozenPass:
    """What adapters read of one pass. base: the state before step 0, whose times, mask and grid are those of every place.

    x, text, skips: by place. A state from `at` has only what was kept for its place.
    """

    def __init__(
        self,
        base: StreamState,
        x: Mapping[int, Tensor],
        text: Mapping[int, Tensor | None],
        skips: Mapping[int, tuple[Tensor, ...]],
    ):
        self.base, self.x, self.text, self.skips = base, x, text, skips

    @staticmethod
    @torch.no_grad()
    def run(backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, reads: Reads) -> "FrozenPass":
        """Walk through the frozen network as far as `reads` goes, and keep what it names."""
        walk = Walk(backbone, x_BCHW, t_B, text)
        base, x, streams, skips = walk.at(0), {}, {}, {}
        for place in range(reads.last + 1):
            state = walk.at(place)
            if place in reads.x:
                x[place] = state.x
            if place in reads.text:
                streams[place] = state.text
            if place in reads.skips:
                skips[place] = state.skips
        return FrozenPass(base, x, streams, skips)

    def at(self, place: int) -> StreamState:
        """The state at a place, as far as it was kept. Raises KeyError if its image features were not."""
        return self.base.with_(x=self.x[place], text=self.text.get(place), skips=self.skips.get(place, ()))

    def storages(self) -> Iterable[Tensor]:
        """Every tensor that it holds, each once."""
        state = self.base
        held = [state.x, state.text, state.time, state.head_time, state.mask, *state.skips, *self.x.values()]
        held += [*self.text.values(), *(s for some in self.skips.values() for s in some)]
        return {id(t): t for t in held if t is not None}.values()

    # ---- as plain tensors, for a cache ----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Name -> (B, ...) of everything that `begin` alone does not give again."""
        named = {f"x.{p}": t for p, t in self.x.items() if p}
        named |= {f"text.{p}": t for p, t in self.text.items() if t is not None and t is not self.base.text}
        return named | {f"skips.{p}.{i}": t for p, some in self.skips.items() if p for i, t in enumerate(some)}

    @staticmethod
    def of(base: StreamState, named: Mapping[str, Tensor], reads: Reads) -> "FrozenPass":
        """The inverse of `tensors`. base: from `begin`, of the same inputs.

        Where no text is named, the stream is the one that began (only SD3's blocks change theirs).
        """
        moves = any(name.startswith("text.") for name in named)
        kept = {name: t.to(base.x.dtype) for name, t in named.items()}
        x = {p: kept[f"x.{p}"] if p else base.x for p in reads.x}
        text = {p: kept.get(f"text.{p}") if moves and p else base.text for p in reads.text}
        skips = {p: tuple(_numbered(kept, f"skips.{p}.")) if p else base.skips for p in reads.skips}
        return FrozenPass(base, x, text, skips)


def _numbered(named: Mapping[str, Tensor], prefix: str) -> Iterable[Tensor]:
    number = 0
    while f"{prefix}{number}" in named:
        yield named[f"{prefix}{number}"]
        number += 1
