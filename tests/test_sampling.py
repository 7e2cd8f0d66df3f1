"""Solvers against a law whose answer is known, and batches that shrink when memory runs out."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.config import load
from src.construct import construct
from src.data.folder import FolderSource
from src.objectives import FlowMatching
from src.sample import draw as drawing
from src.sample.draw import condition_of, cut_prompt
from src.sampling import OWN, SOLVERS, Batches, denoise, is_out_of_memory, solver_for
from src.types import Sample, TextCond, UserError
from tests.bad_files import encoded, photo

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


# ---- the condition of `src.sample` ------------------------------------------------------------------------------------


def shown_by(tmp_path, name: str, raw: bytes, words: tuple[str, ...] = (), is_image: bool = False):
    """What `src.sample` shows the adapter of a file, and the task."""
    (tmp_path / name).write_bytes(raw)
    trained = load("train", list(words))
    task = construct(trained.task)
    return condition_of(tmp_path / name, task, trained, is_image), task


@pytest.mark.parametrize(
    ("task", "signal", "name", "more"),
    [
        ("canny", "canny", "0.png", ()),
        ("depth", "depth", "0.png", ("task.signal_is=map",)),
        ("depth", "depth", "0.npy", ()),
        ("pose", "joints", "0.json", ()),
        ("super_resolution", "low_resolution", "0.png", ()),
    ],
)
def test_a_map_is_read_as_in_training(tmp_path, task, signal, name, more):
    """A clear half for edges and partners, 16 bits for depth: one condition, whether a run reads it or `src.sample`."""
    pixels = photo(0, 64, 64)
    clear = np.dstack([pixels, np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((64, 1), np.uint8)])
    deep = 2 + photo(0, 64, 64)[..., 0].astype(np.uint16) // 40
    held = io.BytesIO()
    np.save(held, deep.astype(np.float32) + 0.25)
    people = [[[x, 3 * x % 64, 1] for x in range(4, 46, 3)]]
    raw = {
        "canny": encoded(clear, "PNG"),
        "depth": held.getvalue() if name.endswith("npy") else encoded((deep - deep.min()) * 20000, "PNG"),
        "joints": json.dumps({"joints": people}).encode(),
        "low_resolution": encoded(clear[::4, ::4], "PNG"),
    }[signal]
    for i in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / signal).mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(pixels, "PNG"))
        (tmp_path / "images" / f"{i}.txt").write_text("a picture")
        (tmp_path / signal / f"{i}{name[1:]}").write_bytes(raw)
    source = FolderSource("folder", str(tmp_path / "images"), 1, "train", 64, signals={signal: str(tmp_path / signal)})
    shown, made = shown_by(tmp_path, name, raw, (f"task={task}", *more))
    assert np.array_equal(shown, made.condition_of(source[0], 0))
    assert np.ptp(shown) > 100


def test_a_finished_map_is_shown_as_it_is(tmp_path, capsys):
    gray = np.repeat(photo(3, 64, 64)[..., :1], 3, 2)
    for task in ("canny", "depth", "pose", "super_resolution", "deblur"):
        shown, _ = shown_by(tmp_path, "condition-0.png", encoded(gray, "PNG"), (f"task={task}",))
        assert np.array_equal(shown, gray), task
    assert "64 x 64 pixels, read as a finished map" in capsys.readouterr().out


def test_a_photo_becomes_the_condition_of_the_task(tmp_path):
    pixels = photo(3, 64, 64)
    shown, task = shown_by(tmp_path, "p.png", encoded(pixels, "PNG"), (), is_image=True)
    assert np.array_equal(shown, task.condition_of(Sample("p.png", pixels, ""), 0))


def test_what_is_no_condition_is_refused_or_told(tmp_path, capsys):
    far = json.dumps({"joints": [[[x, x, 1] for x in range(0, 140, 10)]]}).encode()
    with pytest.raises(UserError, match=r"joints beyond 64; write them in pixels of a picture of 64 x 64"):
        shown_by(tmp_path, "a.json", far, ("task=pose",))
    with pytest.raises(UserError, match=r"task=canny wants a picture, and a \.json file is none"):
        shown_by(tmp_path, "a.json", far)
    with pytest.raises(UserError, match="condition_is_image=true wants a picture"):
        shown_by(tmp_path, "a.json", far, ("task=pose",), is_image=True)
    millimetres = encoded(np.full((64, 64), 5000, np.uint16), "PNG")
    with pytest.raises(UserError, match=r"mm\.png: .* this is uint16 with task.signal_is=distance; name a depth model"):
        shown_by(tmp_path, "mm.png", millimetres, ("task=depth",))
    capsys.readouterr()
    shown_by(tmp_path, "m.tiff", encoded(np.full((64, 64), 5000, np.float32), "TIFF"), ("task=depth",))
    assert "its condition is 0 of 255 all over" in capsys.readouterr().out


def test_a_prompt_that_is_cut_is_told_in_one_line(sd21_tiny, monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert cut_prompt("a large red ball", sd21_tiny, cpu) is None
    long = "a large red ball " * 30
    ((limit, (has,)),) = sd21_tiny.text_lengths([long], cpu).values()
    assert has > limit
    line = f"prompt: {limit} of its {has} tokens are read by the tokenizer of {sd21_tiny.facts.source}, the rest is cut"
    assert cut_prompt(long, sd21_tiny, cpu) == line

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(drawing, "condition_of", lambda *_: np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(sd21_tiny, "encode_text", stop, raising=False)
    model = SimpleNamespace(adapter=SimpleNamespace(device=cpu), backbone=sd21_tiny, task=None)
    with pytest.raises(Stop):
        drawing.draw(SimpleNamespace(prompt=long, condition_is_image=False), None, model, None)
    assert capsys.readouterr().out.splitlines() == [line]
