"""ControlNet for transformers: copies of the first blocks add to the image tokens between the frozen blocks.

Two published forms, by backbone:
SD3 (diffusers `models/controlnets/controlnet_sd3.py`): the copy has its own embeddings of latent, time and text; the
condition's latent joins the noisy one behind the patch embedding, through a zero-initialised one of its own.
PixArt-delta (arXiv 2401.05252, section 4): the first block runs uncontrolled; the condition goes through the frozen patch
embedding and a zero-initialised layer, and joins the image tokens once, in front of the first copy.
In both the gradient crosses the whole frozen trunk behind the first block.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.parts import zero_layer, zeroed
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, StreamState, TextCond

Rule = Literal["proportional", "ceil", "repeat", "one_to_one"]
# behind frozen block i of K goes the residual of copy f(i, K, N); an index of N or more means none
RULES: dict[str, Callable[[int, int, int], int]] = {
    "proportional": lambda i, depth, copies: int(i / (depth / copies)),  # SD3
    "ceil": lambda i, depth, copies: i // math.ceil(depth / copies),  # Flux
    "repeat": lambda i, depth, copies: i % copies,  # XLabs' Flux
    "one_to_one": lambda i, depth, copies: i,  # PixArt-delta
}


class DiTControlNet(ControlAdapter):
    """ControlNet on SD3 and PixArt.

    blocks: number of copied blocks; null: as published, K / 2 on SD3 and K / 2 - 1 on PixArt; "all": K - 1, the most that was
    published (27 of 28 in PixArt-delta's ablation), since residuals go between blocks: behind the last one comes the head.
    diffusers gives SD3's last block none either, and cannot copy it, for it has no text output. index_rule: which copy's
    residual goes behind which block, a key of `RULES`; null: as published, proportional on SD3 and one_to_one on PixArt.
    connector_width: hidden width of the zero layers (None: none, as published). Copies that the rule never asks stay frozen
    and are not counted.
    """

    families: ClassVar = ("mmdit", "dit")
    grad_through_backbone: ClassVar = True
    identity_at_init: ClassVar = True
    idea: ClassVar = "controlnet"

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        blocks: int | Literal["all"] | None = None,
        index_rule: Rule | None = None,
        connector_width: int | None = None,
        condition_space: ConditionSpace = "latent",
        checkpointing: Checkpointing = "none",
    ):
        chosen = {"blocks": blocks}
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, **chosen)
        facts = backbone.facts
        self.sd3 = facts.family == "mmdit"
        self.count = facts.depth - 1 if blocks == "all" else blocks or facts.depth // 2 - (not self.sd3)
        self.rule = RULES[index_rule or ("proportional" if self.sd3 else "one_to_one")]
        self.copies = backbone.copy_steps(list(range(self.count)))
        self.connectors = nn.ModuleList(zero_layer(facts.width, False, connector_width) for _ in range(self.count))
        if self.sd3:
            self.entry = backbone.copy_entry()
            self.stem = zeroed(nn.Conv2d(facts.latent_channels, facts.width, facts.patch, stride=facts.patch))
        else:
            self.stem = zero_layer(facts.width)

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        if facts.family == "unet":
            return f"{super().refusal(facts)}; use adapter=controlnet"
        if options.get("condition_space", "latent") != "latent":
            return "it reads the condition through the backbone's own patch embedding: adapter.condition_space=latent"
        blocks = options.get("blocks")
        if blocks not in (None, "all") and not 1 <= blocks < facts.depth:
            most = facts.depth - 1
            return f"adapter.blocks={blocks}: 1 to {most} blocks of this backbone can be copied; all means {most}"
        return None

    @classmethod
    def depths(cls, facts: BackboneFacts, **options: Any) -> list[dict[str, Any]]:
        return [{"blocks": n} for n in range(1, facts.depth)]

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any]:
        return {"connector_width": width}

    def parts(self) -> dict[str, nn.Module]:
        made = {"copies": self.copies, "connectors": self.connectors, "stem": self.stem}
        return made | ({"entry": self.entry} if self.sd3 else {})

    def encode_condition(self, condition: Tensor) -> Tensor:
        """Latents -> (B, T, D)."""
        if self.sd3:
            return self.stem(condition).flatten(2).transpose(1, 2)
        with torch.no_grad():
            tokens = self.backbone.embed(condition.to(next(self.backbone.net.parameters()).dtype))
        return self.stem(tokens.float())

    def residuals(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, first: StreamState
    ) -> list[Tensor]:
        """(B, T, D) of each copy. first: the frozen stream behind its first block."""
        state = backbone.begin(x_BCHW, t_B, text, self.entry) if self.sd3 else first
        state, found = state.with_(x=state.x + features), []
        for copied, connect in zip(self.copies, self.connectors, strict=True):
            state = self.recompute(backbone.run, copied, state)
            found.append(connect(state.x))
        return found

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float
    ) -> Tensor:
        depth = backbone.facts.depth
        with torch.no_grad():
            state = backbone.run(0, backbone.begin(x_BCHW, t_B, text))
        residuals = self.residuals(backbone, x_BCHW, t_B, text, features, state)
        for k in range(depth - 1):
            index = self.rule(k, depth, self.count)
            if index < self.count:
                state = state.with_(x=state.x + scale * residuals[index])
            state = self.recompute(backbone.run, k + 1, state, frozen=True)
        return backbone.end(state)
