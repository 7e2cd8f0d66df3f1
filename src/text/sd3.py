"""Captions to SD3's text condition, through the stock pipeline's own `encode_prompt`."""

from pathlib import Path

import torch

from src.types import TextCond


class SD3Text:
    """Two CLIPs and, with t5_tokens > 0, a T5, read from a model folder.

    With t5_tokens = 0 the T5 is not loaded: 9 GB saved for the full-size model, at some loss of long prompts.
    """

    def __init__(self, folder: Path, transformer_config: dict, t5_tokens: int, device: torch.device):
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        with torch.device("meta"):  # the pipeline asks the transformer for its text width; its weights are not needed
            shape_only = SD3Transformer2DModel.from_config(transformer_config)
        without_t5 = {} if t5_tokens else {"text_encoder_3": None, "tokenizer_3": None}
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.pipe = StableDiffusion3Pipeline.from_pretrained(
            folder, transformer=shape_only, vae=None, **without_t5, dtype=dtype, local_files_only=True
        )
        for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3):
            if encoder is not None:
                encoder.to(device)
        self.t5_tokens, self.device = t5_tokens, device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> TextCond:
        """-> tokens (B, L, D) and pooled (B, P), float32 on the CPU. Captions are cut to what the encoders can read."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            captions, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_tokens
        )
        return TextCond(tokens.float().cpu(), pooled.float().cpu())
