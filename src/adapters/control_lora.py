"""Control LoRA: the backbone itself reads the condition, through a widened input, and its layers learn low-rank changes.

Source of the form: diffusers `examples/flux-control/train_control_lora_flux.py`. The condition's latent is stacked upon the
noisy one, which the embedding reads through new input channels that start at zero; every linear layer of attention and
feed-forward gets LoRA (Hu et al. 2021, arXiv 2106.09685), y = W x + B A x with B = 0 at the start. Written here as a sum of
two embeddings, which is the same. No extra tokens and no second network: sampling costs what the backbone costs, and a
LoRA's arithmetic. The gradient crosses the whole frozen trunk.

Not to be confused with Stability's Control-LoRA, a ControlNet whose copy is written as low-rank changes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.parts import ConditionStem, zeroed
from src.backbones.base import Backbone
from src.backbones.quantize import QuantizedLinear
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, StreamState, TextCond

# parts of a layer's name, in diffusers' blocks: attn, attn1, attn2; ff, ff_context
TARGETS = {"attention": ("attn",), "all": ("attn", "ff")}


class ControlLoRA(ControlAdapter):
    """LoRA with the condition at the input.

    rank: inner width of every LoRA, whose alpha is the rank; targets: "attention", its linear layers alone, or "all", those of
    the feed-forward networks as well, as published.
    """

    families: ClassVar = ("mmdit", "dit", "unet")
    grad_through_backbone: ClassVar = True
    identity_at_init: ClassVar = True
    reaches_into_blocks: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        rank: int = 16,
        targets: Literal["attention", "all"] = "all",
        condition_space: ConditionSpace = "latent",
        checkpointing: Checkpointing = "none",
    ):
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, rank=rank)
        self.stem = zeroed(ConditionStem(backbone, condition_space))
        self.places = [lora_places(backbone, k, targets) for k in range(backbone.facts.depth)]
        self.lora = nn.ModuleList(self._loras(backbone, k, rank) for k in range(backbone.facts.depth))

    def _loras(self, backbone: Backbone, step: int, rank: int) -> nn.ModuleList:
        """One per place of a step."""
        layers = [backbone.step_module(step).get_submodule(place) for place in self.places[step]]
        return nn.ModuleList(LoRA(layer.in_features, layer.out_features, rank) for layer in layers)

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        if options.get("condition_space", "latent") != "latent":
            return "it reads the condition beside the noisy latent: adapter.condition_space=latent"
        if options.get("rank", 16) < 1:
            return f"adapter.rank={options['rank']}: the inner width of a LoRA is 1 or more"
        return super().refusal(facts)

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any]:
        return {"rank": width}

    def parts(self) -> dict[str, nn.Module]:
        return {"stem": self.stem, "lora": self.lora}

    def encode_condition(self, condition: Tensor) -> Tensor:
        """Latents -> what they add to the first features: (B, T, D), or (B, D, H, W) on a U-Net."""
        return self.stem(condition)

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float
    ) -> Tensor:
        with torch.no_grad():
            state = backbone.begin(x_BCHW, t_B, text)
        x = state.x + scale * features
        state = state.with_(x=x, skips=(x,) if state.skips else ())
        for k in range(backbone.facts.depth):
            state = self.recompute(self._run, backbone, k, state, scale, frozen=True)
        return backbone.end(state)

    def _run(self, backbone: Backbone, step: int, state: StreamState, scale: float) -> StreamState:
        """A frozen step with its LoRA; whole in here, since checkpointing calls it once more."""
        with changed(backbone.step_module(step), self.places[step], self.lora[step], scale):
            return backbone.run(step, state)


class LoRA(nn.Module):
    """B A x, (..., in_features) -> (..., out_features), without bias; zero until B is trained."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = zeroed(nn.Linear(rank, out_features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@contextmanager
def changed(step: nn.Module, places: list[str], loras: nn.ModuleList, scale: float) -> Iterator[None]:
    """While inside, the layers of a step at these names give their output plus `scale` times their LoRA's."""
    with ExitStack() as stack:
        for place, lora in zip(places, loras, strict=True):

            def add(_layer: nn.Module, inputs: tuple[Tensor], output: Tensor, lora: nn.Module = lora) -> Tensor:
                return torch.add(output, lora(inputs[0]), alpha=scale)  # one pass over memory, not two

            stack.callback(step.get_submodule(place).register_forward_hook(add).remove)
        yield


def lora_places(backbone: Backbone, step: int, targets: str) -> list[str]:
    """Names of the linear layers of a step that get a LoRA. Those whose output is thrown away, as the last SD3 block's queries
    of the text, get none."""
    module = backbone.step_module(step)
    vain = set(backbone.thrown_away(module, ()))
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
        and any(part.startswith(TARGETS[targets]) for part in name.split("."))
        and f"{name}.weight" not in vain
    ]
