"""Make the embedded backbone from nothing: `python -m src.prepare backbone=sd3_tiny`.

world -> autoencoder beside diffusion model -> scene reader -> pipeline folder -> scores -> model card. Each stage reads its
inputs from the cache folder and leaves its output there, so a killed run goes on where it stopped when started again.

Files in the cache folder: prepare.json (whose work it is), world-*/, vae.pt and sd3.pt (to go on from), vae_out/ and
sd3.pt.final (done), {vae,sd3,reader}.jsonl (curves).
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from omegaconf import DictConfig

from src.backbones.source import EMBEDDED_ROOT
from src.config import cli
from src.data.scenes import COLOURS, FLOORS, POSES, SHAPES, SIZES, sample_scene
from src.embedded.card import draw_samples, write_card
from src.embedded.reader import (
    BATCH,
    FEATURES,
    PEAK_LR,
    SIZE,
    accuracy,
    load_reader,
    reader_hash,
    rejection,
    save_reader,
    train_reader,
)
from src.embedded.reader import FOLDER as READER_FOLDER
from src.embedded.score import score_backbone
from src.embedded.sd3 import Recipe, TinySD3, assemble, train_sd3
from src.embedded.vae import PatchBasis, fit_basis, to_signed, train_vae
from src.embedded.world import World, load_world
from src.results import environment, read_rows, write_atomic
from src.types import UserError

TRAIN_WORLD, HELD_OUT_WORLD = 0, 1  # what `data=scenes` trains and validates on
MAP_SCENES, HELD_OUT_MAP_SCENES, HELD_OUT = 6000, 300, 1000
BASIS_PICTURES, VAE_BATCH = 4000, 24
SCORE_STEPS, SCORE_GUIDANCE = 20, 3.0
CLAIM = ("seed", "world_images", "vae_steps", "backbone_steps")  # what the files in the cache folder depend on


def main(cfg: DictConfig) -> None:
    """Run every stage that is not done yet."""
    if cfg.backbone.name != "sd3_tiny":
        raise UserError(
            f"backbone={cfg.backbone.name} cannot be made here: only the embedded ones are trained from nothing (sd3_tiny); "
            "others are downloaded when a training names them"
        )
    began = time.perf_counter()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    claim_cache(cfg)
    say(f"world: {cfg.world_images} renders at {SIZE} px and {_held_out(cfg)} held-out ones")
    stage_world(cfg)
    say(f"training: {cfg.vae_steps} steps of the autoencoder beside {cfg.backbone_steps} of the diffusion model")
    say(f"curves: {Path(cfg.cache_dir) / 'vae.jsonl'}, {Path(cfg.cache_dir) / 'sd3.jsonl'}")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(stage_vae, cfg), pool.submit(stage_backbone, cfg)]:
            job.result()
    stage_reader(cfg)
    folder = stage_assemble(cfg)
    scores = stage_score(cfg)
    stage_card(cfg)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    colour, shape = (scores["arms"]["samples"][k]["value"] for k in ("colour", "shape"))
    say(
        f"{folder}: {size:.1f} MB, named colours there {colour:.1%}, with the right shape {shape:.1%} "
        f"(n={scores['conditions']['n']}), {(time.perf_counter() - began) / 60:.1f} min"
    )


def say(line: str) -> None:
    print(line, flush=True)


def out_folder(cfg: DictConfig) -> Path:
    """Where the pipeline goes; null in the configuration is the folder that ships with the project."""
    return Path(cfg.out) if cfg.out else EMBEDDED_ROOT / cfg.backbone.name


def claim_cache(cfg: DictConfig) -> None:
    """Refuse a cache folder that holds a preparation with other settings, whose parts would be mixed with this one's."""
    path, mine = Path(cfg.cache_dir) / "prepare.json", {key: cfg[key] for key in CLAIM}
    theirs = json.loads(path.read_text()) if path.exists() else mine
    other = [f"{key}={theirs.get(key)}, not {mine[key]}" for key in CLAIM if theirs.get(key) != mine[key]]
    if other:
        raise UserError(
            f"{path} is of a preparation with {'; '.join(other)}: name another folder with cache_dir=<folder>, "
            f"or delete prepare.json, vae.pt, vae.jsonl, vae_out, sd3.pt, sd3.jsonl and sd3.pt.final in {path.parent}"
        )
    write_atomic(path, (json.dumps(mine) + "\n").encode())


def _held_out(cfg: DictConfig) -> int:
    """Held-out renders: half of them give the scored captions, and a Frechet distance wants more of those than features."""
    count = min(HELD_OUT, cfg.world_images)
    if count // 2 <= FEATURES:
        raise UserError(f"world_images={cfg.world_images} is too few: the scores want at least {2 * FEATURES + 2}")
    return count


def stage_world(cfg: DictConfig) -> tuple[World, World]:
    """-> training world and held-out world, rendered now or read back."""
    cache, workers, held_out = Path(cfg.cache_dir), max(1, cfg.workers), _held_out(cfg)
    return (
        load_world(TRAIN_WORLD, cfg.world_images, SIZE, MAP_SCENES, cache, workers),
        load_world(HELD_OUT_WORLD, held_out, SIZE, HELD_OUT_MAP_SCENES, cache, workers),
    )


def _basis(world: World) -> PatchBasis:
    return fit_basis(np.array(world.images[:BASIS_PICTURES]), np.array(world.maps[:BASIS_PICTURES]))


def _log_to(path: Path) -> Callable[[dict], None]:
    """A logger of JSON lines: a row is in the file when the call returns."""

    def log(row: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    return log


def stage_vae(cfg: DictConfig) -> None:
    """Train the autoencoder -> vae_out/ (its `save_pretrained`)."""
    torch.set_num_threads(1)  # one thread each: two trainings that share all cores take longer than on one core each
    cache = Path(cfg.cache_dir)
    if (cache / "vae_out").exists():
        return
    train, held = stage_world(cfg)
    check, log = (np.array(held.images[:128]), np.array(held.maps[:128])), _log_to(cache / "vae.jsonl")
    basis, resume = _basis(train), cache / "vae.pt"
    vae = train_vae(train.images, train.maps, check, basis, cfg.vae_steps, VAE_BATCH, cfg.seed, log, resume)
    vae.save_pretrained(cache / "vae_out.part")
    os.replace(cache / "vae_out.part", cache / "vae_out")


def stage_backbone(cfg: DictConfig) -> None:
    """Train transformer and text encoders on the exact components of the renders -> sd3.pt.final (their moving average)."""
    torch.set_num_threads(1)
    cache = Path(cfg.cache_dir)
    if (cache / "sd3.pt.final").exists():
        return
    train, held = stage_world(cfg)
    basis = _basis(train)

    def latents(pictures: np.ndarray) -> torch.Tensor:
        chunks = (torch.from_numpy(np.array(pictures[i : i + 1000])) for i in range(0, len(pictures), 1000))
        return torch.cat([basis.encode(to_signed(chunk)) for chunk in chunks])

    check = (latents(held.images[:256]), held.captions[:256])
    recipe = Recipe(steps=cfg.backbone_steps, seed=cfg.seed)
    model = train_sd3(latents(train.images), train.captions, check, recipe, _log_to(cache / "sd3.jsonl"), cache / "sd3.pt")
    torch.save(model.state_dict(), cache / "sd3.pt.final.part")
    os.replace(cache / "sd3.pt.final.part", cache / "sd3.pt.final")


def stage_reader(cfg: DictConfig) -> None:
    """Train the scene reader if it is not there. A new backbone is judged by the old reader, or scores would not compare."""
    if (READER_FOLDER / "model.safetensors").exists():
        return
    say(f"scene reader: {cfg.reader_steps} steps")
    train, held = stage_world(cfg)
    log = Path(cfg.cache_dir) / "reader.jsonl"
    log.unlink(missing_ok=True)  # six minutes of work: it starts again rather than goes on
    reader = train_reader(train.images, TRAIN_WORLD, cfg.reader_steps, cfg.seed, _log_to(log))
    pictures, last = np.array(held.images), read_rows(log)[-1]
    facts = {
        **{"seed": cfg.seed, "renders": len(train.images), "steps": cfg.reader_steps, "batch": BATCH, "lr": PEAK_LR},
        **{"cpu_s": last["cpu_s"], "train_loss": last["train_loss"], "n_held_out": len(pictures)},
        "accuracy": accuracy(reader, pictures, [sample_scene(HELD_OUT_WORLD, i) for i in range(len(pictures))]),
        "rejection": rejection(reader, pictures, HELD_OUT_WORLD),
    }
    save_reader(reader, READER_FOLDER, facts)


def stage_assemble(cfg: DictConfig) -> Path:
    """Put the trained parts together as a stock pipeline folder with recipe.json -> the folder.

    Raises UserError if a part is missing or is not of this configuration.
    """
    cache, folder = Path(cfg.cache_dir), out_folder(cfg)
    for part in ("vae_out", "sd3.pt.final", "vae.pt"):
        if not (cache / part).exists():
            raise UserError(f"{cache / part} is not there: train it with `python -m src.prepare`, or name its cache_dir")
    model = TinySD3(cfg.seed)
    model.load_state_dict(torch.load(cache / "sd3.pt.final", weights_only=True))
    pipeline = assemble(model.eval(), diffusers.AutoencoderKL.from_pretrained(cache / "vae_out", local_files_only=True).eval())
    recipe = _recipe(cfg, pipeline)
    # the text encoders stay in float32: transformers loads a file's own dtype, diffusers float32, and mixed they do not run
    pipeline.transformer.half()
    pipeline.vae.half()
    fresh = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    write_atomic(fresh / "recipe.json", _json(recipe))
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for its owner only
    shutil.rmtree(folder, ignore_errors=True)  # with its old scores and card
    os.replace(fresh, folder)
    return folder


def stage_score(cfg: DictConfig) -> dict[str, Any]:
    """Sample and judge the folder's pipeline -> scores, also in scores.json; samples.png beside it."""
    folder, (_, held), reader = out_folder(cfg), stage_world(cfg), load_reader(READER_FOLDER)
    n = len(held.images) // 2
    scenes = [sample_scene(HELD_OUT_WORLD, i) for i in range(n)]
    scores, samples = score_backbone(folder, reader, held.images, scenes, n, cfg.seed, SCORE_STEPS, SCORE_GUIDANCE)
    size = sum(p.numel() for p in reader.parameters())
    scores["reader"] = {"hash": reader_hash(READER_FOLDER), "parameters": size, "features": FEATURES}
    draw_samples(samples, held.captions[:n], folder / "samples.png")
    write_atomic(folder / "scores.json", _json(scores))
    return scores


def stage_card(cfg: DictConfig) -> None:
    """Write README.md and its curves from recipe.json and scores.json."""
    write_card(out_folder(cfg))


def _recipe(cfg: DictConfig, pipeline: Any) -> dict[str, Any]:
    """What recipe.json holds; `_curve` has made sure that the artefacts are of the steps that the configuration names."""
    cache, (train, _) = Path(cfg.cache_dir), stage_world(cfg)
    curves = {
        part: _curve(cache / f"{part}.jsonl", cfg[key], key) for part, key in (("vae", "vae_steps"), ("sd3", "backbone_steps"))
    }
    vae_lr = torch.load(cache / "vae.pt", weights_only=True)["opt"]["param_groups"][0]["max_lr"]
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    words = {"sizes": SIZES, "colours": COLOURS, "things": (*SHAPES, "person"), "poses": POSES, "floors": FLOORS}
    return {
        "seed": cfg.seed,
        "renders": len(train.images),
        "maps": len(train.maps),
        "vae": {"steps": cfg.vae_steps, "batch": VAE_BATCH, "lr": vae_lr, "curve": curves["vae"]},
        "backbone": {**asdict(Recipe(steps=cfg.backbone_steps, seed=cfg.seed)), "curve": curves["sd3"]},
        "parameters": {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts},
        "words": {group: list(known) for group, known in words.items()},
        "example_caption": next(c for c in train.captions if " and " in c),
        "versions": {k: v for k, v in environment().items() if k in ("torch", "diffusers", "transformers", "numpy")},
        "command": " ".join(["python -m src.prepare backbone=sd3_tiny", *(f"{key}={cfg[key]}" for key in CLAIM)]),
    }


def _curve(path: Path, steps: int, key: str) -> list[dict[str, Any]]:
    """Rows of a training log in order of steps. A kill between row and checkpoint leaves a row twice: the later one counts."""
    rows = {row["step"]: row for row in read_rows(path)} if path.exists() else {}
    if not rows or max(rows) != steps:
        raise UserError(f"{path} ends at step {max(rows, default=0)}, not at {key}={steps}: it is the log of another training")
    return [rows[step] for step in sorted(rows)]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


if __name__ == "__main__":
    cli("prepare", main)
