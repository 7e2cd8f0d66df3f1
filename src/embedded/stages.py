"""The stages in which an embedded backbone is made from nothing: what `python -m src.prepare backbone=<name>` runs.

world -> autoencoder beside diffusion model -> scene reader -> pipeline folder -> scores -> model card. Each stage reads its
inputs from the cache folder and leaves its output there, so a killed run goes on where it stopped when started again.

All of them hold the same autoencoder, so that their latents compare: sd3_tiny learns it, the others take it from the cache
folder or from the shipped sd3_tiny, unless `vae_steps` asks for one of their own.

Files in the cache folder: prepare.json (whose work it is), world-*/, vae.pt and <backbone>.pt (to go on from), vae_out/ and
<backbone>.pt.final (done), {vae,<backbone>,reader}.jsonl (curves).
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from omegaconf import DictConfig

from src.backbones.source import EMBEDDED_ROOT
from src.data.scenes import COLOURS, FLOORS, POSES, SHAPES, SIZES, sample_scene
from src.embedded.card import draw_samples, write_card
from src.embedded.claims import backbone_files
from src.embedded.families import VAE_OWNER
from src.embedded.plan import BASIS_PICTURES, backbone_recipe, claim_cache, family_of, out_folder, shared_vae, vae_steps
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
from src.embedded.training import train_backbone
from src.embedded.vae import PatchBasis, fit_basis, to_signed, train_vae
from src.embedded.world import World, load_world
from src.parent import worker_pool
from src.results import environment, read_rows, write_atomic
from src.types import UserError

TRAIN_WORLD, HELD_OUT_WORLD = 0, 1  # what `data=scenes` trains and validates on
MAP_SCENES, HELD_OUT_MAP_SCENES, HELD_OUT = 6000, 300, 1000
VAE_BATCH = 24
SCORE_STEPS, SCORE_GUIDANCE = 20, 3.0


def main(cfg: DictConfig) -> None:
    """Run every stage that is not done yet."""
    recipe, shared, began = backbone_recipe(cfg), shared_vae(cfg), time.perf_counter()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    claim_cache(cfg)
    cache = Path(cfg.cache_dir)
    say(f"world: {cfg.world_images} renders at {SIZE} px and {_held_out(cfg)} held-out ones")
    stage_world(cfg)
    learned = f"{vae_steps(cfg)} steps, {cache / 'vae.jsonl'}"
    say(f"autoencoder: {f'that of {shared.parent}' if shared else learned}")
    say(f"diffusion model: {recipe.steps} steps, {cache / cfg.backbone.name}.jsonl")
    with worker_pool(2, spawn=True) as pool:
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
    """Train the autoencoder -> vae_out/ (its `save_pretrained`), unless it is there or taken over."""
    torch.set_num_threads(1)  # one thread each: two trainings that share all cores take longer than on one core each
    cache = Path(cfg.cache_dir)
    if (cache / "vae_out").exists() or shared_vae(cfg):
        return
    train, held = stage_world(cfg)
    check, log = (np.array(held.images[:128]), np.array(held.maps[:128])), _log_to(cache / "vae.jsonl")
    basis, resume = _basis(train), cache / "vae.pt"
    vae = train_vae(train.images, train.maps, check, basis, vae_steps(cfg), VAE_BATCH, cfg.seed, log, resume)
    vae.save_pretrained(cache / "vae_out.part")
    os.replace(cache / "vae_out.part", cache / "vae_out")


def stage_backbone(cfg: DictConfig) -> None:
    """Train network and text encoders on the exact components of the renders -> *.pt.final (their moving average)."""
    torch.set_num_threads(1)
    checkpoint, log, final = (Path(cfg.cache_dir) / file for file in backbone_files(cfg.backbone.name))
    if final.exists():
        return
    train, held = stage_world(cfg)
    basis = _basis(train)

    def latents(pictures: np.ndarray) -> torch.Tensor:
        chunks = (torch.from_numpy(np.array(pictures[i : i + 1000])) for i in range(0, len(pictures), 1000))
        return torch.cat([basis.encode(to_signed(chunk)) for chunk in chunks])

    check = (latents(held.images[:256]), held.captions[:256])
    recipe = backbone_recipe(cfg)
    model = family_of(cfg).model(recipe.seed)
    model = train_backbone(model, latents(train.images), train.captions, check, recipe, _log_to(log), checkpoint)
    part = final.with_suffix(".part")
    torch.save(model.state_dict(), part)
    os.replace(part, final)


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
    folder, cache, shared = out_folder(cfg), Path(cfg.cache_dir), shared_vae(cfg)
    vae_folder, final = shared or cache / "vae_out", cache / backbone_files(cfg.backbone.name)[2]
    for part in (vae_folder, final, *([] if shared else [cache / "vae.pt"])):
        if not part.exists():
            raise UserError(f"{part} is not there: train it with `python -m src.prepare`, or name its cache_dir")
    model = family_of(cfg).model(cfg.seed)
    model.load_state_dict(torch.load(final, weights_only=True))
    pipeline = model.eval().pipeline(diffusers.AutoencoderKL.from_pretrained(vae_folder, local_files_only=True).eval())
    recipe = _recipe(cfg, pipeline)
    # the text encoders stay in float32: transformers loads a file's own dtype, diffusers float32, and mixed they do not run
    for module in pipeline.components.values():
        if isinstance(module, diffusers.ModelMixin):
            module.half()
    fresh = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    recipe["vae"] |= _shared_facts(cfg, fresh)
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
    cache, name, recipe = Path(cfg.cache_dir), cfg.backbone.name, backbone_recipe(cfg)
    train, _ = stage_world(cfg)
    words = {"sizes": SIZES, "colours": COLOURS, "things": (*SHAPES, "person"), "poses": POSES, "floors": FLOORS}
    settings = {"backbone": name, "seed": cfg.seed, "world_images": cfg.world_images, "backbone_steps": recipe.steps}
    if name == VAE_OWNER or cfg.vae_steps:
        settings["vae_steps"] = vae_steps(cfg)
    modules = {part: m for part, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    return {
        "seed": cfg.seed,
        "renders": len(train.images),
        "maps": len(train.maps),
        "vae": _vae_facts(cfg),
        "backbone": {**asdict(recipe), "curve": _curve(cache / f"{name}.jsonl", recipe.steps, "backbone_steps")},
        "parameters": {part: sum(p.numel() for p in m.parameters()) for part, m in modules.items()},
        "words": {group: list(known) for group, known in words.items()},
        "example_caption": next(c for c in train.captions if " and " in c),
        "versions": {k: v for k, v in environment().items() if k in ("torch", "diffusers", "transformers", "numpy")},
        "command": " ".join(["python -m src.prepare", *(f"{key}={value}" for key, value in settings.items())]),
    }


def _vae_facts(cfg: DictConfig) -> dict[str, Any]:
    """How the autoencoder was trained: in the cache folder, or what the backbone says whose one is taken over."""
    cache, shared = Path(cfg.cache_dir), shared_vae(cfg)
    if shared:
        theirs = json.loads((shared.parent / "recipe.json").read_text())
        return theirs["vae"] | {"renders": theirs["renders"], "maps": theirs["maps"]}
    curve = _curve(cache / "vae.jsonl", vae_steps(cfg), "vae_steps")
    lr = torch.load(cache / "vae.pt", weights_only=True)["opt"]["param_groups"][0]["max_lr"]
    return {"steps": vae_steps(cfg), "batch": VAE_BATCH, "lr": lr, "curve": curve}


def _shared_facts(cfg: DictConfig, folder: Path) -> dict[str, str]:
    """{"same_as": the embedded backbone that ships the very same autoencoder as `folder`}, or nothing."""
    weights = "vae/diffusion_pytorch_model.safetensors"
    theirs = EMBEDDED_ROOT / VAE_OWNER / weights
    if cfg.backbone.name == VAE_OWNER or not theirs.exists() or theirs.read_bytes() != (folder / weights).read_bytes():
        return {}
    return {"same_as": VAE_OWNER}


def _curve(path: Path, steps: int, key: str) -> list[dict[str, Any]]:
    """Rows of a training log in order of steps. A kill between row and checkpoint leaves a row twice: the later one counts."""
    rows = {row["step"]: row for row in read_rows(path)} if path.exists() else {}
    if not rows or max(rows) != steps:
        raise UserError(f"{path} ends at step {max(rows, default=0)}, not at {key}={steps}: it is the log of another training")
    return [rows[step] for step in sorted(rows)]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
