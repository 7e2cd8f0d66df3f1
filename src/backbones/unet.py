"""Stable Diffusion 2.1 and SDXL: `UNet2DConditionModel` unrolled layer by layer.

Source of the order of operations: diffusers `models/unets/unet_2d_condition.py` and `unet_2d_blocks.py`, forward. A step is
one layer (a resnet, with its attention if it has one), one down- or upsampler, or the middle block. Encoder steps put
their output on the stack of skips, decoder layers take theirs from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone, constants
from src.objectives import Diffusion, diffusion_of
from src.text.stock import SDText, SDXLText
from src.types import BackboneFacts, StreamState, TextCond, UserError

KNOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
Kind = Literal["down", "downsample", "mid", "up", "upsample"]
STACK = {"down": 1, "downsample": 1, "up": -1}  # skips that a step adds to those that wait


@dataclass(frozen=True)
class Plan:
    """One step before any module exists. level: number of the down or up block; width: channels that it gives.

    names: role -> path of the module in the network. last: the last layer of its block (samplers not counted).
    """

    kind: Kind
    level: int
    width: int
    names: dict[str, str]
    last: bool = False


class UNetStep(nn.Module):
    """The modules of one step: the network's own, or deep copies of them."""

    def __init__(self, kind: Kind, **parts: nn.Module):
        super().__init__()
        self.kind = kind
        self.parts = nn.ModuleDict(parts)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of what runs: a step itself is never called."""
        for part in self.parts.values():
            part.compile(*args, **kwargs)


class UNet(Backbone):
    """Stable Diffusion 2.1 (2112.10752) and SDXL (2307.01952); see `Backbone`. SDXL's size conditions are those of an
    uncropped picture of the latents' own size."""

    NET: ClassVar = "unet"

    def _read_facts(self) -> BackboneFacts:
        net, vae = self.model.config(self.NET), self.model.config("vae")
        check_known(self.model.source, net, vae)
        factor, steps = 2 ** (len(vae["block_out_channels"]) - 1), plan_steps(net)
        clip = self.model.config("text_encoder")
        return BackboneFacts(
            family="unet",
            source=self.model.source,
            revision=self.model.resolved_revision,
            latent_channels=net["in_channels"],
            factor=factor,
            patch=1,
            multiple=factor * 2 ** sum(s.kind == "downsample" for s in steps),
            depth=len(steps),
            widths=(net["block_out_channels"][0], *(s.width for s in steps)),
            middle=next(i for i, s in enumerate(steps) if s.kind in ("mid", "up")),
            text_tokens=clip["max_position_embeddings"],
            text_width=net["cross_attention_dim"],
            pooled_width=self._pooled_width(net),
            levels=tuple(net["block_out_channels"]),
            stacked=tuple(accumulate((STACK.get(s.kind, 0) for s in steps), initial=1)),
            attends=tuple("CrossAttn" in kind for kind in net["down_block_types"]),
            licence_url=self.model.licence_url,
        )

    def _pooled_width(self, net: dict) -> int | None:
        if net.get("addition_embed_type") is None:
            return None
        return net["projection_class_embeddings_input_dim"] - 6 * net["addition_time_embed_dim"]

    @property
    def TEXT_PARTS(self) -> tuple[str, ...]:
        one = ("text_encoder", "tokenizer")
        return (*one, "text_encoder_2", "tokenizer_2") if "text_encoder_2" in self.model.config("") else one

    def _make_objective(self) -> Diffusion:
        return diffusion_of(self.model.config("scheduler"))

    def _load_text(self, folder: Path, device: torch.device) -> Callable[[list[str]], TextCond]:
        return (SDText if self.facts.pooled_width is None else SDXLText)(folder, device)

    def _adopt(self, net: nn.Module) -> None:
        super()._adopt(net)
        # a tuple hides the steps from the module tree, where every weight would stand twice
        self._steps = (make_steps(net, plan_steps(net.config)),)

    def steps(self) -> list[UNetStep]:
        return self._steps[0]

    def step_plans(self) -> list[Plan]:
        """What each step is; needs no weights."""
        return plan_steps(self.model.config(self.NET))

    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond, entry: nn.Module | None = None) -> StreamState:
        if entry is None:
            self.new_pass()
            entry = self._entry()
        dtype = entry["conv_in"].weight.dtype
        x_BCHW = x_BCHW.to(dtype)
        time_BD = entry["time_embedding"](self.net.time_proj(self.objective.to_model_time(t_B)).to(dtype))
        if text.pooled_BP is not None:
            time_BD = time_BD + entry["add_embedding"](self._size_conditions(x_BCHW, text.pooled_BP).to(dtype))
        x_BDHW = entry["conv_in"](x_BCHW)
        return StreamState(x_BDHW, text.tokens_BLD.to(dtype), time_BD, tuple(x_BCHW.shape[-2:]), skips=(x_BDHW,))

    def _size_conditions(self, x_BCHW: Tensor, pooled_BP: Tensor) -> Tensor:
        """SDXL's pooled text with original size, crop corner and target size, embedded, behind it."""
        h, w = (side * self.facts.factor for side in x_BCHW.shape[-2:])
        ids = constants((h, w, 0, 0, h, w), x_BCHW.device).repeat(len(x_BCHW))
        return torch.cat([pooled_BP.float(), self.net.add_time_proj(ids).reshape(len(x_BCHW), -1)], dim=-1)

    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        step = self.step_module(step)
        parts, x, skips = step.parts, state.x, state.skips
        if step.kind == "mid":
            return state.with_(x=self._middle(parts["block"], state))
        if step.kind == "upsample":
            return state.with_(x=parts["sampler"](x))
        if step.kind == "downsample":
            x = parts["sampler"](x)
            return state.with_(x=x, skips=(*skips, x))
        if step.kind == "up":
            x, skips = torch.cat([x, skips[-1]], dim=1), skips[:-1]
        x = parts["resnet"](x, state.time)
        if "attention" in parts:
            x = parts["attention"](x, encoder_hidden_states=state.text, return_dict=False)[0]
        return state.with_(x=x, skips=(*skips, x) if step.kind == "down" else skips)

    def _middle(self, block: nn.Module, state: StreamState) -> Tensor:
        if getattr(block, "has_cross_attention", False):
            return block(state.x, state.time, encoder_hidden_states=state.text)
        return block(state.x, state.time)

    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        head = self._head() if head is None else head
        return head["conv_out"](head["conv_act"](head["conv_norm_out"](state.x)))

    def _entry(self) -> nn.Module:
        names = ("conv_in", "time_embedding", *(["add_embedding"] if self.facts.pooled_width else []))
        return nn.ModuleDict({name: getattr(self.net, name) for name in names})

    def _head(self) -> nn.Module:
        return nn.ModuleDict({name: getattr(self.net, name) for name in ("conv_norm_out", "conv_act", "conv_out")})

    def _embed(self) -> nn.Module:
        return self.net.conv_in


def check_known(source: str, net: dict, vae: dict) -> None:
    """Refuse U-Nets whose forward has parts that are not unrolled here. Raises UserError."""
    absent = (
        "class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim", "encoder_hid_dim_type",
        "time_embedding_act_fn", "center_input_sample",
    )  # fmt: skip
    strange = [key for key in absent if net.get(key)]
    if net.get("addition_embed_type") not in (None, "text_time"):
        strange.append("addition_embed_type")
    strange += [key for key in ("down_block_types", "up_block_types") if not set(net[key]) <= KNOWN_BLOCKS]
    if net["in_channels"] != vae.get("latent_channels", 4):  # inpainting, upscaling
        strange.append("in_channels")
    if strange:
        key = strange[0]
        raise UserError(f"{source}: a U-Net with {key}={net[key]!r} is not supported: use a Stable Diffusion 1, 2 or XL one")


def plan_steps(config: Any) -> list[Plan]:
    """The steps of a U-Net configuration, in order."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    plans = []
    for level, (width, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
        for i in range(layers[level]):
            plans.append(Plan("down", level, width, _layer(f"down_blocks.{level}", i, kind), i == layers[level] - 1))
        if level < len(widths) - 1:
            plans.append(Plan("downsample", level, width, {"sampler": f"down_blocks.{level}.downsamplers.0"}))
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        plans.append(Plan("mid", len(widths) - 1, widths[-1], {"block": "mid_block"}))
    for level, (width, count, kind) in enumerate(zip(widths[::-1], layers[::-1], config["up_block_types"], strict=True)):
        for i in range(count + 1):
            plans.append(Plan("up", level, width, _layer(f"up_blocks.{level}", i, kind), i == count))
        if level < len(widths) - 1:
            plans.append(Plan("upsample", level, width, {"sampler": f"up_blocks.{level}.upsamplers.0"}))
    return plans


def _layer(block: str, i: int, kind: str) -> dict[str, str]:
    names = {"resnet": f"{block}.resnets.{i}"}
    return names | ({"attention": f"{block}.attentions.{i}"} if "CrossAttn" in kind else {})


def make_steps(net: nn.Module, plans: list[Plan]) -> list[UNetStep]:
    """The network's modules, step by step."""
    return [UNetStep(p.kind, **{role: net.get_submodule(name) for role, name in p.names.items()}) for p in plans]
