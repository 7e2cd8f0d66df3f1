"""A method to start your own from: copy this file and conf/adapter/template.yaml, and rename both.

What it does: the condition's latent goes through a copy of the backbone's patch embedding and a zero-initialised layer,
and is added to the first features. It is the smallest thing that learns control; it is not a published method.
The tests find it because conf/adapter/ lists it, and hold it to the three declarations below.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.parts import ConditionStem, ZeroMLP
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import Checkpointing, ConditionSpace, TextCond


class Template(ControlAdapter):
    """Condition added at the input."""

    families: ClassVar = ("mmdit", "dit", "unet")  # which backbones it can walk through
    grad_through_backbone: ClassVar = True  # does the loss reach the adapter through frozen blocks?
    identity_at_init: ClassVar = True  # does it start as the backbone itself?

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        condition_space: ConditionSpace = "latent",
        checkpointing: Checkpointing = "none",
    ):
        # the first arguments and `checkpointing` are handed in by src/build.py; the others come from the yaml
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing)
        self.stem = ConditionStem(backbone, condition_space)  # condition -> shape of the first features
        self.join = ZeroMLP(backbone.facts.width, backbone.facts.spatial)  # zero at the start: identity

    def parts(self) -> dict[str, nn.Module]:
        """Everything trainable, by role: what the parameter table prints."""
        return {"stem": self.stem, "join": self.join}

    def encode_condition(self, condition: Tensor) -> Tensor:
        """What depends on the condition alone: computed once per picture, not at every solver step."""
        return self.stem(condition)

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float
    ) -> Tensor:
        """begin, K times run, end: with nothing in between this is the backbone."""
        with torch.no_grad():  # nothing trainable lies in front of this
            state = backbone.begin(x_BCHW, t_B, text)
        x = state.x + scale * (self.join(state.x, features) - state.x)
        # a U-Net keeps its first features for the decoder: change them too
        state = state.with_(x=x, skips=(x,) if state.skips else ())
        for k in range(backbone.facts.depth):
            state = self.recompute(
                backbone.run, k, state, frozen=True
            )  # with hardware.checkpointing: stored once, computed twice
        return backbone.end(state)
