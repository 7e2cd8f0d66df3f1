"""UniCon (ICLR 2025, arXiv 2503.17221): the copy reads the frozen backbone and makes the prediction itself.

The frozen network runs forward only, under no_grad: nothing flows back into it and none of its activations is stored.
There is no public code of the authors; `lixirui142/UniCon` is another method of the same name. Where the paper is
silent: the copies' own stream is the shortcut of the connectors (see `UniCon.shortcut`), the copies carry their own text
stream, and the head is copied too, so that no gradient has to cross a frozen layer.
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
    connector: how two features join, a key of `CONNECTORS`;
    shortcut: which of the two goes on unchanged while the connectors are untrained. "adapter": the copies' stream, into
    which frozen features flow. "frozen": the frozen feature, so that the copies speak only through zero-initialised
    layers, K + 1 of them in a row between condition and output; it learns far more slowly (experiments/README.md);
    condition_space: "latent" sends the condition through the autoencoder, as the paper does; "pixel" does not;
    checkpointing: recompute the copied blocks in the backward pass.

    With copied blocks i = first..K-1, frozen features h_i before block i and condition tokens c:
    a = join(h_first, c), then a = copy_i(a), a = join(a, h_(i+1)) for each i; prediction = head(a).
    With shortcut="frozen" the later joins are join(h_(i+1), a). Both give exactly the backbone before training.
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
        shortcut: Literal["adapter", "frozen"] = "adapter",
        condition_space: ConditionSpace = "latent",
        checkpointing: bool = False,
    ):
        super().__init__(backbone, objective, optimizer, name, condition_space)
        self.indices = copied_steps(backbone.facts.depth, copy)
        self.shortcut, self.checkpointing = shortcut, checkpointing
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
        """The frozen pass: the states before the first copied block and after each, by the number of the next block.

        Only the first keeps its text stream, from which the copies' own starts; the others would only hold memory.
        """
        wanted, kept = {self.indices[0], *(i + 1 for i in self.indices)}, {}
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
        first, depth = self.indices[0], backbone.facts.depth
        a_BTD, text_BLD = self.connectors[0](frozen[first].x, features), frozen[first].text
        for i, copied, join in zip(self.indices, self.copies, self.connectors[1:], strict=True):
            a_BTD, text_BLD = self._step(backbone, copied, join, frozen[i + 1], a_BTD, text_BLD)
        out = backbone.end(frozen[depth].with_(x=a_BTD), self.head)
        if scale == 1:
            return out
        with torch.no_grad():
            alone = backbone.end(frozen[depth])
        return alone + scale * (out - alone)

    def _step(
        self, backbone: Backbone, copied: nn.Module, join: nn.Module, after: StreamState, a_BTD: Tensor, text_BLD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One copied block and the join with the frozen feature after its original.

        Features are arguments of what is checkpointed: kept elsewhere, recomputation could see another batch's.
        """
        grid, own_first = after.grid, self.shortcut == "adapter"

        def forward(a_BTD: Tensor, text_BLD: Tensor, time_BD: Tensor, h_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
            state = backbone.run(copied, StreamState(a_BTD, text_BLD, time_BD, grid))
            return (join(state.x, h_BTD) if own_first else join(h_BTD, state.x)), state.text

        args = (a_BTD, text_BLD, after.time, after.x)
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)
        return forward(*args)
