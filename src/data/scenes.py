"""The embedded world: procedural scenes with a caption, exact depth, segmentation and joints.

A scene is a pure function of (seed, index), whatever the worker, batch or machine. Positions are continuous and the
camera moves a little; the caption says what is there, never where, so that control has something left to prove.
"""

from dataclasses import dataclass

import numpy as np

from src.data.raycast import FIRST_BODY_ID, Body, View, cast
from src.data.source import Source, Split
from src.types import Sample

SCENES_VERSION = 1  # part of every cache key: raise it when a picture changes
COLOURS = {
    "red": (0.82, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.93, 0.82, 0.08),
    "purple": (0.55, 0.14, 0.75),
    "cyan": (0.10, 0.75, 0.80),
    "orange": (0.95, 0.48, 0.05),
    "white": (0.93, 0.93, 0.93),
}
SHAPES = ("ball", "cube", "cylinder", "cone")
SIZES = {"small": 0.42, "large": 0.72}
FLOORS = {  # floor name -> (floor colour, wall colour)
    "brown": ((0.50, 0.33, 0.20), (0.72, 0.66, 0.55)),
    "gray": ((0.50, 0.51, 0.54), (0.40, 0.44, 0.52)),
    "dark": ((0.17, 0.17, 0.20), (0.24, 0.28, 0.40)),
}
POSES = {  # name -> upward angle of the right and left upper arm, then of the forearms (radians, 0 is straight out)
    "with arms down": ((-1.25, -1.25), (-1.35, -1.35)),
    "with arms out": ((0.0, 0.0), (0.0, 0.0)),
    "with arms up": ((0.95, 0.95), (1.25, 1.25)),
    "waving": ((-1.25, 0.25), (-1.35, 1.35)),
}
JOINTS = (
    "head", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
)  # fmt: skip
BONES = ((1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (0, 1))
PERSON_SHARE = 0.15
COUNT_SHARES = (0.45, 0.45, 0.10)  # scenes with one, two and three things


@dataclass(frozen=True)
class Thing:
    """One named thing of a scene. radius in scene units; x, z on the floor; joints (14, 3) for a person, else None."""

    shape: str
    colour: str
    size: str
    radius: float
    x: float
    z: float
    yaw: float
    pose: str | None = None
    joints: np.ndarray | None = None

    @property
    def words(self) -> str:
        if self.shape == "person":
            return f"a {self.colour} person {self.pose}"
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What `render` draws: the things in caption order (which says nothing about place), the floor and the camera."""

    things: tuple[Thing, ...]
    floor: str
    view: View

    @property
    def caption(self) -> str:
        words = [t.words for t in self.things]
        listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
        return f"{listed}, {self.floor} floor"


def _person_joints(rng: np.random.Generator, x: float, z: float, pose: str) -> np.ndarray:
    """-> (14, 3) world positions in the order of `JOINTS`; angles are the pose's plus a little noise."""
    scale = rng.uniform(1.05, 1.22)
    upper, fore = (np.array(a) + rng.uniform(-0.15, 0.15, 2) for a in POSES[pose])
    lean = rng.uniform(0.10, 0.28, 2)
    neck = np.array([0, 1.62, 0])
    joints = [neck + [0, 0.32, 0], neck]
    for side, (a, b) in zip((-1, 1), zip(upper, fore, strict=True), strict=True):
        shoulder = neck + [0.26 * side, -0.08, 0]
        elbow = shoulder + 0.42 * np.array([side * np.cos(a), np.sin(a), 0])
        joints += [shoulder, elbow, elbow + 0.42 * np.array([side * np.cos(b), np.sin(b), 0])]
    for side, angle in zip((-1, 1), lean, strict=True):
        hip = np.array([0.16 * side, 0.88, 0])
        leg = np.array([side * np.sin(angle), -np.cos(angle), 0])
        joints += [hip, hip + 0.42 * leg, hip + 0.82 * leg]
    return (np.stack(joints) * scale + [x, 0, z]).astype(np.float32)


def sample_scene(seed: int, index: int) -> Scene:
    """The scene number `index` of the world `seed`; both are non-negative integers."""
    rng = np.random.default_rng([seed, index])
    view = View(
        x=rng.uniform(-0.35, 0.35), height=rng.uniform(1.35, 2.0), pitch=rng.uniform(0.08, 0.24), yaw=rng.uniform(-0.06, 0.06)
    )
    floor = str(rng.choice(list(FLOORS)))
    count = 1 + int(rng.choice(3, p=COUNT_SHARES))
    shapes = [str(rng.choice(SHAPES)) for _ in range(count)]
    if rng.uniform() < PERSON_SHARE:
        shapes[0] = "person"
    colours = rng.choice(list(COLOURS), count, replace=False)
    things, taken = [], []
    for shape, colour in zip(shapes, colours, strict=True):
        size = "large" if shape == "person" else str(rng.choice(list(SIZES)))
        radius = 0.62 if shape == "person" else SIZES[size] * rng.uniform(0.92, 1.08)
        x, z = _free_place(rng, radius, view, taken, near=shape == "person")
        taken.append((x, z, radius))
        yaw = rng.uniform(0, np.pi / 2)
        pose = str(rng.choice(list(POSES))) if shape == "person" else None
        joints = _person_joints(rng, x, z, pose) if pose else None
        things.append(Thing(shape, str(colour), size, radius, x, z, yaw, pose, joints))
    order = rng.permutation(count)
    return Scene(tuple(things[i] for i in order), floor, view)


def _free_place(rng: np.random.Generator, radius: float, view: View, taken: list, near: bool) -> tuple[float, float]:
    """A floor position in view whose line of sight and footprint are clear of `taken`; the last draw if none is found."""
    x = z = 0.0
    for _ in range(60):
        z = rng.uniform(3.6, 4.4) if near else rng.uniform(3.7, 5.4)
        x = view.x + (np.tan(view.yaw) + rng.uniform(-0.32, 0.32)) * z
        if all(
            abs(x / z - tx / tz) > 0.85 * (radius + tr) / min(z, tz) or abs(z - tz) > 1.3 * (radius + tr) + 0.4
            for tx, tz, tr in taken
        ) and all(np.hypot(x - tx, z - tz) > radius + tr for tx, tz, tr in taken):
            break
    return float(x), float(z)


def _bodies(scene: Scene) -> list[Body]:
    bodies = []
    for k, thing in enumerate(scene.things):
        owner, rgb, r = FIRST_BODY_ID + k, COLOURS[thing.colour], thing.radius
        if thing.shape == "person":
            j = thing.joints
            hips = (j[8] + j[11]) / 2
            limbs = [(a, b, 0.10) for a, b in BONES[:-1] if (a, b) not in ((1, 8), (1, 11))]
            bodies += [Body("capsule", tuple(j[a]), w, rgb, owner, tip=tuple(j[b])) for a, b, w in limbs]
            bodies.append(Body("capsule", tuple(j[1] - [0, 0.22, 0]), 0.19, rgb, owner, tip=tuple(hips)))
            bodies.append(Body("ball", tuple(j[0]), 0.19, rgb, owner))
        elif thing.shape == "ball":
            bodies.append(Body("ball", (thing.x, r, thing.z), r, rgb, owner))
        elif thing.shape == "cube":
            bodies.append(Body("cube", (thing.x, 0, thing.z), 0.82 * r, rgb, owner, yaw=thing.yaw))
        else:
            height = {"cylinder": 1.9, "cone": 2.2}[thing.shape] * r
            width = {"cylinder": 0.78, "cone": 0.95}[thing.shape] * r
            bodies.append(Body(thing.shape, (thing.x, 0, thing.z), width, rgb, owner, height=height))
    return bodies


def render(scene: Scene, size: int, oversample: int = 2) -> dict[str, np.ndarray]:
    """Draw a scene at size x size pixels.

    Returns image (size, size, 3) uint8; depth (size, size) float32 in scene units, larger is farther;
    segmentation (size, size) uint8: 0 wall, 1 floor, 2 + k the k-th thing of the caption;
    joints (P, 14, 3) float32: column and row in pixels, depth, one entry per person.
    """
    floor_rgb, wall_rgb = FLOORS[scene.floor]
    drawn = cast(scene.view, _bodies(scene), floor_rgb, wall_rgb, size, oversample)
    people = [scene.view.project(t.joints, size) for t in scene.things if t.joints is not None]
    return {
        "image": np.round(drawn["rgb"] * 255).astype(np.uint8),
        "depth": drawn["depth"],
        "segmentation": drawn["owner"].astype(np.uint8),
        "joints": np.stack(people) if people else np.zeros((0, len(JOINTS), 3), np.float32),
    }


class SceneSource(Source):
    """Scenes as a data set: `train_images` of one world and `val_images` of another, rendered when asked for.

    world_seed: training scenes come from the world `2 * world_seed`, held-out ones from `2 * world_seed + 1`.
    Signals: depth, segmentation and joints, exact, as `render` returns them.
    """

    def __init__(self, name: str, world_seed: int, train_images: int, val_images: int, split: Split, resolution: int):
        self.name, self.resolution = name, resolution
        self.world = 2 * world_seed + (split == "val")
        self.count = train_images if split == "train" else val_images

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        drawn = render(sample_scene(self.world, index), self.resolution)
        name, caption = self.describe(index)
        return Sample(id=name, image=drawn.pop("image"), caption=caption, signals=drawn)

    def describe(self, index: int) -> tuple[str, str]:
        return f"scene-{self.world}-{index}", sample_scene(self.world, index).caption

    def fingerprint(self) -> str:
        return f"scenes-v{SCENES_VERSION}-world{self.world}-{self.resolution}px-n{self.count}"
