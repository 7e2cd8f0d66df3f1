"""Trained adapters as models of diffusers, loadable by `from_pretrained` of the stock class.

ControlNet on a U-Net becomes `ControlNetModel`, DiT-ControlNet on SD3 `SD3ControlNetModel`, T2I-Adapter on a U-Net
`T2IAdapter`. All parameters are there, those that training froze as dead too.

What `StableDiffusion3ControlNetPipeline` does to a condition, and what is done about it (diffusers 0.42):
range: pictures are normalised to [-1, 1], as our codec has it (published trainings used [0, 1]). A tensor is taken as it
is: give [-1, 1], or a picture.
pooled text: with `force_zeros_for_pooled_projection` the ControlNet is fed zeros, and we train with the real one. The
exported configuration says False. The pipeline then evaluates `controlnet_pooled_projections or pooled_prompt_embeds`,
which fails on a tensor and is right for None, the default: leave that argument out.
VAE shift: skipped with the same flag, applied by our codec; with the flag False the pipeline applies it.
posterior: the pipeline draws the condition's latent from the autoencoder's posterior, we take its mode. The exported
model cannot change that; the difference is the posterior's spread, small for a trained autoencoder.

`StableDiffusionControlNetPipeline` and `StableDiffusionAdapterPipeline` read pictures in [0, 1], as we do.
`UNet2DConditionModel` pops from the list of T2I features that it is given: who calls it directly must give a new list
at each step (the pipeline does).
"""

from pathlib import Path

import torch
from torch import nn

from src.adapters.base import ControlAdapter
from src.interop.stock import stock_form


def stock_model(adapter: ControlAdapter) -> nn.Module:
    """The adapter as a model of diffusers that shares its tensors. Raises NotPortable where diffusers has no such class."""
    import diffusers

    form = stock_form(adapter)
    with torch.device("meta"):
        model = getattr(diffusers, form.kind)(**form.config)
    state = {form.names[name]: tensor.detach() for name, tensor in adapter.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def export_adapter(adapter: ControlAdapter, folder: str | Path) -> str:
    """Write config.json and the weights (safetensors) to a folder. -> the name of the diffusers class that reads it."""
    model = stock_model(adapter)
    model.save_pretrained(folder)
    return type(model).__name__
