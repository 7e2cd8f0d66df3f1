"""A controlled network in the place of a stock pipeline's own: schedulers, guidance and offloading of diffusers keep working.

    network = ControlledNetwork.from_pretrained("folder").set_condition(picture)
    pipe = StableDiffusion3Pipeline.from_pretrained(backbone, transformer=network)   # or unet=network
    pipe("a red ball").images[0]

It works with every adapter, and is the way out of this project for those that diffusers has no class for. A saved folder
holds the adapter's weights and configuration and says which backbone it wants. A whole pipeline can be saved and loaded
too; before loading, this module must have been imported (diffusers imports no foreign code by itself).

Not supported, and refused: residuals of a ControlNet on top, IP-Adapters, LoRA scales, skip-layer guidance.
On schedulers whose timesteps fall between training steps (Euler on a diffusion model), the nearest step is taken.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.adapters.base import ControlAdapter
from src.backbones.base import Backbone
from src.types import Features, TextCond, UserError

WEIGHTS, CONFIG, PARTS = "adapter.safetensors", "config.json", ("backbone", "adapter")
# what the stock networks call our inputs: latents and text mask
LATENTS = {"mmdit": "hidden_states", "dit": "hidden_states", "unet": "sample"}
TEXT_MASK = {"dit": "encoder_attention_mask"}


class DropinError(UserError):
    """A drop-in network that lacks something: a condition, its backbone, a configuration to be saved with."""


class ControlledNetwork(ModelMixin, ConfigMixin):
    """A frozen network with its adapter, called like the network alone; `config` is the network's own.

    backbone, adapter: loaded, the adapter made for this backbone; cfg: the configuration (keys `backbone` and `adapter`)
    that both were made from, needed to save. `scale`: strength of the control, may be changed between pictures or steps;
    0 is exactly the network alone.
    """

    def __init__(self, backbone: Backbone, adapter: ControlAdapter, cfg: Mapping[str, Any] | None = None):
        super().__init__()
        if adapter.backbone.net is not backbone.net:
            raise ValueError("the adapter was made for another backbone object")
        self.net, self.adapter = backbone.net, adapter
        self._frozen = (backbone,)  # a tuple hides it from the module tree, which holds its network already
        self._internal_dict = FrozenDict(backbone.net.config)
        self._nodes = None if cfg is None else {part: _plain(cfg[part]) for part in PARTS}
        self._origin: tuple[str | None, torch.dtype] = (None, self.dtype)  # hash of the network in this precision
        self._codec: tuple = ()
        self.scale = 1.0
        self.clear_condition()
        self.eval()

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen network; the adapter may be kept in another."""
        return next(self.net.parameters()).dtype

    # ---- the condition --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_condition(self, condition: Any, scale: float = 1.0) -> "ControlledNetwork":
        """Read the condition, once for all steps. Returns self.

        condition: a picture (PIL) or (3, H, W) floats in [0, 1], of the size of the picture to be drawn; or a list, or a
        (B, 3, H, W) tensor: then one for each latent that the pipeline draws (prompts x images per prompt). One condition
        serves any number. Raises DropinError for a range or a size that does not fit.
        """
        pictures = _pictures(condition)
        facts, device = self.backbone.facts, next(self.adapter.parameters()).device
        self._check_size(pictures)
        if self.adapter.condition_space == "latent":
            self._codec = self._codec or (self.backbone.load_codec(device),)
            pictures = self._codec[0].to(device).encode(pictures)
        with self._autocast(device):
            features = self.adapter.encode_condition(pictures.to(device))
        self._features, self.scale = features, scale
        self._grid = tuple(side // facts.factor for side in self._size)
        return self

    def clear_condition(self) -> None:
        """Forget the condition: the next call refuses until another is set, or scale is 0."""
        self._features: Features | None = None
        self._grid: tuple[int, int] | None = None

    def _check_size(self, pictures: Tensor) -> None:
        self._size, multiple = tuple(pictures.shape[-2:]), self.backbone.facts.multiple
        if any(side % multiple for side in self._size):
            h, w = self._size
            raise DropinError(f"the condition is {w} x {h} pixels: both must be multiples of {multiple}; scale or crop it")

    # ---- the network's call ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """With the arguments of the stock network's own forward. -> its output class, or a tuple for return_dict=False.

        Sizes that PixArt and SDXL are told are those of the latents, as in training. PixArt's learned variance, which its
        pipeline cuts off, is zeros. Raises DropinError for an argument that would change the result and is not supported.
        """
        given = dict(inspect.signature(self.net.forward).bind(*args, **kwargs).arguments)
        family, return_dict = self.backbone.facts.family, given.pop("return_dict", True)
        x_BCHW, timestep = given.pop(LATENTS[family]), given.pop("timestep")
        text = self._text(given)
        surplus = [name for name, value in given.items() if value is not None and value != {}]
        if surplus:
            raise DropinError(f"{surplus[0]} is not supported by ControlledNetwork; call the pipeline without it")
        t_B = torch.as_tensor(timestep, device=x_BCHW.device).double().expand(len(x_BCHW))
        t_B = self.backbone.objective.from_model_time(t_B).float()
        features = self._features_for(x_BCHW)
        with self._autocast(x_BCHW.device):
            said = self.adapter.predict(self.backbone, x_BCHW, t_B, text, features, self.scale).to(x_BCHW.dtype)
        missing = (self.net.config.out_channels or said.shape[1]) - said.shape[1]
        if missing:
            said = torch.cat([said, said.new_zeros(len(said), missing, *said.shape[2:])], dim=1)
        if not return_dict:
            return (said,)
        return (UNet2DConditionOutput if family == "unet" else Transformer2DModelOutput)(sample=said)

    def _text(self, given: dict[str, Any]) -> TextCond:
        """Take the text out of the arguments."""
        facts = self.backbone.facts
        tokens, pooled = given.pop("encoder_hidden_states"), given.pop("pooled_projections", None)
        mask, added = given.pop(TEXT_MASK.get(facts.family), None), given.pop("added_cond_kwargs", None) or {}
        if facts.family == "unet" and facts.pooled_width is not None:
            pooled = added["text_embeds"]
        if facts.text_mask and mask is None:
            mask = tokens.new_ones(tokens.shape[:2])
        return TextCond(tokens, pooled, mask)

    def _features_for(self, x_BCHW: Tensor) -> Features | None:
        """The condition's features for a batch: each is used as often as guidance and the number of pictures ask."""
        if self._features is None:
            if self.scale == 0:
                return None
            raise DropinError("no condition: call set_condition(picture) first, or set scale = 0 for the network alone")
        if tuple(x_BCHW.shape[-2:]) != self._grid:
            (h, w), factor = x_BCHW.shape[-2:], self.backbone.facts.factor
            raise DropinError(
                f"the condition is {self._size[1]} x {self._size[0]} pixels, the picture {w * factor} x {h * factor}: give "
                "the pipeline the condition's height and width, or scale the condition"
            )
        batch = len(x_BCHW)

        def fit(f: Tensor) -> Tensor:
            if batch not in (len(f), 2 * len(f)) and len(f) != 1:
                raise DropinError(f"{len(f)} conditions for a batch of {batch}: give one, or one for each picture")
            return f.to(x_BCHW.device).repeat(batch // len(f), *[1] * (f.ndim - 1))  # guidance: two halves, one after another

        return fit(self._features) if isinstance(self._features, Tensor) else tuple(fit(f) for f in self._features)

    def _autocast(self, device: torch.device) -> Any:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    # ---- folders --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **_ignored: Any) -> None:
        """Write the adapter's weights, both configurations and the backbone's hash; nothing of the backbone."""
        if self._nodes is None:
            raise DropinError("to be saved, ControlledNetwork(backbone, adapter, cfg) needs the configuration of both")
        known, dtype = self._origin
        if known is None:
            if self.dtype != dtype:
                raise DropinError(f"save before casting: the backbone cannot be identified in {self.dtype}, only in {dtype}")
            self._origin = (known := self.backbone.weight_hash(), dtype)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.adapter.state_dict().items()}, folder / WEIGHTS)
        about = {"_class_name": type(self).__name__, **self._nodes}
        about |= {"backbone_hash": known, "backbone_dtype": str(dtype).removeprefix("torch.")}
        (folder / CONFIG).write_text(json.dumps(about, indent=1))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        backbone: str | Path | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **_ignored: Any,
    ) -> "ControlledNetwork":
        """Read a folder of `save_pretrained`, and the backbone that it names.

        backbone: where that is now, as a folder or hub id (None: where it was); torch_dtype, dtype: cast to it after
        loading. Raises DropinError for a folder of another kind and for another backbone.
        """
        from src.construct import construct, partial

        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        about = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        if about.get("_class_name") != cls.__name__:
            raise DropinError(f"{folder} is no folder that {cls.__name__}.save_pretrained wrote")
        if device_map is not None:
            raise DropinError("device_map is not supported: load the pipeline, then move it with pipe.to(device)")
        nodes = {part: dict(about[part]) for part in PARTS}
        if backbone is not None:
            nodes["backbone"]["source"] = str(backbone)
        trained_in = getattr(torch, about["backbone_dtype"])
        made = construct(nodes["backbone"]).load(torch.device("cpu"), trained_in)
        if (found := made.weight_hash()) != about["backbone_hash"]:
            raise DropinError(
                f"{made.facts.source} has the hash {found}; the adapter in {folder} was trained on {about['backbone_hash']}: "
                "give its own backbone as from_pretrained(..., backbone=<folder>)"
            )
        adapter = partial(nodes["adapter"])(made, made.objective, None)
        adapter.load_state_dict(load_file(folder / WEIGHTS))
        network = cls(made, adapter, nodes)
        network._origin = (found, trained_in)
        wanted = dtype or torch_dtype
        return network if wanted in (None, trained_in) else network.to(dtype=wanted)


def _plain(node: Any) -> dict[str, Any]:
    """A configuration node without what only a training reads."""
    from omegaconf import DictConfig, OmegaConf

    from src.config.signatures import BESIDE

    node = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    return {k: v for k, v in node.items() if k not in BESIDE["adapter"]}


def _pictures(condition: Any) -> Tensor:
    """Anything that shows pictures -> (B, 3, H, W) float32 in [0, 1]."""
    if not isinstance(condition, Tensor):
        given = list(condition) if isinstance(condition, Sequence) else [condition]
        sizes = {p.size for p in given}
        if len(sizes) > 1:
            raise DropinError(f"the conditions have several sizes: {sorted(sizes)}; they must have one")
        condition = torch.stack([_channels(p) for p in given])
    pictures = (condition if condition.ndim == 4 else condition[None]).float()
    low, high = float(pictures.min()), float(pictures.max())
    if pictures.ndim != 4 or pictures.shape[1] != 3 or low < 0 or high > 1:
        shape = tuple(condition.shape)
        raise DropinError(f"a condition tensor is (3, H, W) or (B, 3, H, W) in [0, 1]; got {shape} in [{low:g}, {high:g}]")
    return pictures


def _channels(picture: Any) -> Tensor:
    """A PIL picture of any mode -> (3, H, W) float32 in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0).float() / 255
