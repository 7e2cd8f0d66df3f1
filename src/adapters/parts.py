"""Building blocks of control adapters: connectors, condition stems, copies.

Legend in `src.types`. A connector joins features of a source to a stream that goes on, both (B, T, D) or (B, D, H, W);
untrained it is the identity on the stream.
"""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from src.backbones.base import Backbone
from src.types import BackboneFacts, ConditionSpace

Copy = Literal["encoder", "decoder", "skip_layer", "full"]
HINT_CHANNELS = (16, 32, 96, 256)  # of the hint encoder, which halves the picture between them: ControlNet's, and SCEdit's


class ZeroMLP(nn.Module):
    """out = into + Z(source), with Z zero-initialised: ControlNet's zero convolution (2302.05543), a linear layer on tokens.

    spatial: features are maps; hidden: width of a hidden layer in Z (None: one square layer, as published).
    """

    def __init__(self, width: int, spatial: bool, hidden: int | None = None):
        super().__init__()
        self.add = zero_layer(width, spatial, hidden)

    def forward(self, into: Tensor, source: Tensor) -> Tensor:
        return into + self.add(source)


class ZeroFT(nn.Module):
    """out = into (1 + Zm(source)) + Za(source): multiply, add and shortcut, both layers zero-initialised.

    UniCon (2503.17221) names it; its ancestor is the ZeroSFT of SUPIR (2401.13627). Arguments as in `ZeroMLP`.
    """

    def __init__(self, width: int, spatial: bool, hidden: int | None = None):
        super().__init__()
        self.multiply, self.add = zero_layer(width, spatial, hidden), zero_layer(width, spatial, hidden)

    def forward(self, into: Tensor, source: Tensor) -> Tensor:
        return into * (1 + self.multiply(source)) + self.add(source)


# share_attn differs in what it is given as the source: what the stream's own queries find in the other side's keys and values
CONNECTORS: dict[str, type[nn.Module]] = {"zero_mlp": ZeroMLP, "zero_ft": ZeroFT, "share_attn": ZeroMLP}


def hint_refusal(facts: BackboneFacts, **options: Any) -> str | None:
    """Why ControlNet's hint encoder cannot bring a picture to the latent grid with these options; None if it can."""
    if options.get("condition_space", "pixel") != "pixel":
        return "its hint encoder reads pictures: adapter.condition_space=pixel"
    widths = options.get("hint_channels", HINT_CHANNELS)
    if 2 ** (len(widths) - 1) != facts.factor:
        return f"adapter.hint_channels={list(widths)} halves {len(widths) - 1} times, latents are {facts.factor} times smaller"
    return None


def zero_layer(width: int, spatial: bool = False, hidden: int | None = None) -> nn.Module:
    """A layer of `width` to `width` whose output starts at zero: linear, or a 1x1 convolution for maps."""

    def layer(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 1) if spatial else nn.Linear(a, b)

    last = zeroed(layer(hidden or width, width))
    return nn.Sequential(layer(width, hidden), nn.SiLU(), last) if hidden else last


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, heads, T, D / heads) each -> (B, T, D)."""
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class ConditionStem(nn.Module):
    """The condition on the grid of the backbone's first features.

    space "latent": the condition went through the autoencoder; a trainable copy of the backbone's own patch embedding
    reads it, since it already knows that space. space "pixel": pixel_unshuffle to the latent grid, two convolutions
    (the T2I-Adapter's way in, 2302.08453), for autoencoders that blur thin lines.
    """

    def __init__(self, backbone: Backbone, space: ConditionSpace):
        super().__init__()
        facts = backbone.facts
        self.spatial = facts.spatial
        if space == "latent":
            self.embed = backbone.copy_embed()
        else:
            hidden = 4 * facts.latent_channels
            self.embed = nn.Sequential(
                nn.PixelUnshuffle(facts.factor),
                nn.Conv2d(3 * facts.factor**2, hidden, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(hidden, facts.width, facts.patch, stride=facts.patch),
            )

    def forward(self, condition: Tensor) -> Tensor:
        """(B, C, H, W) latents or (B, 3, 8H, 8W) pictures -> (B, T, D), or (B, D, H, W) for a U-Net."""
        c = self.embed(condition)
        return c if self.spatial else c.flatten(2).transpose(1, 2)


class Pyramid(nn.Module):
    """A U-Net condition at the size and width of every encoder feature.

    widths: channels of the first features and of each encoder step's; halves: whether that step halves the size.
    """

    def __init__(self, widths: list[int], halves: list[bool]):
        super().__init__()
        changes = zip(widths[:-1], widths[1:], halves, strict=True)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, 1 + half, padding=1) if half or a != b else nn.Identity() for a, b, half in changes
        )

    def forward(self, c_BDHW: Tensor) -> tuple[Tensor, ...]:
        """The stem's features -> one map per encoder feature, the stem's own first."""
        found = [c_BDHW]
        for conv in self.convs:
            found.append(found[-1] if isinstance(conv, nn.Identity) else conv(F.silu(found[-1])))
        return tuple(found)


def decoder_begins(backbone: Backbone) -> int:
    """The first step of a U-Net behind its encoder, and its middle where it has one."""
    middle = backbone.facts.middle
    return middle + (backbone.step_plans()[middle].kind == "mid")


def copied_steps(facts: BackboneFacts, copy: Copy, blocks: int | None = None) -> list[int]:
    """Which of the K steps a method copies, by the name that the UniCon paper gives the choice.

    blocks: another number of them, counted from the first for the encoder and from the last for decoder and full.
    """
    depth, middle = facts.depth, facts.middle
    if blocks is not None:
        return list(range(blocks)) if copy == "encoder" else list(range(depth - blocks, depth))
    choices = {
        "encoder": list(range(middle)),
        "decoder": list(range(middle, depth)),
        "skip_layer": list(range(0, depth, 2)),
        "full": list(range(depth)),
    }
    return choices[copy]
