"""Shared vocabulary: the data that crosses module borders.

Shape legend, used as a suffix of tensor names everywhere:
B batch, C latent channels, H W latent height and width, T image tokens, D width, L text tokens, P pooled text width,
K steps of a backbone, 3HW pictures as float in [0, 1]. Latents outside a codec are scaled and shifted.
t outside a backbone is float in [0, 1], and 1 is pure noise.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

ConditionSpace = Literal["latent", "pixel"]


class UserError(Exception):
    """Something the person at the keyboard can mend: printed as one line, exit code 2, no traceback."""


@dataclass(frozen=True)
class TextCond:
    """Encoded captions. tokens_BLD: per-token states; pooled_BP: one vector per caption, where the backbone uses one."""

    tokens_BLD: Tensor
    pooled_BP: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "TextCond":
        """Move, and cast if a dtype is given."""
        return self._map(lambda x: x.to(device=device, dtype=dtype))

    def __getitem__(self, rows: Any) -> "TextCond":
        """Select captions by index, slice or mask."""
        return self._map(lambda x: x[rows])

    def expand(self, batch: int) -> "TextCond":
        """A single caption for `batch` images."""
        return self._map(lambda x: x.expand(batch, *x.shape[1:]))

    def __len__(self) -> int:
        return len(self.tokens_BLD)

    def _map(self, fn: Any) -> "TextCond":
        return TextCond(fn(self.tokens_BLD), None if self.pooled_BP is None else fn(self.pooled_BP))

    @staticmethod
    def cat(parts: list["TextCond"]) -> "TextCond":
        """Put captions of equal token length behind each other."""
        pooled = None if parts[0].pooled_BP is None else torch.cat([p.pooled_BP for p in parts])
        return TextCond(torch.cat([p.tokens_BLD for p in parts]), pooled)


@dataclass(frozen=True)
class StreamState:
    """What travels from step to step of an unrolled backbone.

    x: image features, (B, T, D) in a transformer; text: the text stream, None once the backbone has dropped it;
    time: the conditioning vector of time and pooled text; grid: token rows and columns.
    """

    x: Tensor
    text: Tensor | None
    time: Tensor
    grid: tuple[int, int]

    def with_(self, **changes: Any) -> "StreamState":
        """A copy with some fields replaced; states are never changed in place."""
        return replace(self, **changes)


@dataclass(frozen=True)
class BackboneFacts:
    """One screen of facts about a backbone, read from its own configuration files.

    multiple: legal resolutions are multiples of it (autoencoder factor x patch); factor: pixels per latent side;
    text_tokens: L; text_width, pooled_width: D and P of `TextCond`; depth: K; width: D of the image stream.
    """

    family: str
    source: str
    revision: str
    latent_channels: int
    factor: int
    multiple: int
    depth: int
    width: int
    text_tokens: int
    text_width: int
    pooled_width: int | None
    licence_url: str | None = None


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
        """Move every tensor (Lightning calls this)."""
        moved = {k: getattr(self, k).to(device) for k in ("latents_BCHW", "noise_BCHW", "uniform_B", "text", "condition")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Sample:
    """One item of a source. image: (H, W, 3) uint8; signals: exact maps that the source happens to know."""

    id: str
    image: Any
    caption: str
    signals: dict[str, Any] = field(default_factory=dict)
