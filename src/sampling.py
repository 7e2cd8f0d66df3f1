"""Solver loops over predict(x, t): no knowledge of the model, the method or the task.

Legend in `src.types`. A flow's velocity at noise level t moves x by (t_next - t) * velocity.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from src.types import TextCond

Predict = Callable[[Tensor, Tensor, TextCond, Tensor | None], Tensor]


def flow_levels(scheduler, steps: int) -> list[float]:
    """The noise levels of a diffusers flow scheduler for `steps` steps, ending in 0; its shift is respected."""
    scheduler.set_timesteps(steps)
    return [float(s) for s in scheduler.sigmas]


@torch.no_grad()
def euler_flow(
    predict: Predict,
    noise_BCHW: Tensor,
    levels: list[float],
    text: TextCond,
    empty: TextCond,
    features: Tensor | None,
    guidance: float,
) -> Tensor:
    """Integrate from pure noise to a clean latent, (B, C, H, W).

    predict(x, t, text, features) -> velocity; features: what control needs, per image, or None.
    guidance: classifier-free scale; 1 skips the unconditional half. Control acts on both halves, as in
    diffusers' ControlNet pipelines.
    """
    x, batch = noise_BCHW, len(noise_BCHW)
    both = TextCond.cat([empty.expand(batch), text]) if guidance != 1 else text
    twice = torch.cat([features, features]) if features is not None and guidance != 1 else features
    for now, after in pairwise(levels):
        inputs = torch.cat([x, x]) if guidance != 1 else x
        v = predict(inputs, torch.full((len(inputs),), now, device=x.device), both, twice).float()
        if guidance != 1:
            free, told = v.chunk(2)
            v = free + guidance * (told - free)
        x = x + (after - now) * v
    return x
