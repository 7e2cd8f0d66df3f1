"""How an embedded backbone is trained from nothing: one loop for every family.

Legend: N scenes, B batch, C H W a latent, L text tokens. A `TinyModel` is a diffusion network together with its text
encoders, which learn as one.
"""

import copy
import math
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.embedded.vae import save_atomically
from src.objectives import Objective
from src.types import UserError

CAPTION_DROPOUT = 0.1
LOG_EVERY = 500  # steps between two rows of the log, and two checkpoints


@dataclass(frozen=True)
class Recipe:
    """steps x batch samples at peak rate lr: warm-up, then cosine to zero, and all that again from each step in `restarts`
    (warm restarts, Loshchilov and Hutter 2017, 1608.03983). ema_decay: of the average that is shipped, per step."""

    steps: int
    restarts: tuple[int, ...] = ()
    batch: int = 32
    lr: float = 1.2e-3
    warmup: int = 300
    ema_decay: float = 0.9995
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = [0, *self.restarts, self.steps]
        if bounds != sorted(set(bounds)):
            raise UserError(f"restarts={list(self.restarts)} must rise, between 0 and the {self.steps} steps")


class TinyModel(nn.Module, ABC):
    """A trainable diffusion network with its text encoders, and what the network predicts."""

    objective: Objective

    @abstractmethod
    def tokens(self, captions: list[str]) -> Tensor:
        """-> (B, L) int64, padded."""

    @abstractmethod
    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor) -> Tensor:
        """The prediction at (x_t, t in [0, 1], caption tokens), (B, C, H, W)."""

    @abstractmethod
    def pipeline(self, vae: nn.Module) -> Any:
        """All parts as a stock diffusers pipeline, which `save_pretrained` turns into the ordinary folder layout."""


def train_backbone(
    model: TinyModel,
    latents: Tensor,
    captions: list[str],
    held_out: tuple[Tensor, list[str]],
    recipe: Recipe,
    log: Callable[[dict], None],
    checkpoint: Path,
) -> TinyModel:
    """Train on latents (N, C, H, W) and their captions; returns the moving average of the weights.

    held_out: latents and captions of the logged loss, always with the same noise and t.
    checkpoint: a file that lets a killed run go on.
    """
    ids, empty, objective = model.tokens(captions), model.tokens([""]), model.objective
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    began, first = time.process_time(), 0
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
        if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
            spent = time.process_time() - began
            log(
                {
                    "step": step + 1,
                    "images_seen": (step + 1) * recipe.batch,
                    "cpu_s": round(spent, 1),
                    "val_loss": round(validation_loss(model, held_out), 4),
                    "val_loss_ema": round(validation_loss(ema, held_out), 4),
                }
            )
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict()}
            save_atomically({**state, "step": step + 1, "cpu_s": spent}, checkpoint)
    return ema.eval()


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate at a step as a fraction of the peak: in each cycle a linear warm-up, then half a cosine down to zero."""
    bounds = [0, *recipe.restarts, recipe.steps]
    cycle = bisect_right(bounds, step) - 1
    length, within = bounds[cycle + 1] - bounds[cycle], step - bounds[cycle]
    warm = min(1.0, (within + 1) / recipe.warmup)
    done = max(0.0, (within - recipe.warmup) / max(1, length - recipe.warmup))
    return warm * 0.5 * (1 + math.cos(done * math.pi))


@torch.no_grad()
def validation_loss(model: TinyModel, held_out: tuple[Tensor, list[str]]) -> float:
    """Mean loss over held-out scenes with fixed noise and stratified t: comparable from step to step."""
    (x0, captions), objective = held_out, model.objective
    t = objective.sample_t((torch.arange(len(x0)) + 0.5) / len(x0))
    x_t, target = objective.corrupt(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(7)), t)
    ids = model.tokens(captions)
    out = torch.cat([model(*p) for p in zip(x_t.split(64), t.split(64), ids.split(64), strict=True)])
    return float(objective.loss(out, target, t).mean())


def train_detector(
    net: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    batch: int,
    peak_lr: float,
    warmup: int,
    began: float,
    log: Callable[[dict], None],
) -> nn.Module:
    """Train a small convolutional network by one cycle of the rate -> the same, in evaluation mode.

    loss_at(step): of a batch that is a pure function of the step, its pictures in channels_last; warmup: steps to the peak;
    began: process time at which the work began. log receives {"step", "images_seen", "cpu_s", "train_loss"} every 100
    steps and at the end; train_loss is the mean over them.
    """
    net = net.to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), peak_lr, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, peak_lr, total_steps=steps, pct_start=min(0.3, warmup / steps))
    losses: list[float] = []
    for step in range(steps):
        loss = loss_at(step)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        opt.step()
        plan.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent, mean = round(time.process_time() - began, 1), round(float(np.mean(losses[-100:])), 4)
            log({"step": step + 1, "images_seen": (step + 1) * batch, "cpu_s": spent, "train_loss": mean})
    return net.to(memory_format=torch.contiguous_format).eval()
