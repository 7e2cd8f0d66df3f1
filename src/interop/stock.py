"""An adapter in the words of diffusers: the class that holds the same network, its configuration, its parameters' names.

Export and import both read this table, so that a round trip cannot disagree with itself.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from src.adapters.base import ControlAdapter
from src.adapters.controlnet import ControlNet
from src.adapters.dit_controlnet import RULES, DiTControlNet
from src.adapters.t2i_adapter import T2IAdapter
from src.types import UserError

DROPIN = "write a drop-in network for the stock pipeline instead: form=dropin (src/interop/dropin.py)"


class NotPortable(UserError):
    """An adapter that no class of diffusers can hold; the message names the way that is left."""


@dataclass(frozen=True)
class StockForm:
    """kind: name of the class in diffusers; config: its constructor's arguments; names: ours -> its, of every tensor."""

    kind: str
    config: dict[str, Any]
    names: dict[str, str]


def stock_form(adapter: ControlAdapter) -> StockForm:
    """How diffusers holds this adapter. Raises NotPortable where it cannot, with what to do instead."""
    forms = {ControlNet: _controlnet, DiTControlNet: _sd3_controlnet, T2IAdapter: _t2i}
    if type(adapter) not in forms:
        raise NotPortable(f"adapter={adapter.name}: diffusers has no class for it; {DROPIN}")
    kind, config, prefixes = forms[type(adapter)](adapter)
    return StockForm(kind, config, {name: _renamed(name, prefixes) for name in adapter.state_dict()})


def _controlnet(adapter: ControlNet) -> tuple[str, dict[str, Any], dict[str, str]]:
    from diffusers import ControlNetModel

    backbone = adapter.backbone
    _refuse_hidden_layers(adapter)
    if not adapter.whole:
        raise NotPortable(f"adapter={adapter.name}: diffusers knows adapter.encoder_steps=null (all of them) only; {DROPIN}")
    if not adapter.has_middle:
        raise NotPortable(f"adapter={adapter.name}: diffusers' ControlNetModel wants a U-Net with a middle block; {DROPIN}")
    hint = adapter.hint
    config = _shared(ControlNetModel, backbone.net) | {
        "conditioning_channels": hint.conv_in.in_channels,
        "conditioning_embedding_out_channels": [hint.conv_in.out_channels, *(c.out_channels for c in hint.blocks[1::2])],
    }
    prefixes = {"entry.": "", "hint.": "controlnet_cond_embedding."}
    plans = backbone.step_plans()
    for number in range(len(adapter.copies)):
        for role, path in plans[number].names.items():
            prefixes[f"copies.{number}.parts.{role}."] = f"{path}."
    last = len(adapter.connectors) - 1
    prefixes |= {f"connectors.{i}.": f"controlnet_down_blocks.{i}." for i in range(last)}
    return "ControlNetModel", config, prefixes | {f"connectors.{last}.": "controlnet_mid_block."}


def _sd3_controlnet(adapter: DiTControlNet) -> tuple[str, dict[str, Any], dict[str, str]]:
    from diffusers import SD3ControlNetModel

    if not adapter.sd3:
        raise NotPortable(f"adapter={adapter.name} on PixArt: the diffusers library has no ControlNet class for it; {DROPIN}")
    _refuse_hidden_layers(adapter)
    depth, count = adapter.backbone.facts.depth, adapter.count
    if any(adapter.rule(i, depth, count) != RULES["proportional"](i, depth, count) for i in range(depth - 1)):
        raise NotPortable(
            f"adapter={adapter.name}: diffusers spreads residuals by adapter.index_rule=proportional alone; {DROPIN}"
        )
    config = _shared(SD3ControlNetModel, adapter.backbone.net) | {
        "num_layers": count,
        "extra_conditioning_channels": 0,
        "force_zeros_for_pooled_projection": False,  # see src/interop/export.py
    }
    prefixes = {"entry.": "", "copies.": "transformer_blocks.", "connectors.": "controlnet_blocks."}
    return "SD3ControlNetModel", config, prefixes | {"stem.": "pos_embed_input.proj."}


def _t2i(adapter: T2IAdapter) -> tuple[str, dict[str, Any], dict[str, str]]:
    from diffusers import T2IAdapter as Stock

    if not adapter.backbone.facts.spatial:
        raise NotPortable(f"adapter={adapter.name}: diffusers has T2I-Adapters for U-Nets only; {DROPIN}")
    if not isinstance(adapter.trunk, Stock):
        raise NotPortable(
            f"adapter={adapter.name}: diffusers knows adapter.channels=null (the U-Net's own widths) only; {DROPIN}"
        )
    return "T2IAdapter", _shared(Stock, adapter.trunk), {"trunk.": ""}


def _shared(kind: type, model: nn.Module) -> dict[str, Any]:
    """What a class's constructor takes from a model's configuration, as a copy.

    `SD3ControlNetModel.from_transformer` would write into the model's own, and the model would then be saved wrongly.
    """
    return {k: copy.deepcopy(model.config[k]) for k in inspect.signature(kind.__init__).parameters if k in model.config}


def _refuse_hidden_layers(adapter: ControlNet | DiTControlNet) -> None:
    if isinstance(adapter.connectors[0], nn.Sequential):
        raise NotPortable(
            f"adapter={adapter.name}: diffusers knows adapter.connector_width=null (no hidden layer) only; {DROPIN}"
        )


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    ours = next(p for p in prefixes if name.startswith(p))
    return prefixes[ours] + name.removeprefix(ours)
