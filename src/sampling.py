"""The solver loop over predict(x, t): diffusers' schedulers, guidance; no knowledge of the model, the method or the task.

Legend in `src.types`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from src.objectives import FlowMatching, Objective
from src.types import Features, TextCond, UserError
from src.vocabulary import OWN, SOLVERS

T = TypeVar("T")
Predict = Callable[[Tensor, Tensor, TextCond, Features | None], Tensor]


def solver_for(objective: Objective, scheduler: Any, solver: str = OWN) -> Any:
    """The scheduler that pictures are drawn with, made from the model's own. All of them are deterministic.

    auto: flow models keep theirs (Euler). Diffusion models get DPM-Solver++ of second order (2211.01095) on their own noise
    schedule: it needs few steps, and it is what PixArt-alpha ships with. Others: see `SOLVERS`. Raises UserError for a
    solver of the other kind of models.
    """
    kind = "flow" if isinstance(objective, FlowMatching) else "diffusion"
    if kind not in SOLVERS[solver]:
        known = ", ".join(name for name, kinds in SOLVERS.items() if kind in kinds)
        raise UserError(f"solver={solver} is not for {kind} models, such as this backbone; write one of {known}")
    if kind == "flow":
        return scheduler if solver == OWN else _flow_solver(scheduler.config, solver)
    return _diffusion_solver(scheduler.config, solver)


def _flow_solver(own: Any, solver: str) -> Any:
    import diffusers

    if solver == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(own, stochastic_sampling=False)
    if own.use_dynamic_shifting:
        raise UserError(f"solver={solver} does not know this model's dynamic shift of noise levels; write solver=auto")
    if solver == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(shift=own.shift)
    maker = {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[solver]
    return maker(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=own.shift, solver_order=2)


def _diffusion_solver(own: Any, solver: str) -> Any:
    import diffusers

    if solver == "ddim":  # its step assumes equal steps down from the last timestep
        even = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        return diffusers.DDIMScheduler.from_config(own, **even)
    second = {"solver_order": 2, "use_karras_sigmas": False}
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler.from_config(own, **second)
    return diffusers.DPMSolverMultistepScheduler.from_config(
        own, algorithm_type="dpmsolver++", solver_type="midpoint", **second
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


class NoRoom(UserError):
    """Not even one picture fits the memory."""


class Batches:
    """How many pictures are drawn at once, `size`: halved for good when memory runs out. Speed only; `said` is told.

    What a picture becomes depends on the others of its batch by rounding alone: by 4e-6 of its range in float32 on a CPU.
    """

    def __init__(self, size: int, said: Callable[[str], None] = print):
        self.size, self.said = size, said

    def over(self, rows: Sequence[int], draw: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """draw(some rows) for all rows, in their order. Raises NoRoom if a single one does not fit the memory."""
        first = 0
        while first < len(rows):
            some = list(rows[first : first + self.size])
            made = self._tried(some, draw)
            if made is None:
                continue
            yield some, made[0]
            first += len(some)

    def _tried(self, some: list[int], draw: Callable[[list[int]], T]) -> tuple[T] | None:
        """None where memory ran out; the error has gone with its frames, and what they held is free again."""
        try:
            return (draw(some),)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(some) == 1:
                raise NoRoom(
                    "drawing runs out of memory at one picture at a time; take a smaller resolution or a larger device"
                ) from error
        self.size = max(1, len(some) // 2)
        self.said(f"out of memory with {len(some)} pictures at once: going on with {self.size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no room: torch raises a type of its own on a GPU, and a plain one on a CPU."""
    said = str(error)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in said for part in words)
