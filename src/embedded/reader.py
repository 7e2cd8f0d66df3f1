"""A small network that reads scenes: which shape each colour has, and the floor. The measuring stick of embedded models.

It knows nothing of any model under test: it learns from renders of world 0 and is judged on world 1. A reader that saw only
good renders would call any heap of limbs a person; so it also learns what is no shape, from renders that were bent out of
shape and from scenes in which two things share a colour. Its 64 features are the extractor of the Frechet distance
`fid_scenes`, which is no Inception FID and compares with none.
Legend: N scenes, B batch, K = 8 colours, F = 64 features; pictures (B, 3, 64, 64) float in [0, 1].
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from src.data.scenes import COLOURS, FLOORS, SHAPES, Scene, render, sample_scene
from src.embedded.training import train_detector
from src.results import write_atomic
from src.types import UserError

SIZE, FEATURES = 64, 64
KINDS = ("absent", *SHAPES, "person", "other")  # what a colour can be; other: of no shape, or more than one thing
OTHER = KINDS.index("other")
FOLDER = Path(__file__).parent / "weights" / "scene_reader"
BATCH, BENT, TWINS = 64, 8, 8  # pictures per step, and how many of them are bent or hold twins
SPOILED_SCENES = 3000  # scenes that bent renders are made from, and as many with twins
PEAK_LR, WARMUP = 4e-3, 100
BLUR_PX, NOISE = (0.3, 1.3), 0.03  # of the augmentation: decoders blur, and must not be punished for that alone
TOUCHED = 3  # 8-bit levels: a pixel that differs more from the empty scene belongs to a thing or its shadow
WOBBLE_PX, BEND_PX = (0.0, 1.0), (4.0, 8.0)  # a displacement of the first kind leaves a shape what it is


class SceneReader(nn.Module):
    """0.2 M parameters, 0.4 MB on disk; `forward` -> kinds (B, K, 7) and floor (B, 3) as logits, features (B, F)."""

    def __init__(self):
        super().__init__()
        plan = ((12, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1))  # channels in, out, stride; from 32 px to 8 px
        self.trunk = nn.Sequential(*(layer for p in plan for layer in _block(*p)), nn.Conv2d(96, FEATURES, 1))
        self.kinds, self.floor = nn.Linear(FEATURES, len(COLOURS) * len(KINDS)), nn.Linear(FEATURES, len(FLOORS))

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.trunk(F.pixel_unshuffle(x_B3HW * 2 - 1, 2))  # (B, F, 8, 8)
        features = maps.amax((2, 3))  # the caption does not say where, so neither do the features
        return self.kinds(features).unflatten(1, (len(COLOURS), len(KINDS))), self.floor(features), features

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N, 64, 64, 3) uint8 -> kinds (N, K) and floors (N,) as indices, features (N, F) float64.

        Raises ValueError for pictures of another size or type.
        """
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"the scene reader wants (N, {SIZE}, {SIZE}, 3) uint8, got {pictures.shape} {pictures.dtype}")
        outs = [self(unit(pictures[i : i + 128])) for i in range(0, len(pictures), 128)]
        kinds, floors, features = (torch.cat(part) for part in zip(*outs, strict=True))
        return kinds.argmax(-1).numpy(), floors.argmax(-1).numpy(), features.double().numpy()


def _block(width_in: int, width_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]


def unit(pictures: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float in [0, 1]; a copy, since cached pictures are read-only maps of a file."""
    return torch.from_numpy(np.array(pictures)).movedim(-1, 1).float() / 255


def labels(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """What the captions of N scenes say: kinds (N, K) as indices into `KINDS` in the order of `COLOURS`; floors (N,)."""
    kinds = np.zeros((len(scenes), len(COLOURS)), np.int64)
    colours, floors = list(COLOURS), list(FLOORS)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            kinds[row, colours.index(thing.colour)] = KINDS.index(thing.shape)
    return kinds, np.array([floors.index(s.floor) for s in scenes])


def outcomes(reader: SceneReader, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Question -> (right answers, questions asked), both (N,) per picture; `scenes` are what the captions promise.

    colour, shape: named things whose colour is seen at all, and seen in the right shape; shape/<kind>: the same for one kind;
    floor; scene: floor and all eight colours right, so nothing is missing and nothing invented.
    """
    wanted, floors = labels(scenes)
    kinds, read_floors, _ = reader.read(pictures)
    named, right, floor_right = wanted > 0, kinds == wanted, read_floors == floors
    each = np.ones(len(scenes), np.int64)
    counts = {
        "colour": ((named & (kinds > 0)).sum(1), named.sum(1)),
        "shape": ((named & right).sum(1), named.sum(1)),
        "floor": (floor_right.astype(np.int64), each),
        "scene": ((right.all(1) & floor_right).astype(np.int64), each),
    }
    for index, kind in enumerate(KINDS[1:OTHER], start=1):
        counts[f"shape/{kind}"] = ((right & (wanted == index)).sum(1), (wanted == index).sum(1))
    return counts


def accuracy(reader: SceneReader, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Share of right answers to each question of `outcomes` that was asked at all."""
    counts = outcomes(reader, pictures, scenes)
    return {name: round(float(right.sum() / asked.sum()), 4) for name, (right, asked) in counts.items() if asked.sum()}


def bend(x_BCHW: Tensor, span_px: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Displace each picture by a smooth random field (6 to 10 knots a side) of a standard deviation within span_px."""
    knots, count = int(torch.randint(6, 11, (), generator=generator)), len(x_BCHW)
    std = span_px[0] + (span_px[1] - span_px[0]) * torch.rand(count, 1, 1, 1, generator=generator)
    field = F.interpolate(torch.randn(count, 2, knots, knots, generator=generator), x_BCHW.shape[-2:], mode="bicubic")
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(x_BCHW.shape), align_corners=False)
    moved = still + (field * std * 2 / x_BCHW.shape[-1]).movedim(1, -1)  # a picture spans -1 to 1
    return F.grid_sample(x_BCHW, moved, padding_mode="border", align_corners=False)


def bent_things(pictures: np.ndarray, empty: np.ndarray, generator: torch.Generator) -> Tensor:
    """Renders whose things and shadows are bent out of shape before a straight background, (B, 3, S, S).

    pictures, empty: (B, S, S, 3) uint8 renders with and without their things. Were the floor's edge bent as well, it would
    give the game away.
    """
    touched = np.abs(pictures.astype(np.int16) - empty).max(-1, keepdims=True) > TOUCHED
    layer = torch.cat([unit(pictures), torch.from_numpy(touched).movedim(-1, 1).float()], 1)
    rgb, cover = bend(layer, BEND_PX, generator).split([3, 1], 1)
    return rgb * cover + unit(empty) * (1 - cover)


def empty_renders(world: int, count: int) -> np.ndarray:
    """The first `count` scenes of a world without their things, (N, 64, 64, 3) uint8."""
    return np.stack([render(replace(sample_scene(world, i), things=()), SIZE)["image"] for i in range(count)])


def twin_scenes(world: int, count: int) -> list[Scene]:
    """The first `count` scenes of a world with two or more things, the second made the twin of the first.

    It gets its colour, which no caption ever repeats; and its shape, half the time, or always where one is a person.
    """
    scenes, index = [], 0
    while len(scenes) < count:
        scene = sample_scene(world, index)
        if len(scene.things) > 1:
            one, two = sorted(scene.things[:2], key=lambda t: t.shape != "person")
            if one.joints is not None:
                shift = np.array([two.x - one.x, 0, two.z - one.z], np.float32)
                twin = replace(one, x=two.x, z=two.z, joints=one.joints + shift)
            else:
                twin = replace(two, colour=one.colour, shape=one.shape if index % 2 else two.shape)
            scenes.append(replace(scene, things=(one, twin, *scene.things[2:])))
        index += 1
    return scenes


def twin_labels(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """`labels` of twin scenes: the shared colour is `OTHER`."""
    kinds, floors = labels(scenes)
    kinds[np.arange(len(scenes)), [list(COLOURS).index(s.things[0].colour) for s in scenes]] = OTHER
    return kinds, floors


def augment(x_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the batch, blur half, and add a little noise and a change of brightness to all of it."""
    one, two, three = torch.rand(3, len(x_B3HW), generator=generator)
    x = torch.where((one < 0.5).view(-1, 1, 1, 1), x_B3HW.flip(-1), x_B3HW)
    sigma = BLUR_PX[0] + (BLUR_PX[1] - BLUR_PX[0]) * float(torch.rand((), generator=generator))
    x = torch.where((two < 0.5).view(-1, 1, 1, 1), gaussian_blur(x, [5, 5], [sigma, sigma]), x)
    gain, noise = (0.95 + 0.1 * three).view(-1, 1, 1, 1), torch.randn(x.shape, generator=generator)
    return (x * gain + noise * NOISE * two.view(-1, 1, 1, 1)).clamp(0, 1)


class _Lessons:
    """Batches of training, each a pure function of (seed, step): renders, bent renders, renders with twins."""

    def __init__(self, images: np.ndarray, world: int, steps: int, seed: int):
        spoiled = min(SPOILED_SCENES, BENT * steps, len(images))
        twins = twin_scenes(world, spoiled)
        self.images, self.empty, self.seed = images, empty_renders(world, spoiled), seed
        self.twins = np.stack([render(s, SIZE)["image"] for s in twins])
        self.labels = [torch.from_numpy(a) for a in labels([sample_scene(world, i) for i in range(len(images))])]
        self.twin_labels = [torch.from_numpy(a) for a in twin_labels(twins)]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> pictures (B, 3, H, W), kinds (B, K), floors (B,)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        row = torch.randint(len(self.images), (BATCH - TWINS,), generator=generator)
        row[:BENT] %= len(self.empty)
        twin = torch.randint(len(self.twins), (TWINS,), generator=generator)
        kinds, floors = (torch.cat([a[row], b[twin]]) for a, b in zip(self.labels, self.twin_labels, strict=True))
        kinds[:BENT] = torch.where(kinds[:BENT] > 0, OTHER, 0)
        images, spoiled = self.images[row.numpy()], row[:BENT].numpy()
        intact = bend(unit(np.concatenate([images[BENT:], self.twins[twin.numpy()]])), WOBBLE_PX, generator)
        x = torch.cat([bent_things(images[:BENT], self.empty[spoiled], generator), intact])
        return augment(x, generator).contiguous(memory_format=torch.channels_last), kinds, floors


def train_reader(images: np.ndarray, world: int, steps: int, seed: int, log: Callable[[dict], None]) -> SceneReader:
    """Train on scenes 0..N-1 of a world, whose renders are `images` (N, 64, 64, 3) uint8.

    log receives {"step", "images_seen", "cpu_s", "train_loss"} every 100 steps and at the end.
    """
    began = time.process_time()
    lessons = _Lessons(images, world, steps, seed)
    torch.manual_seed(seed)
    reader = SceneReader()

    def loss_at(step: int) -> Tensor:
        x, kinds, floors = lessons[step]
        kind_logits, floor_logits, _ = reader(x)
        # summed over colours: each picture asks eight questions about kinds and one about the floor
        loss = F.cross_entropy(kind_logits.flatten(0, 1), kinds.flatten()) * len(COLOURS)
        return loss + F.cross_entropy(floor_logits, floors)

    return train_detector(reader, loss_at, steps, BATCH, PEAK_LR, WARMUP, began, log)


def rejection(reader: SceneReader, pictures: np.ndarray, world: int) -> dict[str, float]:
    """Shares that the reader rightly calls `other`: things of bent renders, and the shared colour of twin scenes.

    pictures: renders of scenes 0..N-1 of a world that it was not trained on, (N, 64, 64, 3) uint8.
    """
    bent = bent_things(pictures, empty_renders(world, len(pictures)), torch.Generator().manual_seed(0))
    bent = bent.mul(255).round().to(torch.uint8).movedim(1, -1)
    named = labels([sample_scene(world, i) for i in range(len(pictures))])[0] > 0
    twins = twin_scenes(world, len(pictures) // 4)
    shared = twin_labels(twins)[0] == OTHER
    found = {
        "bent": (reader.read(bent.numpy())[0][named] == OTHER).mean(),
        "twins": (reader.read(np.stack([render(s, SIZE)["image"] for s in twins]))[0][shared] == OTHER).mean(),
    }
    return {name: round(float(share), 4) for name, share in found.items()}


def save_reader(reader: SceneReader, folder: Path, facts: dict) -> None:
    """Write model.safetensors (fp16) and reader.json (facts: recipe and measured accuracy, beside the vocabulary)."""
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in reader.state_dict().items()}
    vocabulary = {"colours": list(COLOURS), "kinds": list(KINDS), "floors": list(FLOORS)}
    write_atomic(folder / "reader.json", (json.dumps({**vocabulary, **facts}, indent=2) + "\n").encode())
    write_atomic(folder / "model.safetensors", save(weights))  # last: whoever sees it sees a whole reader


def load_reader(folder: Path = FOLDER) -> SceneReader:
    """Read what `save_reader` wrote; raises UserError if it is not there or knows other words."""
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"no scene reader in {folder}: train it with `python -m src.prepare`")
    facts = json.loads((folder / "reader.json").read_text())
    words = (facts["colours"], facts["kinds"], facts["floors"])
    if words != (list(COLOURS), list(KINDS), list(FLOORS)):
        raise UserError(
            f"the scene reader in {folder} reads {words}, not today's scenes: delete that folder and train it again"
        )
    reader = SceneReader()
    weights = load_file(folder / "model.safetensors")
    reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return reader.eval()


def reader_hash(folder: Path = FOLDER) -> str:
    """16 hex digits over the weights: two values of `fid_scenes` compare only if it is the same."""
    return hashlib.blake2b((folder / "model.safetensors").read_bytes(), digest_size=8).hexdigest()
