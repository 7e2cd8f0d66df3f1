"""Building blocks of control adapters: connectors, condition stems, copies.

Legend in `src.types`. A connector joins features of a source to a stream that goes on, both (B, T, D); untrained it is the
identity on the stream.
"""

from torch import Tensor, nn

from src.backbones.base import Backbone
from src.types import ConditionSpace


class ZeroMLP(nn.Module):
    """out = into + Z(source), with Z a zero-initialised linear layer (the token form of ControlNet's zero convolution)."""

    def __init__(self, width: int):
        super().__init__()
        self.add = zero_linear(width)

    def forward(self, into_BTD: Tensor, source_BTD: Tensor) -> Tensor:
        return into_BTD + self.add(source_BTD)


class ZeroFT(nn.Module):
    """out = into (1 + Zm(source)) + Za(source): multiply, add and shortcut, both linears zero-initialised.

    UniCon (2503.17221) names it; its ancestor is the ZeroSFT of SUPIR (2401.13627).
    """

    def __init__(self, width: int):
        super().__init__()
        self.multiply, self.add = zero_linear(width), zero_linear(width)

    def forward(self, into_BTD: Tensor, source_BTD: Tensor) -> Tensor:
        return into_BTD * (1 + self.multiply(source_BTD)) + self.add(source_BTD)


CONNECTORS: dict[str, type[nn.Module]] = {"zero_mlp": ZeroMLP, "zero_ft": ZeroFT}


def zero_linear(width: int) -> nn.Linear:
    """A square linear layer that starts at zero."""
    layer = nn.Linear(width, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ConditionStem(nn.Module):
    """The condition on the backbone's token grid.

    space "latent": the condition went through the autoencoder; a trainable copy of the backbone's own patch embedding
    reads it, since it already knows that space. space "pixel": pixel_unshuffle to the latent grid, two convolutions
    (the T2I-Adapter's way in, 2302.08453), for autoencoders that blur thin lines.
    """

    def __init__(self, backbone: Backbone, space: ConditionSpace):
        super().__init__()
        facts = backbone.facts
        if space == "latent":
            self.embed = backbone.copy_embed()
        else:
            patch = facts.multiple // facts.factor
            hidden = 4 * facts.latent_channels
            self.embed = nn.Sequential(
                nn.PixelUnshuffle(facts.factor),
                nn.Conv2d(3 * facts.factor**2, hidden, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(hidden, facts.width, patch, stride=patch),
            )

    def forward(self, condition: Tensor) -> Tensor:
        """(B, C, H, W) latents or (B, 3, 8H, 8W) pictures -> (B, T, D)."""
        return self.embed(condition).flatten(2).transpose(1, 2)


def copied_steps(depth: int, copy: str) -> list[int]:
    """Which of the K blocks a method copies, by the name that the UniCon paper gives the choice."""
    half = depth // 2
    choices = {
        "encoder": list(range(half)),
        "decoder": list(range(half, depth)),
        "skip_layer": list(range(0, depth, 2)),
        "full": list(range(depth)),
    }
    return choices[copy]
