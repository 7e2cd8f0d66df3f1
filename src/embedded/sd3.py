"""The embedded SD3: a 3.5 M parameter `SD3Transformer2DModel` with two tiny CLIPs, trained on scenes.

The T5 tokens are left out (`max_sequence_length=0`): the pipeline's default of 256 would add 256 equal tokens to 40 real
ones. Legend: B batch, L = 24 text tokens.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from src.embedded.text import TEXT_TOKENS, clip_encoder, clip_tokenizer, silent_t5, t5_tokenizer
from src.embedded.training import TinyModel
from src.embedded.vae import CHANNELS
from src.objectives import FlowMatching

TEXT_WIDTH = 64  # of each CLIP; their outputs side by side are the transformer's text tokens


def build_transformer(seed: int) -> SD3Transformer2DModel:
    """Six joint blocks of width 128 over 4x4 image tokens and 24 text tokens.

    Modulations and the output start at zero, as the DiT paper has it (2212.09748, section 3.2); diffusers' constructor
    leaves that to whoever trains from scratch.
    """
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=6,
        num_attention_heads=4, attention_head_dim=32, joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128, pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    zeros = [m.linear for b in model.transformer_blocks for m in (b.norm1, b.norm1_context)]
    for layer in [*zeros, model.norm_out.linear, model.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class TextStack(nn.Module):
    """Both CLIPs as the SD3 pipeline reads them: penultimate hidden states and projected pooled outputs, side by side."""

    def __init__(self, seed: int):
        super().__init__()
        self.tokenizer = clip_tokenizer()
        self.one = clip_encoder(self.tokenizer, TEXT_WIDTH, seed + 1)
        self.two = clip_encoder(self.tokenizer, TEXT_WIDTH, seed + 2)

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """-> text tokens (B, L, 128), pooled (B, 128)."""
        outs = [enc(ids_BL, output_hidden_states=True) for enc in (self.one, self.two)]
        return torch.cat([o.hidden_states[-2] for o in outs], -1), torch.cat([o.text_embeds for o in outs], -1)


class TinySD3(TinyModel):
    """Transformer and text encoders, trained as one; predicts the velocity."""

    def __init__(self, seed: int):
        super().__init__()
        self.transformer, self.text = build_transformer(seed), TextStack(seed)
        self.objective = FlowMatching()

    def tokens(self, captions: list[str]) -> Tensor:
        padded = self.text.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)
        return torch.tensor(padded.input_ids)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        tokens, pooled = self.text(ids_BL)
        return self.transformer(
            hidden_states=x_BCHW,
            timestep=self.objective.to_model_time(t_B),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        t5 = t5_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae,
            text_encoder=self.text.one,
            tokenizer=self.text.tokenizer,
            text_encoder_2=self.text.two,
            tokenizer_2=self.text.tokenizer,
            text_encoder_3=silent_t5(t5, 2 * TEXT_WIDTH),
            tokenizer_3=t5,
        )
