"""ControlNet for U-Nets (Zhang et al. 2023, arXiv 2302.05543): a trainable copy of the encoder adds to the decoder's skips.

As the published code has it (diffusers `models/controlnets/controlnet.py`): the copy has its own conv_in and time
embedding, the hint joins once behind conv_in, and one zero convolution per skip and one for the middle lead back.
The frozen encoder is not touched, so it runs forward only; the gradient crosses the frozen decoder.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.frozen import Walk
from src.adapters.parts import HINT_CHANNELS, decoder_begins, hint_refusal, zero_layer
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, TextCond


class ControlNet(ControlAdapter):
    """ControlNet.

    hint_channels: widths of the hint encoder, which halves the picture between them, down to the latent grid: one more
    than the halvings; encoder_steps: only the first so many steps (layers and downsamplers) of the encoder are copied, and the
    skips behind them and the middle get nothing (None: all of the encoder and the middle, as published; ours otherwise);
    connector_width: hidden width of the zero convolutions (None: none, as published); condition_space: "pixel", as published.
    """

    families: ClassVar = ("unet",)
    grad_through_backbone: ClassVar = True
    identity_at_init: ClassVar = True
    steps_to_all: ClassVar = (
        3  # two zero layers in a row: a connector, then conv_out of the hint, then what lies in front of it
    )
    idea: ClassVar = "controlnet"

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        hint_channels: tuple[int, ...] = HINT_CHANNELS,
        encoder_steps: int | None = None,
        connector_width: int | None = None,
        condition_space: ConditionSpace = "pixel",
        checkpointing: Checkpointing = "none",
    ):
        from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

        chosen = {"hint_channels": hint_channels, "encoder_steps": encoder_steps}
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, **chosen)
        facts = backbone.facts
        self.whole = encoder_steps is None
        self.before_decoder = decoder_begins(backbone)
        self.has_middle = self.before_decoder > facts.middle
        self.entry = backbone.copy_entry()
        self.copies = backbone.copy_steps(list(range(self.before_decoder if self.whole else encoder_steps)))
        self.hint = ControlNetConditioningEmbedding(facts.width, 3, tuple(hint_channels))
        widths = facts.widths[: (facts.middle if self.whole else encoder_steps) + 1]
        # one per skip and one for the middle, whose width is that of the last skip
        reached = (*widths, widths[-1]) if self.whole else widths
        self.connectors = nn.ModuleList(zero_layer(w, True, connector_width) for w in reached)

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        if facts.family != "unet":
            return f"{super().refusal(facts)}; use adapter=dit_controlnet"
        if reason := hint_refusal(facts, **options):
            return reason
        steps = options.get("encoder_steps")
        if steps is not None and not 1 <= steps <= facts.middle:
            return (
                f"adapter.encoder_steps={steps}: the encoder of this U-Net has 1 to {facts.middle}; null copies the middle, too"
            )
        return None

    @classmethod
    def depths(cls, facts: BackboneFacts, **options: Any) -> list[dict[str, Any]]:
        return [{"encoder_steps": n} for n in (*range(1, facts.middle + 1), None)]

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any]:
        return {"connector_width": width}

    def parts(self) -> dict[str, nn.Module]:
        return {"copies": self.copies, "connectors": self.connectors, "hint": self.hint, "entry": self.entry}

    def encode_condition(self, condition: Tensor) -> Tensor:
        """Pictures in [0, 1] -> (B, D, H, W) on the latent grid."""
        return self.hint(condition)

    def residuals(self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor) -> list[Tensor]:
        """What is added to each skip, the shallowest first, and, where all of the encoder is copied, last to the middle."""
        state = backbone.begin(x_BCHW, t_B, text, self.entry)
        hinted = state.x + features
        state = state.with_(x=hinted, skips=(hinted,))
        for copied in self.copies:
            state = self.recompute(backbone.run, copied, state)
        found = (*state.skips, state.x) if self.whole else state.skips
        return [connect(f) for connect, f in zip(self.connectors, found, strict=True)]

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float
    ) -> Tensor:
        state = Walk(backbone, x_BCHW, t_B, text).at(self.before_decoder)
        residuals = self.residuals(backbone, x_BCHW, t_B, text, features)
        if self.whole:
            state = state.with_(x=state.x + scale * residuals.pop())
        skips = [s + scale * r for s, r in zip(state.skips, residuals, strict=False)]
        state = state.with_(skips=(*skips, *state.skips[len(skips) :]))
        for k in range(self.before_decoder, backbone.facts.depth):
            state = self.recompute(backbone.run, k, state, frozen=True)
        return backbone.end(state)
