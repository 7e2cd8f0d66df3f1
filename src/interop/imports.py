"""Adapters that others trained, as ours: to evaluate a ControlNet or T2I-Adapter of the hub by the same measure.

Conditions then go through our codec and our text encoders. An `SD3ControlNetModel` with
`force_zeros_for_pooled_projection` was trained on zero pooled text and on a condition latent without the autoencoder's
shift; both are folded into its weights, exactly, so that it may be given what ours are given.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.base import ControlAdapter
from src.adapters.controlnet import ControlNet
from src.adapters.dit_controlnet import DiTControlNet
from src.adapters.t2i_adapter import T2IAdapter
from src.backbones.base import Backbone
from src.hub import hub_fault
from src.interop.stock import stock_form
from src.types import UserError

# no part of the function, or seen in the tensors' names and shapes
NO_MATTER = {"sample_size", "out_channels", "upcast_attention", "dual_attention_layers", "force_zeros_for_pooled_projection"}


class DoesNotFit(UserError):
    """A model of diffusers that is no adapter of this backbone; the message names the first difference."""


def import_adapter(source: str | Path, backbone: Backbone, revision: str | None = None) -> ControlAdapter:
    """A `ControlNetModel`, `SD3ControlNetModel` or `T2IAdapter` as our adapter of a loaded backbone, in evaluation mode.

    source: a folder, or a hub id (never asked about a folder); revision: hub branch, tag or commit. Raises DoesNotFit for
    another class, another shape or a form that ours does not have.
    """
    import diffusers

    folder = _local(source, revision)
    file = folder / "config.json"
    if not file.is_file():
        raise DoesNotFit(f"{source}: no config.json there; name the folder that `save_pretrained` wrote")
    config = json.loads(file.read_text())
    kind = config.get("_class_name")
    if kind not in MAKERS:
        raise DoesNotFit(f"{source} holds a {kind}; what can be read: {', '.join(MAKERS)}")
    stock = getattr(diffusers, kind)
    defaults = {k: p.default for k, p in inspect.signature(stock.__init__).parameters.items() if k != "self"}
    config = defaults | {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        adapter = MAKERS[kind](config, backbone)
    except UserError as reason:
        raise DoesNotFit(f"{source} ({kind}): {reason}") from None
    form = stock_form(adapter)
    different = [k for k, v in form.config.items() if k not in NO_MATTER and not _same(config[k], v)]
    if different:
        key = different[0]
        raise DoesNotFit(f"{source} ({kind}): {key}={config[key]!r}, and {backbone.facts.source} wants {form.config[key]!r}")
    model = stock.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    state = model.state_dict()
    if config.get("force_zeros_for_pooled_projection"):
        _fold_zero_text_and_shift(state, backbone)
    _check_shapes(source, state, {form.names[name]: tensor for name, tensor in adapter.state_dict().items()})
    adapter.load_state_dict({name: state[theirs] for name, theirs in form.names.items()})
    return adapter.to(next(backbone.net.parameters()).device).eval()


def _controlnet(config: dict[str, Any], backbone: Backbone) -> ControlAdapter:
    if config["controlnet_conditioning_channel_order"] != "rgb" or config["global_pool_conditions"]:
        raise DoesNotFit("conditions in BGR order or with pooled residuals are not supported: only plain RGB ones are")
    hint = tuple(config["conditioning_embedding_out_channels"])
    return ControlNet(backbone, backbone.objective, None, "controlnet", hint_channels=hint)


def _sd3_controlnet(config: dict[str, Any], backbone: Backbone) -> ControlAdapter:
    if config["joint_attention_dim"] is None or not config["use_pos_embed"]:
        raise DoesNotFit(
            "it has the official SD3.5-large form (SD3SingleTransformerBlock: no text stream, image tokens embedded by the "
            "backbone), and ours copies joint blocks; sample it with diffusers' StableDiffusion3ControlNetPipeline"
        )
    if config["extra_conditioning_channels"]:
        extra = config["extra_conditioning_channels"]
        raise DoesNotFit(f"extra_conditioning_channels={extra}: it also reads a mask (inpainting), and ours a condition alone")
    return DiTControlNet(backbone, backbone.objective, None, "dit_controlnet", blocks=config["num_layers"])


def _t2i(config: dict[str, Any], backbone: Backbone) -> ControlAdapter:
    if not backbone.facts.spatial:
        raise DoesNotFit(f"diffusers' T2I-Adapters are made for U-Nets, and {backbone.facts.source} is none")
    size = "light" if config["adapter_type"] == "light_adapter" else "full"
    return T2IAdapter(backbone, backbone.objective, None, "t2i_adapter", size=size)


MAKERS: dict[str, Callable[[dict[str, Any], Backbone], ControlAdapter]] = {
    "ControlNetModel": _controlnet,
    "SD3ControlNetModel": _sd3_controlnet,
    "T2IAdapter": _t2i,
}


def _fold_zero_text_and_shift(state: dict[str, Tensor], backbone: Backbone) -> None:
    """Make the real pooled text count as zeros, and (z - shift) * scale as z * scale: the patches do not overlap and are
    not padded, so a constant in the latent is one in the bias."""
    vae = backbone.model.config("vae")
    offset = (vae.get("shift_factor") or 0.0) * vae["scaling_factor"]
    state["time_text_embed.text_embedder.linear_1.weight"].zero_()
    weight = state["pos_embed_input.proj.weight"]
    state["pos_embed_input.proj.bias"] += weight.double().sum(dim=(1, 2, 3)).float() * offset


def _check_shapes(source: str | Path, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name in sorted(theirs.keys() ^ ours.keys()):
        raise DoesNotFit(f"{source}: the tensor {name} is {'missing' if name in ours else 'one too many'} for this backbone")
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise DoesNotFit(f"{source}: {name} is {tuple(tensor.shape)}, this backbone's {tuple(ours[name].shape)}")


def _same(one: Any, other: Any) -> bool:
    """Equal, where a list may stand for a tuple and one number for a list of equal ones (heads or layers per level)."""
    many = [x for x in (one, other) if isinstance(x, list | tuple)]
    if len(many) == 1:
        single = other if many[0] is one else one
        return all(x == single for x in many[0])
    return list(one) == list(other) if many else one == other


def _local(source: str | Path, revision: str | None) -> Path:
    """A folder on this machine. A hub id is downloaded where it is not cached."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise DoesNotFit(f"{source} is not a folder and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted, ignore_patterns=["*.fp16.*"]))
    except Exception as error:
        if hub_fault(error) is None:
            raise
        raise DoesNotFit(
            f"{source} is not cached here and cannot be had from the hub ({type(error).__name__}): check the spelling and "
            f"`hf auth login`, or download it elsewhere (`hf download {source}`) and name the folder"
        ) from error
