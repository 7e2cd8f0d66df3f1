"""How well an embedded backbone says what its caption says, read by `SceneReader`, between a ceiling and a floor.

Ceiling: real renders; reconstructions: the same through the autoencoder; floor: the samples against other captions.
Legend: N scenes (the first N held-out ones), F features.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from src import rng
from src.data.scenes import Scene
from src.embedded.reader import FEATURES, SIZE, SceneReader, outcomes
from src.embedded.vae import psnr, to_signed
from src.metrics.intervals import metric

SAMPLE_BATCH = 32
T5_TOKENS, T5_SCENES = (
    (0, 1, 256),
    64,
)  # values of `max_sequence_length` to compare (256 is diffusers' default, at 8 times the work)


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """Frechet distance of the normal distributions fitted to two sets of features, in float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the root of a symmetric matrix, by its eigenvalues.
    Raises ValueError unless both sets have more rows than columns: below that the covariance is singular.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_NF, b_MF))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) <= a.shape[1]:
        raise ValueError(f"a Frechet distance wants two sets (N, F) with N > F, got {a.shape} and {b.shape}")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ cov_b @ root)
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(mixed, 0)).sum())


def load_pipeline(folder: str | Path) -> StableDiffusion3Pipeline:
    """The stock pipeline without T5, in float32 and quiet: the one way to add no T5 token at all, as in training."""
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without_t5, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_captions(
    pipeline: StableDiffusion3Pipeline, captions: list[str], seed: int, steps: int, guidance: float, t5_tokens: int = 0
) -> np.ndarray:
    """-> (N, 64, 64, 3) uint8. Noise is keyed by the caption's number, so neither N nor the batch size changes a picture."""
    pictures = []
    for first in range(0, len(captions), SAMPLE_BATCH):
        some = captions[first : first + SAMPLE_BATCH]
        drawn = pipeline(
            some, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
            max_sequence_length=t5_tokens,
            generator=[rng.generator(seed, "score-noise", first + i) for i in range(len(some))],
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
    pipeline, prompts, scenes = load_pipeline(folder), [s.caption for s in scenes[:n]], scenes[:n]
    began = time.process_time()
    samples = sample_captions(pipeline, prompts, seed, steps, guidance)
    cpu_s = time.process_time() - began
    renders, reference = np.array(real[:n]), np.array(real[n : 2 * n])
    arms = {"samples": samples, "renders": renders, "reconstructions": reconstruct(pipeline.vae, renders)}
    features = {name: reader.read(pictures)[2] for name, pictures in arms.items()}
    target = reader.read(reference)[2]
    scores = {
        "conditions": {"n": n, "seed": seed, "steps": steps, "guidance": guidance, "max_sequence_length": 0},
        "arms": {name: shares(reader, pictures, scenes) for name, pictures in arms.items()},
        "fid_scenes": {name: frechet_distance(f, target) for name, f in features.items()} | {"n": n, "n_reference": n},
        "vae_psnr_db": psnr(pipeline.vae, renders),
        "cpu_s_per_image": cpu_s / n,
    }
    scores["arms"]["other_captions"] = shares(reader, samples, scenes[n // 2 :] + scenes[: n // 2])
    few = scenes[: max(1, min(T5_SCENES, n // 8))]
    scores["t5_tokens"] = {str(k): _with_tokens(pipeline, reader, few, k, seed, steps, guidance) for k in T5_TOKENS}
    return scores, samples


def _with_tokens(
    pipeline: StableDiffusion3Pipeline,
    reader: SceneReader,
    scenes: list[Scene],
    t5_tokens: int,
    seed: int,
    steps: int,
    guidance: float,
) -> dict[str, Any]:
    """What a caller gets for another `max_sequence_length`: the first prompts, the same noise, some more equal tokens."""
    began = time.process_time()
    drawn = sample_captions(pipeline, [s.caption for s in scenes], seed, steps, guidance, t5_tokens)
    return {**shares(reader, drawn, scenes), "cpu_s_per_image": (time.process_time() - began) / len(scenes)}
