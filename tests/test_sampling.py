"""Solvers against a law whose answer is known, and batches that shrink when memory runs out."""

from types import SimpleNamespace

import pytest
import torch

from src.objectives import FlowMatching
from src.sampling import OWN, SOLVERS, Batches, denoise, is_out_of_memory, solver_for
from src.types import TextCond, UserError

MEAN, SPREAD = 0.7, 0.4  # of the clean latents
TEXT = TextCond(torch.zeros(1, 1, 1))
STEPS = 100


def analytic(backbone):
    """predict(x, t) of the network that has learned normal latents perfectly: the mean of its target given x_t."""
    objective = backbone.objective

    def predict(x, t_B, text, features):
        one = torch.ones(1, 1, 1, 1)
        t = t_B[:1]
        a = objective.corrupt(one, 0 * one, t)[0]  # x_t = a x0 + b noise
        b = objective.corrupt(0 * one, one, t)[0]
        total = a**2 * SPREAD**2 + b**2
        x0 = MEAN + a * SPREAD**2 / total * (x - a * MEAN)
        noise = b / total * (x - a * MEAN)
        from_x0 = objective.corrupt(one, 0 * one, t)[1]
        from_noise = objective.corrupt(0 * one, one, t)[1]
        return from_x0 * x0 + from_noise * noise

    return predict


def kind_of(backbone) -> str:
    return "flow" if isinstance(backbone.objective, FlowMatching) else "diffusion"


@pytest.mark.parametrize("base", ["sd3_tiny", "pixart_tiny", "sd21_tiny"])
def test_every_solver_finds_the_known_answer(base, request):
    """The probability flow keeps every quantile of a normal law, so it takes z, drawn as pure noise, to a known latent
    (Song et al. 2021, 2011.13456, Eq. 13). SD 2.1's noisiest level still holds a fifteenth of the mean, and
    its own spacing of timesteps begins below it, which costs more than the solver's order."""
    backbone = request.getfixturevalue(base)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = {"heun", "dpmpp_2m", "unipc"} if base != "sd21_tiny" else set()
    one, end = torch.ones(1, 1, 1, 1), torch.ones(1)
    a, b = (backbone.objective.corrupt(x, y, end)[0] for x, y in ((one, 0 * one), (0 * one, one)))
    wanted = MEAN + SPREAD * (z - a * MEAN) / torch.sqrt(a**2 * SPREAD**2 + b**2)
    for name, kinds in SOLVERS.items():
        if kind_of(backbone) not in kinds:
            continue
        solver = solver_for(backbone.objective, backbone.scheduler(), name)
        found = denoise(analytic(backbone), z, solver, backbone.objective, STEPS, TEXT, TEXT, None, 1.0)
        assert float((found - wanted).abs().max()) < (0.01 if name in exact else 0.08), name
        again = denoise(analytic(backbone), z, solver, backbone.objective, STEPS, TEXT, TEXT, None, 1.0)
        assert torch.equal(found, again), f"{name} draws numbers of its own, or remembers"


def test_a_solver_of_the_other_kind_is_refused(sd3_tiny, sd21_tiny):
    with pytest.raises(UserError, match=r"solver=ddim is not for flow models.*auto, euler, heun, dpmpp_2m, unipc"):
        solver_for(sd3_tiny.objective, sd3_tiny.scheduler(), "ddim")
    with pytest.raises(UserError, match="solver=heun is not for diffusion models"):
        solver_for(sd21_tiny.objective, sd21_tiny.scheduler(), "heun")
    shifting = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=True, shift=1.0))
    with pytest.raises(UserError, match="dynamic shift"):
        solver_for(sd3_tiny.objective, shifting, "unipc")


def test_auto_is_what_training_validates_with(sd3_tiny, sd21_tiny):
    assert type(solver_for(sd3_tiny.objective, sd3_tiny.scheduler(), OWN)) is type(sd3_tiny.scheduler())
    assert type(solver_for(sd21_tiny.objective, sd21_tiny.scheduler())).__name__ == "DPMSolverMultistepScheduler"


def test_a_batch_that_does_not_fit_is_halved_for_good_and_said():
    said, asked = [], []

    def draw(rows):
        asked.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [r * r for r in rows]

    batches = Batches(16, said.append)
    found = list(batches.over(range(10), draw))
    assert asked == [10, 5, 2, 2, 2, 2, 2]
    assert [r for rows, _ in found for r in rows] == list(range(10))
    assert [x for _, made in found for x in made] == [r * r for r in range(10)]
    assert said == [
        "out of memory with 10 pictures at once: going on with 5",
        "out of memory with 5 pictures at once: going on with 2",
    ]
    assert batches.size == 2


def test_one_picture_that_does_not_fit_is_an_error_in_one_line_and_other_errors_pass():
    def full(rows):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(UserError, match="one picture at a time"):
        list(Batches(2, lambda line: None).over([0, 1], full))
    with pytest.raises(RuntimeError, match="shapes"):
        list(Batches(2).over([0, 1], lambda rows: (_ for _ in ()).throw(RuntimeError("shapes"))))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("no"))
