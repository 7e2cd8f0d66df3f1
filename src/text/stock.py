"""Captions to a backbone's text condition, through the stock pipelines' own `encode_prompt`.

Each class is read from a model folder and called with captions; captions are cut to what the encoders can read. Results
are float32 on the CPU. On a GPU the encoders run in half precision.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.hub import from_safetensors
from src.types import TextCond


class StockText:
    """A diffusers pipeline of which only the text encoders are loaded."""

    def __init__(self, kind: type, folder: Path, device: torch.device, **parts: Any):
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.pipe = from_safetensors(kind, folder, **parts, dtype=dtype)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and not next(part.parameters()).is_meta:
                part.to(device)
        self.device = device
        self.limits: dict[str, int] = {}  # tokenizers of which fewer tokens are read than they say of themselves; 0: unused

    def lengths(self, captions: list[str]) -> dict[str, tuple[int, list[int]]]:
        """Tokenizer -> how many tokens are read of a caption, and how many each has, with the marks of beginning and end."""
        found = {}
        for name in sorted(n for n in self.pipe.components if n.startswith("tokenizer")):
            tokenizer, limit = self.pipe.components[name], self.limits.get(name)
            if tokenizer is not None and limit != 0:
                ids = tokenizer(captions, verbose=False)["input_ids"]
                found[name] = (limit or tokenizer.model_max_length, [len(i) for i in ids])
        return found


class SD3Text(StockText):
    """Two CLIPs and, with t5_tokens > 0, a T5.

    With t5_tokens = 0 the T5 is not loaded: 9 GB saved for the full-size model, at some loss of long prompts.
    """

    def __init__(self, folder: Path, device: torch.device, transformer_config: dict, t5_tokens: int):
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        with torch.device("meta"):  # the pipeline asks the transformer for its text width; its weights are not needed
            shape_only = SD3Transformer2DModel.from_config(transformer_config)
        without_t5 = {} if t5_tokens else {"text_encoder_3": None, "tokenizer_3": None}
        super().__init__(StableDiffusion3Pipeline, folder, device, transformer=shape_only, vae=None, **without_t5)
        self.t5_tokens, self.limits = t5_tokens, {"tokenizer_3": t5_tokens}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> TextCond:
        """-> tokens (B, L, D) and pooled (B, P)."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            captions, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_tokens
        )
        return TextCond(tokens.float().cpu(), pooled.float().cpu())


class PixArtText(StockText):
    """A T5, padded to `text_tokens` and masked. The pipeline writes prompts in small letters."""

    def __init__(self, folder: Path, device: torch.device, text_tokens: int):
        from diffusers import PixArtAlphaPipeline

        super().__init__(PixArtAlphaPipeline, folder, device, transformer=None, vae=None)
        self.text_tokens, self.limits = text_tokens, {"tokenizer": text_tokens}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> TextCond:
        """-> tokens (B, L, D) and mask (B, L)."""
        tokens, mask, _, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_tokens
        )
        return TextCond(tokens.float().cpu(), None, mask.float().cpu())


class SDText(StockText):
    """Stable Diffusion's one CLIP."""

    def __init__(self, folder: Path, device: torch.device):
        from diffusers import StableDiffusionPipeline

        without = dict.fromkeys(("unet", "vae", "safety_checker", "feature_extractor", "image_encoder"))
        super().__init__(StableDiffusionPipeline, folder, device, **without, requires_safety_checker=False)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> TextCond:
        """-> tokens (B, L, D)."""
        tokens, _ = self.pipe.encode_prompt(captions, self.device, 1, False)
        return TextCond(tokens.float().cpu())


class SDXLText(StockText):
    """SDXL's two CLIPs. The empty caption is all zeros where the model wants it so, as its pipeline has it for guidance."""

    def __init__(self, folder: Path, device: torch.device):
        from diffusers import StableDiffusionXLPipeline

        without = dict.fromkeys(("unet", "vae", "feature_extractor", "image_encoder"))
        super().__init__(StableDiffusionXLPipeline, folder, device, **without, add_watermarker=False)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> TextCond:
        """-> tokens (B, L, D) and pooled (B, P)."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        cond = TextCond(tokens.float().cpu(), pooled.float().cpu())
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return cond
        return cond.where(torch.tensor([bool(c) for c in captions]), cond[:1].map(torch.zeros_like))
