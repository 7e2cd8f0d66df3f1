"""UniCon (ICLR 2025, arXiv 2503.17221): the copy reads the frozen backbone and makes the prediction itself.

The frozen network runs forward only, under no_grad: nothing flows back into it and none of its activations is stored.
There is no public code of the authors; `lixirui142/UniCon` is another method of the same name. Where the paper is
silent: the frozen feature is the shortcut of every connector, the copies carry their own text stream, and the head is
copied too, so that no gradient has to cross a frozen layer.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.parts import CONNECTORS, ConditionStem, copied_steps
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import ConditionSpace, StreamState, TextCond


class UniCon(ControlAdapter):
    """UniCon and UniCon-Half on transformers.

    copy: "full" (UniCon: every block) or "decoder" (UniCon-Half: the second half);
    connector: how a frozen and a copied feature join, a key of `CONNECTORS`;
    condition_space: "latent" sends the condition through the autoencoder, as the paper does; "pixel" does not;
    checkpointing: recompute the copied blocks in the backward pass.

    With copied blocks i = first..K-1, frozen features h_i before block i and condition tokens c:
    a = c; for each i: a = copy_i(connector_i(h_i, a)); prediction = head(connector_K(h_K, a)).
    """

    families: ClassVar = ("mmdit",)
    grad_through_backbone: ClassVar = False
    identity_at_init: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        copy: Literal["full", "decoder"] = "full",
        connector: Literal["zero_ft", "zero_mlp"] = "zero_ft",
        condition_space: ConditionSpace = "latent",
        checkpointing: bool = False,
    ):
        super().__init__(backbone, objective, optimizer, name, condition_space)
        self.indices = copied_steps(backbone.facts.depth, copy)
        self.checkpointing = checkpointing
        self.stem = ConditionStem(backbone, condition_space)
        self.copies = backbone.copy_steps(self.indices)
        self.connectors = nn.ModuleList(CONNECTORS[connector](backbone.facts.width) for _ in range(len(self.indices) + 1))
        self.head = backbone.copy_head()

    def parts(self) -> dict[str, nn.Module]:
        return {"copies": self.copies, "connectors": self.connectors, "stem": self.stem, "head": self.head}

    def encode_condition(self, condition: Tensor) -> Tensor:
        """-> (B, T, D) condition tokens."""
        return self.stem(condition)

    @torch.no_grad()
    def frozen_features(self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> dict[int, StreamState]:
        """The frozen pass: the states before each copied block and after the last one, by block number.

        Only the first keeps its text stream, from which the copies' own starts; the others would only hold memory.
        """
        wanted, kept = {*self.indices, backbone.facts.depth}, {}
        state = backbone.begin(x_BCHW, t_B, text)
        for k in range(backbone.facts.depth + 1):
            if k in wanted:
                kept[k] = state if k == self.indices[0] else state.with_(text=None)
            if k < backbone.facts.depth:
                state = backbone.run(k, state)
        return kept

    def predict(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float = 1.0
    ) -> Tensor:
        if scale == 0:
            with torch.no_grad():
                return backbone.predict(x_BCHW, t_B, text)
        frozen = self.frozen_features(backbone, x_BCHW, t_B, text)
        a_BTD, text_BLD = features, frozen[self.indices[0]].text
        for i, copied, connect in zip(self.indices, self.copies, self.connectors[:-1], strict=True):
            a_BTD, text_BLD = self._step(backbone, copied, connect, frozen[i], a_BTD, text_BLD, scale)
        last = frozen[backbone.facts.depth]
        joined = last.with_(x=self.connectors[-1](last.x, a_BTD, scale))
        out = backbone.end(joined, self.head)
        if scale == 1:
            return out
        # between 0 and 1 the heads are blended too, or scale -> 0 would not lead back to the backbone
        with torch.no_grad():
            frozen_head = backbone.end(joined)
        return scale * out + (1 - scale) * frozen_head

    def _step(
        self,
        backbone: Backbone,
        copied: nn.Module,
        connect: nn.Module,
        frozen: StreamState,
        a_BTD: Tensor,
        text_BLD: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """One connector and one copied block; features are arguments, so that recomputation sees this batch's."""
        grid = frozen.grid

        def forward(h_BTD: Tensor, a_BTD: Tensor, text_BLD: Tensor, time_BD: Tensor) -> tuple[Tensor, Tensor]:
            state = StreamState(connect(h_BTD, a_BTD, scale), text_BLD, time_BD, grid)
            after = backbone.run(copied, state)
            return after.x, after.text

        args = (frozen.x, a_BTD, text_BLD, frozen.time)
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)
        return forward(*args)
