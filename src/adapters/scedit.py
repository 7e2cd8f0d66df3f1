"""SCEdit's CSC-Tuner (Jiang et al. 2023, arXiv 2312.11392): every skip of a frozen U-Net is edited by a small network that also
reads the condition.

After its code (modelscope/scepter `modules/model/tuner/sce/`): the condition is brought to the latent grid once, then to the
size and width of every skip by a chain of SiLU and zero convolution; with its feature h, a skip s becomes
s + h + W2 GELU(W1 (s + h)), where W2 starts at zero. The middle is left alone. Nothing of the encoder is copied, it runs
forward only; the gradient crosses the frozen decoder.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.frozen import Walk
from src.adapters.parts import HINT_CHANNELS, decoder_begins, hint_refusal, zeroed
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, TextCond


class SCEdit(ControlAdapter):
    """SCEdit with a condition (CSC-Tuner).

    kernel: 1 or 3, of the chain of zero convolutions: the paper's 28.8 M on Stable Diffusion are those of 1, the released
    configurations have 3; tuner_width: hidden width of the tuner at the first skip, of the others in proportion to their skip
    (None: the width of each skip, as published); hint_channels: widths of the network that brings the condition to the latent
    grid, halved between them; condition_space: "pixel", as published.
    """

    families: ClassVar = ("unet",)
    grad_through_backbone: ClassVar = True
    identity_at_init: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        kernel: int = 1,
        tuner_width: int | None = None,
        hint_channels: tuple[int, ...] = HINT_CHANNELS,
        condition_space: ConditionSpace = "pixel",
        checkpointing: Checkpointing = "none",
    ):
        from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

        chosen = {"kernel": kernel, "tuner_width": tuner_width, "hint_channels": hint_channels}
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, **chosen)
        facts = backbone.facts
        self.before_decoder = decoder_begins(backbone)
        widths = facts.widths[: facts.middle + 1]  # of the skips, the shallowest first
        self.hint = ControlNetConditioningEmbedding(widths[0], 3, tuple(hint_channels))
        self.hint.conv_out = zero_conv(hint_channels[-1], widths[0], kernel)  # the first of the chain
        strides = [2 if plan.kind == "downsample" else 1 for plan in backbone.step_plans()[: facts.middle]]
        chain = zip(widths[:-1], widths[1:], strides, strict=True)
        self.chain = nn.ModuleList(nn.Sequential(nn.SiLU(), zero_conv(a, b, kernel, stride)) for a, b, stride in chain)
        self.tuners = nn.ModuleList(Tuner(w, hidden_width(w, widths[0], tuner_width)) for w in widths)

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        if facts.family != "unet":
            return f"{super().refusal(facts)}, which has no long skips to edit; use adapter=t2i_adapter"
        if reason := hint_refusal(facts, **options):
            return reason
        if options.get("kernel", 1) not in (1, 3):
            return f"adapter.kernel={options['kernel']}: the chain has kernels of 1 (the paper) or 3 (the released ones)"
        width = options.get("tuner_width")
        return None if width is None or width > 0 else f"adapter.tuner_width={width}: a width is 1 or more, or null"

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any]:
        return {"tuner_width": width}

    def parts(self) -> dict[str, nn.Module]:
        return {"hint": self.hint, "chain": self.chain, "tuners": self.tuners}

    def encode_condition(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Pictures in [0, 1] -> one (B, D, H, W) per skip, the shallowest first, at its size and width."""
        found = [self.hint(condition)]
        for step in self.chain:
            found.append(step(found[-1]))
        return tuple(found)

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: tuple[Tensor, ...], scale: float
    ) -> Tensor:
        state = Walk(backbone, x_BCHW, t_B, text).at(self.before_decoder)
        edited = zip(state.skips, self.tuners, features, strict=True)
        state = state.with_(skips=tuple(s + scale * self.recompute(tune, s, h) for s, tune, h in edited))
        for k in range(self.before_decoder, backbone.facts.depth):
            state = self.recompute(backbone.run, k, state, frozen=True)
        return backbone.end(state)


class Tuner(nn.Module):
    """What a skip gets, (B, D, H, W): h + W2 GELU(W1 (skip + h)) with the condition's feature h, over channels alone."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.into, self.out = nn.Conv2d(width, hidden, 1), zero_conv(hidden, width, 1)

    def forward(self, skip: Tensor, feature: Tensor) -> Tensor:
        return feature + self.out(nn.functional.gelu(self.into(skip + feature)))


def zero_conv(width: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution that starts at zero and keeps the size, or halves it."""
    return zeroed(nn.Conv2d(width, out, kernel, stride, padding=kernel // 2))


def hidden_width(width: int, first: int, chosen: int | None) -> int:
    """Of the tuner of a skip that is `width` wide, where that of the first skip is `chosen`."""
    return width if chosen is None else max(1, chosen * width // first)
