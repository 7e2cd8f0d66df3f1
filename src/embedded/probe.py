"""How the scene probe is trained: renders of both kinds of scenes, as they are and after the embedded autoencoder.

Pictures that a model generates are blurred, off in colour and bent here and there, so the probe learns from pictures that
were decoded from noised latents, blurred, noised and recoloured. It is judged on renders of another seed.
Legend: N renders, B batch, J joints; half of the renders are scenes as captions list them, half are scenes with people.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from src.backbones.source import EMBEDDED_ROOT
from src.config import load
from src.data.scenes import JOINTS, PEOPLE_VERSION, SCENES_VERSION, render, sample_people, sample_scene
from src.embedded.training import train_detector
from src.parent import worker_pool
from src.results import write_atomic
from src.tasks.nearness import depth_picture
from src.tasks.pose import FEWEST_JOINTS, OKS_THRESHOLDS, PCK_ALPHA, oks, pck
from src.tasks.scene_probe import CELL_PX, CELLS, FACTS, FOLDER, SIZE, WEIGHTS, SceneProbe, probe_hash
from src.tasks.skeleton import LAYOUTS

TRAIN_WORLD, HELD_OUT_WORLD = 0, 1
RENDERS, HELD_OUT = 8000, 500
BATCH, PEAK_LR, WARMUP = 48, 4e-3, 100
LATENT_NOISE = 0.3  # of a latent whose channels have unit variance: how far a generated one may be from a real one
HEAT_CELLS = 0.8  # standard deviation of a joint's target
BLUR_PX, NOISE, GAIN, SHIFT = (0.3, 1.2), 0.04, 0.12, 0.06  # of the augmentation, in pixels and shares of the full range
DEPTH_WEIGHT, HEAT_WEIGHT, PERSON_WEIGHT = 20.0, 1.0, 1.0
CHUNK = 100


@dataclass(frozen=True)
class Lessons:
    """images, trips (N, S, S, 3) uint8: renders, and the same after the autoencoder; nearness (N, S, S) uint8, of 255;
    joints (N, J, 2) float32 in pixels; person (N,) bool: whether there is one, else its joints mean nothing."""

    images: np.ndarray
    trips: np.ndarray
    nearness: np.ndarray
    joints: np.ndarray
    person: np.ndarray


def _render_chunk(job: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    world, start, stop = job
    rows = []
    for index in range(start, stop):
        scene = (sample_people if index % 2 else sample_scene)(world, index // 2)
        drawn = render(scene, SIZE)
        person = len(drawn["joints"]) > 0
        joints = drawn["joints"][0, :, :2] if person else np.zeros((len(JOINTS), 2), np.float32)
        rows.append((drawn["image"], depth_picture(drawn["depth"]), joints, person))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def load_lessons(world: int, count: int, cache_dir: Path, workers: int) -> Lessons:
    """Render (or read back) `count` scenes of a world. The folder appears under its final name only when it is whole."""
    folder = cache_dir / f"probe-v{SCENES_VERSION}.{PEOPLE_VERSION}-seed{world}-n{count}-{SIZE}px"
    if not folder.exists():
        jobs = [(world, s, min(s + CHUNK, count)) for s in range(0, count, CHUNK)]
        if workers > 1:
            with worker_pool(workers) as pool:
                parts = list(pool.map(_render_chunk, jobs))
        else:
            parts = [_render_chunk(job) for job in jobs]
        images, nearness, joints, person = (np.concatenate(column) for column in zip(*parts, strict=True))
        made = Lessons(images, round_trip(images, world), nearness, joints, person)
        part_folder = folder.with_name(f".{folder.name}.{os.getpid()}")
        part_folder.mkdir(parents=True)
        for field in fields(made):
            np.save(part_folder / f"{field.name}.npy", getattr(made, field.name))
        os.replace(part_folder, folder)
    return Lessons(**{field.name: np.load(folder / f"{field.name}.npy") for field in fields(Lessons)})


@torch.no_grad()
def round_trip(images: np.ndarray, seed: int, noise: float = LATENT_NOISE) -> np.ndarray:
    """(N, S, S, 3) uint8 through the shipped autoencoder; each latent gets noise of a deviation from 0 to `noise`."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(EMBEDDED_ROOT / "sd3_tiny" / "vae", local_files_only=True).eval()
    generator, out = torch.Generator().manual_seed(seed), []
    for first in range(0, len(images), 50):
        x = torch.from_numpy(images[first : first + 50]).movedim(-1, 1).float() / 127.5 - 1
        latent = vae.encode(x).latent_dist.mode()
        spread = noise * torch.rand(len(x), 1, 1, 1, generator=generator)
        latent = latent + spread * torch.randn(latent.shape, generator=generator)
        decoded = vae.decode(latent).sample.clamp(-1, 1)
        out.append(((decoded + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy())
    return np.concatenate(out)


def augment(x_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the batch; give all of it a little noise, and a gain and a shift for each colour channel."""
    from torchvision.transforms.functional import gaussian_blur

    count = len(x_B3HW)
    one, two = torch.rand(2, count, 1, 1, 1, generator=generator)
    sigma = BLUR_PX[0] + (BLUR_PX[1] - BLUR_PX[0]) * float(torch.rand((), generator=generator))
    x = torch.where(one < 0.5, gaussian_blur(x_B3HW, [5, 5], [sigma, sigma]), x_B3HW)
    gain, shift = (2 * torch.rand(2, count, 3, 1, 1, generator=generator) - 1) * torch.tensor([GAIN, SHIFT]).view(2, 1, 1, 1, 1)
    return (x * (1 + gain) + shift + torch.randn(x.shape, generator=generator) * NOISE * two).clamp(0, 1)


def heat_targets(joints: Tensor) -> Tensor:
    """(B, J, 2) in pixels -> (B, J, cells): a Gaussian around each joint, of sum 1; joints outside move to the border."""
    centres = (torch.arange(CELLS) + 0.5) * CELL_PX
    joints = joints.clamp(0, SIZE)
    bells = torch.exp(-((joints[..., None] - centres) ** 2) / (2 * (HEAT_CELLS * CELL_PX) ** 2))  # (B, J, 2, CELLS)
    target = (bells[..., 1, :, None] * bells[..., 0, None, :]).flatten(2)
    return target / target.sum(-1, keepdim=True)


def loss_of(probe: SceneProbe, x: Tensor, nearness: Tensor, joints: Tensor, person: Tensor) -> Tensor:
    """Mean error of depth, cross-entropy of joints where there is a person, and of whether there is one."""
    near, heat, found = probe(x)
    depth = (near - nearness).abs().mean()
    entropy = -(heat_targets(joints) * heat.flatten(2).log_softmax(-1)).sum(-1).mean(-1)
    places = (entropy * person).sum() / person.sum().clamp(min=1)
    return DEPTH_WEIGHT * depth + HEAT_WEIGHT * places + PERSON_WEIGHT * F.binary_cross_entropy_with_logits(found, person)


def fit(lessons: Lessons, steps: int, seed: int, log: Callable[[dict], None]) -> SceneProbe:
    """Train for `steps` batches, each a pure function of (seed, step). log receives one row per 100 steps and at the end."""

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        row = torch.randint(len(lessons.images), (BATCH,), generator=generator).numpy()
        pictures = np.concatenate([lessons.images[row[: BATCH // 2]], lessons.trips[row[BATCH // 2 :]]])
        x = augment(torch.from_numpy(pictures).movedim(-1, 1).float() / 255, generator)
        near, person = torch.from_numpy(lessons.nearness[row]).float() / 255, torch.from_numpy(lessons.person[row]).float()
        x = x.contiguous(memory_format=torch.channels_last)
        return loss_of(probe, x, near, torch.from_numpy(lessons.joints[row]), person)

    torch.manual_seed(seed)
    probe = SceneProbe()
    return train_detector(probe, loss_at, steps, BATCH, PEAK_LR, WARMUP, time.process_time(), log)


def judge(probe: SceneProbe, pictures: np.ndarray, truth: Lessons, min_confidence: float) -> dict[str, float | None]:
    """What the probe sees in pictures (N, S, S, 3) uint8 of known scenes, against the truth: means over pictures.

    depth_rmse on the 0 to 1 scale; of pictures with a person: found, the share where the probe finds it, joint_error_px of
    those (None if there are none), and pck, oks and oks_map as task=pose defines them, 0 where nobody was found; of those
    without: invented, the share where it finds one.
    """
    nearness, joints = probe.read(pictures)
    joints[..., 2] *= joints[..., 2] >= min_confidence
    seen = (joints[..., 2] > 0).sum(1) >= FEWEST_JOINTS
    exact = np.concatenate([truth.joints, np.ones_like(truth.joints[..., :1])], 2)
    both, people = np.flatnonzero(seen & truth.person), int(truth.person.sum())
    similar = np.array([oks(joints[i], exact[i], LAYOUTS["scene14"].sigmas) for i in both])
    near = np.array([pck(joints[i], exact[i], PCK_ALPHA) for i in both])
    off = np.hypot(*np.moveaxis(joints[both, :, :2] - exact[both, :, :2], -1, 0))
    off_depth = nearness.astype(np.float64) - truth.nearness / 255
    values = {
        "depth_rmse": np.sqrt(np.square(off_depth).mean((1, 2))).mean(),
        "found": len(both) / people,
        "joint_error_px": off.mean() if len(both) else None,
        "pck": near.sum() / people,
        "oks": similar.sum() / people,
        "oks_map": (similar[:, None] >= OKS_THRESHOLDS).mean(1).sum() / people,
        "invented": (seen & ~truth.person).sum() / max(1, len(pictures) - people),
    }
    return {name: None if value is None else round(float(value), 4) for name, value in values.items()}


def judged(probe: SceneProbe, held: Lessons, min_confidence: float) -> dict[str, dict[str, float | None]]:
    """`judge` on held-out renders, on the same after the autoencoder, and decoded from latents with noise."""
    pictures = {
        "renders": held.images,
        "autoencoder": round_trip(held.images, HELD_OUT_WORLD, noise=0.0),
        "noised_latents": held.trips,
    }
    return {name: judge(probe, some, held, min_confidence) for name, some in pictures.items()}


def train_probe(
    cache_dir: Path, steps: int, workers: int, say: Callable[[str], None], seed: int = 0, folder: Path = FOLDER
) -> Path:
    """Render, train, judge on renders of another seed, and write the probe -> its folder. About ten minutes of one core.

    A probe that is there already is left alone: scores compare only if the probe is the same.
    """
    if (folder / WEIGHTS).exists():
        say(f"scene probe: {folder} is there already")
        return folder
    say(f"scene probe: {RENDERS} renders, {steps} steps of {BATCH}")
    rows: list[dict] = []

    def log(row: dict) -> None:
        rows.append(row)
        say(f"  step {row['step']} of {steps}, loss {row['train_loss']:.3f}, {row['cpu_s']:.0f} s")

    lessons = load_lessons(TRAIN_WORLD, RENDERS, cache_dir, workers)
    held = load_lessons(HELD_OUT_WORLD, HELD_OUT, cache_dir, workers)
    torch.set_num_threads(1)
    probe = fit(lessons, steps, seed, log)
    facts = facts_of(rounded(probe), lessons, held, rows, seed)
    save_probe(probe, folder, facts)
    return folder


def facts_of(probe: SceneProbe, lessons: Lessons, held: Lessons, rows: list[dict], seed: int) -> dict:
    """Recipe and measured quality of a trained probe, rounded as it is shipped. rows: what its training logged."""
    least = float(load("train", ["task=pose"]).task.min_confidence)
    return {
        **{"seed": seed, "renders": len(lessons.images), "steps": rows[-1]["step"], "batch": BATCH, "lr": PEAK_LR},
        **{"cpu_s": rows[-1]["cpu_s"], "train_loss": rows[-1]["train_loss"], "min_confidence": least},
        **{"parameters": sum(p.numel() for p in probe.parameters()), "n_held_out": len(held.images)},
        **{"n_people": int(held.person.sum()), "quality": judged(probe, held, least)},
    }


def rounded(probe: SceneProbe) -> SceneProbe:
    """The probe with the weights that are shipped, which were rounded to fp16."""
    weights = probe.state_dict()
    probe.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in weights.items()})
    return probe


def save_probe(probe: SceneProbe, folder: Path, facts: dict) -> None:
    """Write model.safetensors (fp16), probe.json (facts: recipe and measured quality, beside the joints' names), README.md."""
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in probe.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FACTS, (json.dumps({"joints": list(JOINTS), **facts}, indent=1) + "\n").encode())
    write_atomic(folder / WEIGHTS, save(weights))  # before its card, which names its hash
    write_atomic(folder / "README.md", card(facts, probe_hash(folder)).encode())


def card(facts: dict, weight_hash: str) -> str:
    """The README beside the weights, from probe.json."""
    head = ["pictures", *facts["quality"]["renders"]]
    named = {
        "renders": "as rendered",
        "autoencoder": "after the embedded autoencoder",
        "noised_latents": f"decoded from latents with noise of 0 to {LATENT_NOISE}",
    }
    rows = [[named[k], *("-" if v is None else f"{v:.4f}" for v in values.values())] for k, values in facts["quality"].items()]
    table = [f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]
    return f"""# Scene probe

Depth and 14 joints from a 64-pixel picture of a scene: the detector of `task=depth` and `task=pose` on `data=scenes` and
`data=scenes_people`. Weights {weight_hash}, {facts["parameters"] / 1e6:.2f} M parameters in fp16.

Trained from nothing on {facts["renders"]} renders of world {TRAIN_WORLD}, half of them with people, for {facts["steps"]}
steps of {facts["batch"]} in {facts["cpu_s"] / 60:.1f} minutes of one core, seed {facts["seed"]}: `python -m src.prepare probe`.

Against the truth on {facts["n_held_out"]} renders of world {HELD_OUT_WORLD}, {facts["n_people"]} with a person:

{chr(10).join(table)}

depth_rmse: on the 0 to 1 scale of the depth map. found: share of the persons found, which takes {FEWEST_JOINTS} joints
with a confidence of {facts["min_confidence"]}. joint_error_px: mean of those. pck: within {PCK_ALPHA} of the person's box; it,
oks and oks_map are as `src/tasks/pose.py` defines them, 0 for a person not found. invented: share of pictures without a
person in which one is found.
"""
