"""One condition and one prompt to one picture, with a trained adapter.

    python -m src.sample run=runs/<name>/<stamp> prompt="'a large red ball, gray floor'" condition=edges.png

The condition goes the way that it went in training: the same task, codec and space, from the run's own configuration.
"""

import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from src import build, rng
from src.callbacks.meter import peak_mem_gib
from src.config import cli, resolve_hardware
from src.data.folder import read_picture
from src.data.stores import condition_tensor, to_bytes
from src.runs import trained_run
from src.sampling import denoise, solver_for
from src.types import Sample, UserError


def main(cfg: DictConfig) -> None:
    """Read the run, draw one picture, say how long it took."""
    cfg = resolve_hardware(cfg)
    torch.set_num_threads(cfg.hardware.threads)
    run, condition_file = Path(cfg.run), Path(cfg.condition)
    trained, checkpoint = trained_run(cfg.run)
    if not condition_file.is_file():
        raise UserError(f"condition={cfg.condition}: no such file")
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
    shown = read_picture(condition_file, trained.resolution)
    with Image.open(condition_file) as opened:
        if opened.size != (trained.resolution, trained.resolution):
            print(
                f"{condition_file}: {opened.width} x {opened.height} pixels, scaled and cropped to {trained.resolution}",
                flush=True,
            )
    if cfg.condition_is_image:
        sample = Sample(id=condition_file.name, image=shown, caption=cfg.prompt)
        shown = model.task.condition_of(sample, trained.seed)
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


if __name__ == "__main__":
    cli("sample", main)
