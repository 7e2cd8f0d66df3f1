"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network reads the condition alone, once per picture, and adds
its features to the backbone's encoder.

On U-Nets it is diffusers' own `T2IAdapter`, and its features go where diffusers adds them: in front of each downsampler.
On transformers nothing was published; the form here is ours: the same trunk at the resolution of the tokens, its features
added to the image tokens in front of `levels` blocks, spread evenly over the first half.
Its layers start at random values, so the untrained adapter changes the prediction, as published.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.frozen import Walk
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, StreamState, TextCond

RESIDUAL_UNITS = {"full": 2, "light": 4}  # per stage, as published


class T2IAdapter(ControlAdapter):
    """T2I-Adapter.

    size: "full" or "light" (bottlenecks of a quarter of the width; U-Nets only); channels: widths of the stages; null: those
    of a U-Net's levels, as published, or `levels` times a transformer's width. Other widths than a U-Net's are brought to
    them by 1x1 convolutions; condition_space: "pixel", as published.
    """

    families: ClassVar = ("unet", "mmdit", "dit")
    grad_through_backbone: ClassVar = True
    identity_at_init: ClassVar = False

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        size: Literal["full", "light"] = "full",
        channels: tuple[int, ...] | None = None,
        levels: int = 3,
        condition_space: ConditionSpace = "pixel",
        checkpointing: Checkpointing = "none",
    ):
        chosen = {"size": size, "channels": channels, "levels": levels}
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, **chosen)
        facts = backbone.facts
        if facts.spatial:
            self.trunk = unet_trunk(backbone, size, list(channels) if channels else None)
            self.places = unet_places(backbone)
        else:
            widths = list(channels) if channels else [facts.width] * levels
            self.trunk = TokenTrunk(facts, widths)
            half = facts.depth // 2
            self.places = {int(n * half / len(widths)) - 1: n for n in range(len(widths))}  # behind which step; -1: in front

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        if options.get("condition_space", "pixel") != "pixel":
            return "it reads pictures: adapter.condition_space=pixel"
        channels, light = options.get("channels"), options.get("size") == "light"
        if facts.spatial:
            wanted = len(level_widths(facts))
            if channels and len(channels) != wanted:
                return f"adapter.channels={list(channels)}: this U-Net takes {wanted} features, so write {wanted} widths"
            if light and _is_xl(facts):
                return "adapter.size=light has no features of the sizes that SDXL takes; use adapter.size=full"
            return None
        stages, most = len(channels or ()) or options.get("levels", 3), facts.depth // 2
        if light:
            return "adapter.size=light is defined on U-Nets; on a transformer set adapter.channels"
        fits = 1 <= stages <= most
        return None if fits else f"{stages} stages do not fit into half of {facts.depth} blocks: adapter.levels={most} at most"

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any] | None:
        if facts.spatial:  # in the proportions of the levels
            levels = level_widths(facts)
            return {"channels": [max(1, width * w // levels[0]) for w in levels]}
        return {"channels": [width] * options.get("levels", 3)}

    def parts(self) -> dict[str, nn.Module]:
        return {"trunk": self.trunk}

    def encode_condition(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Pictures in [0, 1] -> one feature per stage: (B, D, H, W) maps, or tokens (B, T, D)."""
        return tuple(self.trunk(condition))

    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: tuple[Tensor, ...], scale: float
    ) -> Tensor:
        first = min(self.places)
        state = self._add(Walk(backbone, x_BCHW, t_B, text).at(first + 1), first, features, scale)
        for k in range(first + 1, backbone.facts.depth):
            state = self._add(self.recompute(backbone.run, k, state, frozen=True), k, features, scale)
        return backbone.end(state)

    def _add(self, state: StreamState, step: int, features: tuple[Tensor, ...], scale: float) -> StreamState:
        if step not in self.places or self.places[step] >= len(features):
            return state
        x, before = state.x + scale * features[self.places[step]], state.x
        # diffusers' addition also changes the skip that is stored last, where that is the same feature
        same = bool(state.skips) and state.skips[-1] is before
        return state.with_(x=x, skips=(*state.skips[:-1], x) if same else state.skips)


class TokenTrunk(nn.Module):
    """Condition pictures to one feature per stage, all at the resolution of a transformer's tokens."""

    def __init__(self, facts: BackboneFacts, widths: list[int]):
        from diffusers.models.adapter import AdapterBlock

        super().__init__()
        side = facts.factor * facts.patch
        self.unshuffle = nn.PixelUnshuffle(side)
        self.conv_in = nn.Conv2d(3 * side**2, widths[0], 3, padding=1)
        units = RESIDUAL_UNITS["full"]
        self.body = nn.ModuleList(AdapterBlock(a, b, units) for a, b in zip([widths[0], *widths[:-1]], widths, strict=True))
        self.out = nn.ModuleList(nn.Linear(w, facts.width) for w in widths)

    def forward(self, condition_B3HW: Tensor) -> list[Tensor]:
        x, found = self.conv_in(self.unshuffle(condition_B3HW)), []
        for stage, out in zip(self.body, self.out, strict=True):
            x = stage(x)
            found.append(out(x.flatten(2).transpose(1, 2)))
        return found


class WideTrunk(nn.Module):
    """diffusers' `T2IAdapter` with stages of other widths, brought to those of the U-Net's levels."""

    def __init__(self, stock: nn.Module, widths: list[int], levels: list[int]):
        super().__init__()
        self.stock = stock
        self.out = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, levels, strict=True))

    def forward(self, condition_B3HW: Tensor) -> list[Tensor]:
        return [out(f) for out, f in zip(self.out, self.stock(condition_B3HW), strict=False)]  # light: one feature too many


def unet_trunk(backbone: Backbone, size: str, channels: list[int] | None) -> nn.Module:
    """diffusers' `T2IAdapter` for a U-Net: its class, its sizes. SDXL's has another shape ("full_adapter_xl").

    diffusers' light one adds a stage of the last width by itself, which is the last level's where two levels are equally
    wide, as in Stable Diffusion; elsewhere it is one too many, and stays frozen.
    """
    from diffusers import T2IAdapter as Stock

    facts, xl = backbone.facts, _is_xl(backbone.facts)
    levels = level_widths(facts)
    widths = channels or levels
    kind = "full_adapter_xl" if xl and size == "full" else f"{size}_adapter"
    down = facts.factor * (2 if xl else 1)
    own = widths[:-1] if size == "light" and widths[-1] == widths[-2] else widths
    stock = Stock(in_channels=3, channels=own, num_res_blocks=RESIDUAL_UNITS[size], downscale_factor=down, adapter_type=kind)
    return stock if channels is None else WideTrunk(stock, widths, levels)


def unet_places(backbone: Backbone) -> dict[int, int]:
    """Step -> the feature that is added behind it: in a level with attention behind its last layer, in front of the
    downsampler; in one without behind all of the level; one feature more than levels goes behind the middle (SDXL)."""
    plans, places = backbone.step_plans(), {}
    for k, plan in enumerate(plans):
        if plan.kind == "down" and plan.last and "attention" in plan.names:
            places[k] = plan.level
        elif plan.kind in ("down", "downsample") and not backbone.facts.attends[plan.level]:
            places = {step: n for step, n in places.items() if n != plan.level} | {k: plan.level}
        elif plan.kind == "mid" and _is_xl(backbone.facts):
            places[k] = plan.level + 1
    return places


def level_widths(facts: BackboneFacts) -> list[int]:
    """Widths of the features that a U-Net takes: one per level, and for SDXL one more behind the middle."""
    return [*facts.levels, *([facts.levels[-1]] if _is_xl(facts) else [])]


def _is_xl(facts: BackboneFacts) -> bool:
    """SDXL starts with a level without attention, which is why its adapter is shaped differently."""
    return not facts.attends[0]
