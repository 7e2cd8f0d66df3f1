"""What `python -m src.sample` draws.

The condition goes the way that it went in training: read as a data set's map is, made by the same task, in the same codec
and space, from the run's own configuration. A picture of 8 bits is a finished condition, as those in `examples/` are; what
holds numbers that want a scale, a depth map of 16 bits, float or .npy, or joints as JSON or .npy, is a map of a data set.
"""

import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from src import build, rng
from src.backbones.base import Backbone
from src.callbacks.meter import peak_mem_gib
from src.config import resolve_hardware
from src.data.folder import read_picture
from src.data.framing import Framing
from src.data.picture import header
from src.data.signals import MAP_SUFFIXES, SIGNALS, map_size, read_map
from src.data.stores import condition_tensor, to_bytes
from src.runs import trained_run
from src.sampling import denoise, solver_for
from src.tasks.base import Task
from src.types import Sample, UserError


def main(cfg: DictConfig) -> None:
    """Read the run, draw one picture, say how long it took."""
    cfg = resolve_hardware(cfg)
    torch.set_num_threads(cfg.hardware.threads)
    run, condition_file = Path(cfg.run), Path(cfg.condition)
    trained, checkpoint = trained_run(cfg.run)
    trained.hardware = cfg.hardware
    build.quiet()
    model = build.load_sampler(trained, checkpoint)
    picture, seconds = draw(cfg, trained, model, condition_file)
    out = Path(cfg.out or run / "samples" / f"{condition_file.stem}-seed{cfg.seed}-scale{cfg.scale:g}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(out)
    print(
        f"{cfg.steps} steps in {seconds:.2f} s, {peak_mem_gib(model.adapter.device):.2f} GiB at most\nimage: {out}", flush=True
    )


def draw(cfg: DictConfig, trained: DictConfig, model: "build.Sampler", condition_file: Path) -> tuple[np.ndarray, float]:
    """-> (H, W, 3) uint8 and the seconds from noise to picture (weights were loaded before)."""
    device, adapter, backbone = model.adapter.device, model.adapter, model.backbone
    shown = condition_of(condition_file, model.task, trained, cfg.condition_is_image)
    if line := cut_prompt(cfg.prompt, backbone, device):
        print(line, flush=True)
    text = backbone.encode_text([cfg.prompt], device).to(device)
    empty = backbone.encode_text([""], device).to(device)
    side = trained.resolution // backbone.facts.factor
    noise = rng.normal(cfg.seed, "eval-noise", [0], (backbone.facts.latent_channels, side, side)).to(device)

    began = time.perf_counter()
    features = adapter.features_of(condition_tensor(shown[None], adapter.condition_space, model.codec))
    solver = solver_for(backbone.objective, backbone.scheduler())
    latent = denoise(
        adapter.predictor(cfg.scale), noise, solver, backbone.objective, cfg.steps, text, empty, features, cfg.guidance
    )
    picture = to_bytes(model.codec.decode(latent))[0]
    return picture, time.perf_counter() - began


def cut_prompt(prompt: str, backbone: Backbone, device: torch.device) -> str | None:
    """A line if a tokenizer cuts the prompt: how many of its tokens, with the marks of beginning and end, are read."""
    counts = {name: (limit, has) for name, (limit, (has,)) in backbone.text_lengths([prompt], device).items() if has > limit}
    if not counts:
        return None
    read = ", ".join(f"{limit} of its {has} tokens are read by the {name}" for name, (limit, has) in counts.items())
    return f"prompt: {read} of {backbone.facts.source}, the rest is cut"


def condition_of(file: Path, task: Task, trained: DictConfig, is_image: bool) -> np.ndarray:
    """The condition map of a file, (H, W, 3) uint8, by the rules and the task of a training; one line says how it was read.

    is_image: the file is a photo, from which the task makes it. Raises UserError for what is no map of the task.
    """
    side, name, matte, signal = trained.resolution, str(file), trained.data.get("matte", "white"), task.signal
    blank, is_map = np.zeros((side, side, 3), np.uint8), file.suffix.lower() in MAP_SUFFIXES
    if is_map and (is_image or SIGNALS[signal] not in ("depth", "joints")):
        wanted = "condition_is_image=true" if is_image else f"task={task.name}"
        raise UserError(f"condition={name}: {wanted} wants a picture, and a {file.suffix} file is none")
    if signal == "joints" and is_map:
        joints = read_map(signal, file, name)
        if joints[joints[..., 2] > 0][:, :2].max(initial=0) > side:
            raise UserError(f"condition={name}: joints beyond {side}; write them in pixels of a picture of {side} x {side}")
        print(f"{name}: {len(joints)} people, in pixels of a picture of {side} x {side}", flush=True)
        return task.condition_of(Sample(file.name, blank, "", {signal: joints}), trained.seed)
    size = map_size(signal if is_map else "canny", file, name)
    fitted = "" if size == (side, side) else f", scaled and cropped to {side} x {side}"
    deep = is_map or header(file, name).kind.partition(" ")[2].startswith(("I", "F"))
    what = "a photo" if is_image else f"the {signal} of a data set" if deep and signal == "depth" else "a finished map"
    print(f"{name}: {size[1]} x {size[0]} pixels, read as {what}{fitted}", flush=True)
    if is_image:
        return task.condition_of(Sample(file.name, read_picture(file, side, matte), ""), trained.seed)
    if signal == "joints":
        return read_picture(file, side, "black")
    if SIGNALS[signal] == "picture":  # a smaller one is for the task to scale up
        values = read_picture(file, min(side, *size), matte)
    else:
        frame = Framing(side, "center", 0, None).frame(size, file.name)
        values = frame.signal(signal, read_map(signal, file, name, matte))
    shown = (task if deep else task.for_finished_maps()).condition_of(
        Sample(file.name, blank, "", {signal: values}), trained.seed
    )
    if np.ptp(shown) == 0:
        print(f"{name}: its condition is {shown.max()} of 255 all over, which tells the adapter nothing", flush=True)
    return shown
