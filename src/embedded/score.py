"""How well an embedded backbone says what its caption says, read by `SceneReader`, between a ceiling and a floor.

Ceiling: real renders; reconstructions: the same through the autoencoder; floor: the samples against other captions.
Legend: N scenes (the first N held-out ones), F features.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from src import rng
from src.data.scenes import Scene
from src.embedded.families import FAMILIES, of_folder, of_pipeline
from src.embedded.reader import FEATURES, SIZE, SceneReader, outcomes
from src.embedded.text import TEXT_TOKENS
from src.embedded.vae import psnr, to_signed
from src.metrics.frechet import frechet_distance
from src.metrics.intervals import metric

SAMPLE_BATCH = 32
T5_TOKENS = (0, 1, 256)  # values of SD3's `max_sequence_length` to compare; 256 is diffusers' default, at 8 times the work
PADDINGS = (TEXT_TOKENS, 120)  # the same for PixArt, which masks what it pads: as trained, and diffusers' default
FEW_SCENES = 64  # that such comparisons draw
Draw = Callable[..., np.ndarray]  # captions (N,) and keyword arguments of the pipeline -> (N, 64, 64, 3) uint8


def load_pipeline(folder: str | Path) -> DiffusionPipeline:
    """The stock pipeline of an embedded backbone's folder, in float32 and quiet, loaded as its family wants it."""
    family = FAMILIES[of_folder(folder)]
    pipeline = family.pipeline.from_pretrained(folder, **family.load, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_captions(
    pipeline: DiffusionPipeline, captions: list[str], seed: int, steps: int, guidance: float, **call: Any
) -> np.ndarray:
    """-> (N, 64, 64, 3) uint8. Noise is keyed by the caption's number, so neither N nor the batch size changes a picture.

    call: keyword arguments of the pipeline that replace its family's.
    """
    call = {**FAMILIES[of_pipeline(type(pipeline).__name__)].call, **call}
    pictures = []
    for first in range(0, len(captions), SAMPLE_BATCH):
        some = captions[first : first + SAMPLE_BATCH]
        drawn = pipeline(
            some, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
            generator=[rng.generator(seed, "score-noise", first + i) for i in range(len(some))], **call,
        )  # fmt: skip
        pictures.append(np.round(drawn.images * 255).astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def reconstruct(vae: torch.nn.Module, pictures: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> the same through encoder and decoder."""
    chunks = to_signed(torch.from_numpy(np.array(pictures))).split(64)
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in chunks])
    return decoded.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def shares(reader: SceneReader, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, dict[str, Any]]:
    """Each question of `outcomes` as {value, n, unit, better, ci95, asked}: n pictures, `asked` things or pictures.

    The interval is over pictures: things of one picture are not independent (ratio estimate, by its linearisation).
    """
    found = {}
    for name, (right, asked) in outcomes(reader, pictures, scenes).items():
        if asked.sum():
            value = right.sum() / asked.sum()
            per_picture = value + (right - value * asked) / asked.mean()
            found[name] = metric(per_picture, "share", "higher") | {"asked": int(asked.sum())}
    return found


def score_backbone(
    folder: str | Path,
    reader: SceneReader,
    real: np.ndarray,
    scenes: list[Scene],
    n: int,
    seed: int,
    steps: int,
    guidance: float,
) -> tuple[dict[str, Any], np.ndarray]:
    """Sample the captions of the first n held-out scenes and judge them -> (scores as JSON, samples (n, 64, 64, 3) uint8).

    real, scenes: at least 2 n held-out renders and what they show. The first n are the ceiling, the next n the reference
    of `fid_scenes`, which thus never holds the picture of a sampled caption. Raises ValueError if there are too few.
    """
    if len(real) < 2 * n or len(scenes) < n or n <= FEATURES:
        raise ValueError(f"scoring n={n} wants n > {FEATURES}, 2 n renders and n scenes, got {len(real)} and {len(scenes)}")
    name, pipeline, scenes = of_folder(folder), load_pipeline(folder), scenes[:n]
    draw = partial(sample_captions, pipeline, seed=seed, steps=steps, guidance=guidance)
    began = time.process_time()
    samples = draw([s.caption for s in scenes])
    cpu_s = time.process_time() - began
    renders, reference = np.array(real[:n]), np.array(real[n : 2 * n])
    arms = {"samples": samples, "renders": renders, "reconstructions": reconstruct(pipeline.vae, renders)}
    features = {arm: reader.read(pictures)[2] for arm, pictures in arms.items()}
    target = reader.read(reference)[2]
    scores = {
        "conditions": {"n": n, "seed": seed, "steps": steps, "guidance": guidance, **FAMILIES[name].call},
        "arms": {arm: shares(reader, pictures, scenes) for arm, pictures in arms.items()},
        "fid_scenes": {arm: frechet_distance(f, target) for arm, f in features.items()} | {"n": n, "n_reference": n},
        "vae_psnr_db": psnr(pipeline.vae, renders),
        "cpu_s_per_image": cpu_s / n,
    }
    scores["arms"]["other_captions"] = shares(reader, samples, scenes[n // 2 :] + scenes[: n // 2])
    if name in COMPARISONS:
        scores |= COMPARISONS[name](draw, reader, scenes[: max(1, min(FEW_SCENES, n // 8))])
    return scores, samples


def _t5_tokens(draw: Draw, reader: SceneReader, scenes: list[Scene]) -> dict[str, Any]:
    """What a caller of SD3 gets for another `max_sequence_length`: the same noise, some more equal tokens."""
    found = {}
    for tokens in T5_TOKENS:
        began = time.process_time()
        drawn = draw([s.caption for s in scenes], max_sequence_length=tokens)
        cpu_s = time.process_time() - began
        found[str(tokens)] = {**shares(reader, drawn, scenes), "cpu_s_per_image": cpu_s / len(scenes)}
    return {"t5_tokens": found}


def _padding(draw: Draw, _reader: SceneReader, scenes: list[Scene]) -> dict[str, Any]:
    """Whether PixArt draws the same picture however far a caption is padded, since it masks the padding.

    largest_difference: over all values of all pictures, in levels of 255; rounding alone may make it 1.
    """
    drawn, cpu_s = [], {}
    for tokens in PADDINGS:
        began = time.process_time()
        drawn.append(draw([s.caption for s in scenes], max_sequence_length=tokens).astype(np.int16))
        cpu_s[str(tokens)] = (time.process_time() - began) / len(scenes)
    apart = int(np.abs(drawn[0] - drawn[1]).max())
    return {"padding": {"n": len(scenes), "largest_difference": apart, "cpu_s_per_image": cpu_s}}


COMPARISONS = {"sd3_tiny": _t5_tokens, "pixart_tiny": _padding}
