"""The embedded Stable Diffusion 2.1: a 3 M parameter `UNet2DConditionModel` with a tiny CLIP, trained on scenes.

Like the 768-pixel model it predicts v, has linear projections around its attention, and a last level without attention.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from src.embedded.text import TEXT_TOKENS, clip_text_model, clip_tokenizer
from src.embedded.training import TinyModel
from src.embedded.vae import CHANNELS
from src.objectives import VPrediction

TEXT_WIDTH = 64
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}  # of Stable Diffusion


def build_unet(seed: int) -> UNet2DConditionModel:
    """Two levels, 64 channels at 8x8 (with attention) and 128 at 4x4 (without), and a middle with attention."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=(2, 4), norm_num_groups=16, use_linear_projection=True,
    )  # fmt: skip
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


class TinySD21(TinyModel):
    """U-Net and text encoder, trained as one; predicts v."""

    def __init__(self, seed: int):
        super().__init__()
        self.unet = build_unet(seed)
        self.tokenizer = clip_tokenizer()
        self.text = clip_text_model(self.tokenizer, TEXT_WIDTH, seed + 1)
        self.objective = VPrediction("scaled_linear", **BETAS, min_snr_gamma=5.0)

    def tokens(self, captions: list[str]) -> Tensor:
        padded = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)
        return torch.tensor(padded.input_ids)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        time = self.objective.to_model_time(t_B)
        return self.unet(x_BCHW, time, self.text(ids_BL)[0], return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", **BETAS, prediction_type="v_prediction", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        return StableDiffusionPipeline(
            vae, self.text, self.tokenizer, self.unet, scheduler, None, None, requires_safety_checker=False
        )
