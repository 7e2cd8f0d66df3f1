"""The embedded PixArt-alpha: a 3.5 M parameter `PixArtTransformer2DModel` with a tiny T5, trained on scenes.

The second half of the output channels, the learned variance, stays at zero: no sampler of the stock pipeline reads it.
"""

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from src.embedded.text import TEXT_TOKENS, t5_encoder, t5_tokenizer
from src.embedded.training import TinyModel
from src.embedded.vae import CHANNELS
from src.objectives import EpsilonPrediction

TEXT_WIDTH = 64
BETAS = {"beta_start": 0.0001, "beta_end": 0.02}  # the linear schedule of DiT, which PixArt-alpha keeps


def build_transformer(seed: int) -> PixArtTransformer2DModel:
    """Eight blocks of width 160 over 4x4 image tokens.

    Block tables, output and cross-attention outputs start at zero, as in PixArt-alpha (2310.00426, section 2.3) and DiT.
    """
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=8,
        num_attention_heads=5, attention_head_dim=32, cross_attention_dim=160, caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    for layer in [model.adaln_single.linear, model.proj_out, *(b.attn2.to_out[0] for b in model.transformer_blocks)]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
    return model


class TinyPixArt(TinyModel):
    """Transformer and text encoder, trained as one; predicts the noise."""

    def __init__(self, seed: int):
        super().__init__()
        self.transformer = build_transformer(seed)
        self.tokenizer = t5_tokenizer()
        self.text = t5_encoder(self.tokenizer, TEXT_WIDTH, seed + 1)
        self.objective = EpsilonPrediction("linear", **BETAS, native_law="flow")

    def tokens(self, captions: list[str]) -> Tensor:
        padded = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)
        return torch.tensor(padded.input_ids)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        mask_BL = ids_BL != self.tokenizer.pad_token_id
        tokens_BLD = self.text(ids_BL, attention_mask=mask_BL)[0]
        out = self.transformer(
            hidden_states=x_BCHW,
            encoder_hidden_states=tokens_BLD,
            encoder_attention_mask=mask_BL.to(x_BCHW.dtype),
            timestep=self.objective.to_model_time(t_B),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return out.chunk(2, 1)[0]

    def pipeline(self, vae: AutoencoderKL) -> PixArtAlphaPipeline:
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", **BETAS)
        return PixArtAlphaPipeline(self.tokenizer, self.text, vae, self.transformer, scheduler)
