"""The solver loop over predict(x, t): diffusers' schedulers, guidance; no knowledge of the model, the method or the task.

Legend in `src.types`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.objectives import FlowMatching, Objective
from src.types import Features, TextCond, UserError

Predict = Callable[[Tensor, Tensor, TextCond, Features | None], Tensor]


def solver_for(objective: Objective, scheduler: Any) -> Any:
    """The scheduler that pictures are drawn with, made from the model's own.

    Flow models keep theirs (Euler). Diffusion models get DPM-Solver++ of second order (2211.01095) on their own noise
    schedule: it is deterministic and needs few steps, and it is what PixArt-alpha ships with.
    """
    if isinstance(objective, FlowMatching):
        return scheduler
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", use_karras_sigmas=False
    )


@torch.no_grad()
def denoise(
    predict: Predict,
    noise_BCHW: Tensor,
    scheduler: Any,
    objective: Objective,
    steps: int,
    text: TextCond,
    empty: TextCond,
    features: Features | None,
    guidance: float,
) -> Tensor:
    """From pure noise to a clean latent, (B, C, H, W), in `steps` steps of a scheduler from `solver_for`.

    predict(x, t, text, features) -> what the objective's network predicts, t in [0, 1]; features: what control needs, per
    image, or None. guidance: classifier-free scale; 1 skips the unconditional half. Control acts on both halves, as in
    diffusers' ControlNet pipelines. Raises UserError for fewer steps than the solver can take.
    """
    if steps < 2 and not isinstance(objective, FlowMatching):
        raise UserError(f"steps={steps}: the solver of diffusion models wants at least 2")
    scheduler.set_timesteps(steps, device=noise_BCHW.device)
    x, guided = noise_BCHW, guidance != 1  # the solvers of `solver_for` begin at unit noise
    both = TextCond.cat([empty.expand(len(x)), text]) if guided else text
    twice = double(features) if guided else features
    for timestep in scheduler.timesteps:
        inputs = torch.cat([x, x]) if guided else x
        t_B = torch.full((len(inputs),), objective.from_model_time(float(timestep)), device=x.device)
        said = predict(inputs, t_B, both, twice).float()
        if guided:
            free, told = said.chunk(2)
            said = free + guidance * (told - free)
        x = scheduler.step(said, timestep, x, return_dict=False)[0]
    return x


def double(features: Features | None) -> Features | None:
    """The same features for the unconditional and the conditional half of a guided batch."""
    if features is None:
        return None
    return torch.cat([features, features]) if isinstance(features, Tensor) else tuple(torch.cat([f, f]) for f in features)
