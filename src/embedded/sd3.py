"""The embedded SD3: a 3.5 M parameter `SD3Transformer2DModel` with two tiny CLIPs, trained on scenes.

Text encoders and transformer learn together. The T5 tokens are left out (`max_sequence_length=0`): the pipeline's
default of 256 would add 256 equal tokens to 40 real ones. Legend: N scenes, B batch, L = 24 text tokens.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from src.embedded.text import TEXT_TOKENS, clip_encoder, clip_tokenizer, silent_t5, t5_tokenizer
from src.embedded.vae import CHANNELS, save_atomically
from src.objectives import FlowMatching

TEXT_WIDTH = 64  # of each CLIP; their outputs side by side are the transformer's text tokens
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """steps x batch samples at peak rate lr, warm-up then cosine to zero; EMA half-life grows with the run."""

    steps: int
    batch: int = 32
    lr: float = 1.2e-3
    warmup: int = 300
    ema_decay: float = 0.9995
    seed: int = 0


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

    def tokens(self, captions: list[str]) -> Tensor:
        """-> (B, L) int64."""
        padded = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True)
        return torch.tensor(padded.input_ids)

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """-> text tokens (B, L, 128), pooled (B, 128)."""
        outs = [enc(ids_BL, output_hidden_states=True) for enc in (self.one, self.two)]
        return torch.cat([o.hidden_states[-2] for o in outs], -1), torch.cat([o.text_embeds for o in outs], -1)


class TinySD3(nn.Module):
    """Transformer and text encoders, trained as one; `forward` is the velocity at (x_t, t, caption tokens)."""

    def __init__(self, seed: int):
        super().__init__()
        self.transformer, self.text = build_transformer(seed), TextStack(seed)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        tokens, pooled = self.text(ids_BL)
        return self.transformer(
            hidden_states=x_BCHW,
            timestep=t_B * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def train_sd3(
    latents: Tensor,
    captions: list[str],
    held_out: tuple[Tensor, list[str]],
    recipe: Recipe,
    log: Callable[[dict], None],
    checkpoint: Path,
) -> TinySD3:
    """Train on latents (N, 16, 8, 8) and their captions; returns the moving average of the weights.

    held_out: latents and captions of the logged loss, always with the same noise and t.
    checkpoint: a file that lets a killed run go on.
    """
    model = TinySD3(recipe.seed)
    ids, empty = model.text.tokens(captions), model.text.tokens([""])
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    objective, began, first = FlowMatching(), time.process_time(), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for part, name in ((model, "model"), (ema, "ema"), (opt, "opt")):
            part.load_state_dict(saved[name])
        first, began = saved["step"], began - saved["cpu_s"]
    for step in range(first, recipe.steps):
        gen = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        for group in opt.param_groups:
            group["lr"] = recipe.lr * rate(step, recipe)
        row = torch.randint(len(latents), (recipe.batch,), generator=gen)
        dropped = torch.rand(recipe.batch, 1, generator=gen) < CAPTION_DROPOUT
        t = objective.sample_t(torch.rand(recipe.batch, generator=gen))
        x_t, target = objective.corrupt(latents[row], torch.randn(latents[row].shape, generator=gen), t)
        loss = objective.loss(model(x_t, t, torch.where(dropped, empty, ids[row])), target, t).mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            spent = time.process_time() - began
            log(
                {
                    "step": step + 1,
                    "images_seen": (step + 1) * recipe.batch,
                    "cpu_s": round(spent, 1),
                    "val_loss": round(validation_loss(model, held_out, objective), 4),
                    "val_loss_ema": round(validation_loss(ema, held_out, objective), 4),
                }
            )
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict()}
            save_atomically({**state, "step": step + 1, "cpu_s": spent}, checkpoint)
    return ema.eval()


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate at a step as a fraction of the peak: linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    done = max(0.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return warm * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


@torch.no_grad()
def validation_loss(model: TinySD3, held_out: tuple[Tensor, list[str]], objective: FlowMatching) -> float:
    """Mean loss over held-out scenes with fixed noise and stratified t: comparable from step to step."""
    x0, captions = held_out
    t = objective.sample_t((torch.arange(len(x0)) + 0.5) / len(x0))
    x_t, target = objective.corrupt(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(7)), t)
    ids = model.text.tokens(captions)
    out = torch.cat([model(*p) for p in zip(x_t.split(64), t.split(64), ids.split(64), strict=True)])
    return float(objective.loss(out, target, t).mean())


def assemble(model: TinySD3, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """All parts as a stock pipeline, which `save_pretrained` turns into the ordinary folder layout."""
    t5 = t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text.one,
        tokenizer=model.text.tokenizer,
        text_encoder_2=model.text.two,
        tokenizer_2=model.text.tokenizer,
        text_encoder_3=silent_t5(t5, 2 * TEXT_WIDTH),
        tokenizer_3=t5,
    )
