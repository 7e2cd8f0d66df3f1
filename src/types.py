"""Shared vocabulary: the data that crosses module borders.

Shape legend, used as a suffix of tensor names everywhere:
B batch, C latent channels, H W latent height and width, T image tokens, D width, L text tokens, P pooled text width,
K steps of a backbone, 3HW pictures as float in [0, 1]. Latents outside a codec are scaled and shifted.
t outside a backbone is float in [0, 1], and 1 is pure noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from src.vocabulary import Checkpointing, Compile, ConditionSpace, Fit, UserError

__all__ = ["Checkpointing", "Compile", "ConditionSpace", "Fit", "UserError"]  # from here, too, for whoever has torch anyway
__all__ += ["TENSORS", "BackboneFacts", "Batch", "Features", "Sample", "StreamState", "TextCond"]

Features = Tensor | tuple[Tensor, ...]  # what an adapter computes from a condition: one tensor, or one per scale


@dataclass(frozen=True)
class TextCond:
    """Encoded captions. tokens_BLD: per-token states; pooled_BP: one vector per caption, where the backbone uses one;
    mask_BL: 1 for a token that counts and 0 for padding, where the backbone masks."""

    tokens_BLD: Tensor
    pooled_BP: Tensor | None = None
    mask_BL: Tensor | None = None

    def fields(self) -> dict[str, Tensor]:
        """The tensors that are there, by a short name: how caches store them."""
        named = {"tokens": self.tokens_BLD, "pooled": self.pooled_BP, "mask": self.mask_BL}
        return {name: x for name, x in named.items() if x is not None}

    @staticmethod
    def of(fields: dict[str, Tensor]) -> "TextCond":
        """The inverse of `fields`."""
        return TextCond(fields["tokens"], fields.get("pooled"), fields.get("mask"))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "TextCond":
        """fn over every tensor that is there."""
        return TextCond.of({name: fn(x) for name, x in self.fields().items()})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "TextCond":
        """Move, and cast if a dtype is given. Towards a GPU nobody waits: what uses it is ordered behind the copy."""
        return self.map(lambda x: x.to(device=device, dtype=dtype, non_blocking=device.type == "cuda"))

    def __getitem__(self, rows: Any) -> "TextCond":
        """Select captions by index, slice or mask."""
        return self.map(lambda x: x[rows])

    def expand(self, batch: int) -> "TextCond":
        """A single caption for `batch` images."""
        return self.map(lambda x: x.expand(batch, *x.shape[1:]))

    def where(self, keep_B: Tensor, other: "TextCond") -> "TextCond":
        """These captions where keep_B is true, the (single) other one elsewhere."""
        theirs = other.fields()

        def pick(name: str, x: Tensor) -> Tensor:
            return torch.where(keep_B.view(-1, *[1] * (x.ndim - 1)), x, theirs[name].to(x.dtype))

        return TextCond.of({name: pick(name, x) for name, x in self.fields().items()})

    def __len__(self) -> int:
        return len(self.tokens_BLD)

    @staticmethod
    def cat(parts: list["TextCond"]) -> "TextCond":
        """Put captions of equal token length behind each other."""
        return TextCond.of({name: torch.cat([p.fields()[name] for p in parts]) for name in parts[0].fields()})


@dataclass(frozen=True)
class StreamState:
    """What travels from step to step of an unrolled backbone.

    x: image features, (B, T, D) in a transformer and (B, D, H, W) in a U-Net; text: the text stream, None once the
    backbone has dropped it; time: what modulates the steps; grid: rows and columns of the latent's tokens.
    head_time: what modulates the head, where that differs; mask: additive attention bias (B, 1, L) of the text;
    skips: features on their way from a U-Net's encoder to its decoder, the latest last.
    """

    x: Tensor
    text: Tensor | None
    time: Tensor
    grid: tuple[int, int]
    head_time: Tensor | None = None
    mask: Tensor | None = None
    skips: tuple[Tensor, ...] = ()

    def with_(self, **changes: Any) -> "StreamState":
        """A copy with some fields replaced; states are never changed in place."""
        return replace(self, **changes)


@dataclass(frozen=True)
class BackboneFacts:
    """One screen of facts about a backbone, read from its own configuration files.

    family: mmdit, dit or unet; multiple: legal resolutions are multiples of it (autoencoder factor x patch or U-Net
    downsampling); factor: pixels per latent side;
    patch: latent side of a feature at step 0; depth: K; widths: D before step 0 and after each step, K + 1 numbers;
    middle: the step at which the decoder begins, for the half-size copy (a transformer's second half, a U-Net's middle block);
    text_tokens: L; text_width, pooled_width: D and P of `TextCond`; text_mask: whether it carries a mask.
    levels: widths of a U-Net's levels; attends: which of them have attention; stacked: skips that wait before each of its
    steps and after the last one, K + 1 numbers. largest: pixels of the longest side that the
    position embedding reaches; None where it has no end.
    """

    family: str
    source: str
    revision: str
    latent_channels: int
    factor: int
    patch: int
    multiple: int
    depth: int
    widths: tuple[int, ...]
    middle: int
    text_tokens: int
    text_width: int
    pooled_width: int | None
    text_mask: bool = False
    levels: tuple[int, ...] = ()
    attends: tuple[bool, ...] = ()
    stacked: tuple[int, ...] = ()
    largest: int | None = None
    licence_url: str | None = None

    @property
    def width(self) -> int:
        """D of the first features, and of all of them in a transformer."""
        return self.widths[0]

    @property
    def samples_up(self) -> frozenset[int]:
        """The decoder's steps that only enlarge: behind the middle, and no skip joins there."""
        waits = self.stacked
        return frozenset(k for k in range(self.middle + 1, self.depth if waits else 0) if waits[k] == waits[k + 1])

    @property
    def spatial(self) -> bool:
        """Whether features are maps (B, D, H, W) and not tokens (B, T, D)."""
        return self.family == "unet"


TENSORS = ("latents_BCHW", "noise_BCHW", "uniform_B", "condition")  # of a batch, beside its text


@dataclass
class Batch:
    """One micro-batch of training, ready to use: every random number in it is keyed by the image's stream position.

    index: stream positions (image number since the start of training); ids: names of the source's items.
    uniform: (B,) in [0, 1), from which the objective makes t. condition is in the adapter's condition space:
    latents (B, C, H, W) or pictures (B, 3, 8H, 8W).
    """

    index: list[int]
    ids: list[str]
    latents_BCHW: Tensor
    noise_BCHW: Tensor
    uniform_B: Tensor
    text: TextCond
    condition: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor (Lightning calls this). Towards a GPU nobody waits: what uses it is ordered behind the copy."""
        fast = device.type == "cuda"
        moved = {k: getattr(self, k).to(device, non_blocking=fast) for k in TENSORS}
        return replace(self, text=self.text.to(device), **moved)

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from where a copy to a GPU need not be waited for (a DataLoader calls this)."""
        pinned = {k: getattr(self, k).pin_memory() for k in TENSORS}
        return replace(self, text=self.text.map(lambda x: x.pin_memory()), **pinned)


@dataclass(frozen=True)
class Sample:
    """One item of a source. image: (H, W, 3) uint8; signals: exact maps that the source happens to know."""

    id: str
    image: Any
    caption: str
    signals: dict[str, Any] = field(default_factory=dict)
