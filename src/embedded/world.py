"""Scenes rendered once into a folder of numpy files, from which the embedded models are trained.

Legend: N scenes, S side in pixels. A cache folder is named by everything that decides its content.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data.scenes import BONES, SCENES_VERSION, render, sample_scene
from src.parent import worker_pool
from src.tasks.edges import colour_canny
from src.tasks.nearness import depth_picture
from src.tasks.skeleton import draw_skeletons

CHUNK = 250


@dataclass(frozen=True)
class World:
    """images (N, S, S, 3) uint8 and captions (N,); maps (M, S, S, 3) uint8: control maps of the first scenes."""

    images: np.ndarray
    captions: list[str]
    maps: np.ndarray


def _render_chunk(job: tuple[int, int, int, int, int]) -> tuple[np.ndarray, list[str], np.ndarray]:
    seed, start, stop, size, map_scenes = job
    images, captions, maps = [], [], []
    for index in range(start, stop):
        scene = sample_scene(seed, index)
        drawn = render(scene, size)
        images.append(drawn["image"])
        captions.append(scene.caption)
        if index < map_scenes:
            edges = colour_canny(drawn["image"], 50, 120, 0.8)
            flat = [edges, depth_picture(drawn["depth"])]
            maps += [np.repeat(m[..., None], 3, 2) for m in flat]
            if len(drawn["joints"]):
                maps.append(draw_skeletons(drawn["joints"], BONES, size))
    return np.stack(images), captions, np.stack(maps) if maps else np.zeros((0, size, size, 3), np.uint8)


def load_world(seed: int, count: int, size: int, map_scenes: int, cache_dir: Path, workers: int) -> World:
    """Render (or read back) scenes 0..count-1 of the world `seed`.

    map_scenes: how many of them also give control maps (canny, depth, skeletons) for the autoencoder's diet.
    The folder appears under its final name only when it is whole.
    """
    folder = cache_dir / f"world-v{SCENES_VERSION}-seed{seed}-n{count}-m{map_scenes}-{size}px"
    if not folder.exists():
        jobs = [(seed, s, min(s + CHUNK, count), size, map_scenes) for s in range(0, count, CHUNK)]
        with worker_pool(workers) as pool:
            parts = list(pool.map(_render_chunk, jobs))
        part_folder = folder.with_name(f".{folder.name}.{os.getpid()}")
        part_folder.mkdir(parents=True)
        np.save(part_folder / "images.npy", np.concatenate([p[0] for p in parts]))
        np.save(part_folder / "maps.npy", np.concatenate([p[2] for p in parts]))
        (part_folder / "captions.json").write_text(json.dumps([c for p in parts for c in p[1]]))
        os.replace(part_folder, folder)
    return World(
        np.load(folder / "images.npy", mmap_mode="r"),
        json.loads((folder / "captions.json").read_text()),
        np.load(folder / "maps.npy", mmap_mode="r"),
    )
