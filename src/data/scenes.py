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
PEOPLE_VERSION = 1  # the same for the scenes with people alone
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
SIDES = (-1, 1)  # of a person who faces the camera: its right is at the left of the picture
PEOPLE_POSES = {  # name -> ranges of the right and left upper arm, then of the forearms; "waving" also the other way round
    "with arms down": (((-1.5, -0.7), (-1.5, -0.7)), ((-1.7, -0.3), (-1.7, -0.3))),
    "with arms out": (((-0.4, 0.4), (-0.4, 0.4)), ((-0.7, 0.7), (-0.7, 0.7))),
    "with arms up": (((0.5, 1.3), (0.5, 1.3)), ((0.6, 1.9), (0.6, 1.9))),
    "waving": (((-1.5, -0.7), (-0.2, 0.9)), ((-1.7, -0.3), (0.8, 1.9))),
}
HEAD_RADIUS, LIMB_RADIUS = 0.19, 0.10
PEOPLE_HEIGHT = (0.65, 0.85)  # of the frame, from a person's highest to its lowest point
PEOPLE_WIDTH = 0.88  # of the frame at most, from hand to hand
COMPANY_SHARE = 0.5  # of the scenes with people, those with a second thing
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


def _body_joints(upper: np.ndarray, fore: np.ndarray, knees: np.ndarray, ankles: np.ndarray) -> np.ndarray:
    """-> (14, 3) of a person at the origin, in the order of `JOINTS`; right side first in every argument.

    upper, fore: (2,) upward angles of the arms; knees, ankles: (2, 3) from the hip of that side.
    """
    neck = np.array([0, 1.62, 0])
    joints = [neck + [0, 0.32, 0], neck]
    for side, (a, b) in zip(SIDES, zip(upper, fore, strict=True), strict=True):
        shoulder = neck + [0.26 * side, -0.08, 0]
        elbow = shoulder + 0.42 * np.array([side * np.cos(a), np.sin(a), 0])
        joints += [shoulder, elbow, elbow + 0.42 * np.array([side * np.cos(b), np.sin(b), 0])]
    for side, knee, ankle in zip(SIDES, knees, ankles, strict=True):
        hip = np.array([0.16 * side, 0.88, 0])
        joints += [hip, hip + knee, hip + ankle]
    return np.stack(joints)


def _person_joints(rng: np.random.Generator, x: float, z: float, pose: str) -> np.ndarray:
    """-> (14, 3) world positions in the order of `JOINTS`; angles are the pose's plus a little noise."""
    scale = rng.uniform(1.05, 1.22)
    upper, fore = (np.array(a) + rng.uniform(-0.15, 0.15, 2) for a in POSES[pose])
    lean = rng.uniform(0.10, 0.28, 2)
    legs = np.array([[side * np.sin(angle), -np.cos(angle), 0] for side, angle in zip(SIDES, lean, strict=True)])
    joints = _body_joints(upper, fore, 0.42 * legs, 0.82 * legs)
    return (joints * scale + [x, 0, z]).astype(np.float32)


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


def sample_people(seed: int, index: int) -> Scene:
    """The scene number `index` of the world `seed` with people: one person, posed freely, and in half of them another thing.

    Limbs take any angle that their pose's name allows, the person turns up to 0.6 rad to a side, and its distance is such
    that it fills `PEOPLE_HEIGHT` of the frame. The camera looks at it, but not at its middle.
    """
    rng = np.random.default_rng([seed, index, 1])
    pose = str(rng.choice(list(POSES)))
    joints = _posed(rng, pose)
    radius = np.array([HEAD_RADIUS] + [LIMB_RADIUS] * (len(JOINTS) - 1))[:, None]
    low, high = (joints - radius).min(0), (joints + radius).max(0)
    wide, tall, _ = high - low
    share = min(rng.uniform(*PEOPLE_HEIGHT), PEOPLE_WIDTH * tall / wide)
    frame = tall / share  # scene units from edge to edge of the picture, where the person stands
    z = frame / (2 * np.tan(0.5 * View.fov))
    spare_x, spare_y = (np.array([PEOPLE_WIDTH * frame - wide, (1 - share) * frame]) / 2).clip(0)
    camera_x, height, yaw = rng.uniform(-0.35, 0.35), rng.uniform(1.35, 2.0), rng.uniform(-0.06, 0.06)
    aim = (low[1] + high[1]) / 2 + rng.uniform(-0.6, 0.6) * spare_y
    view = View(x=camera_x, height=height, pitch=np.arctan((height - aim) / z), yaw=yaw)
    x = view.x + np.tan(yaw) * z + rng.uniform(-0.8, 0.8) * spare_x
    joints = (joints + [x - (low[0] + high[0]) / 2, 0, z]).astype(np.float32)
    colours = [str(c) for c in rng.choice(list(COLOURS), 2, replace=False)]
    things = [Thing("person", colours[0], "large", 0.62, float(x), float(z), 0.0, pose, joints)]
    floor = str(rng.choice(list(FLOORS)))
    if rng.uniform() < COMPANY_SHARE:
        shape, size = str(rng.choice(SHAPES)), str(rng.choice(list(SIZES)))
        radius = SIZES[size] * rng.uniform(0.92, 1.08)
        place = _free_place(rng, radius, view, [(float(x), float(z), 0.62)], near=False)
        things.append(Thing(shape, colours[1], size, radius, *place, rng.uniform(0, np.pi / 2)))
    return Scene(tuple(things[i] for i in rng.permutation(len(things))), floor, view)


def _posed(rng: np.random.Generator, pose: str) -> np.ndarray:
    """-> (14, 3) joints of a person above the origin with freely drawn limbs, its lower foot on the floor."""
    scale = rng.uniform(1.05, 1.22)
    upper, fore = (np.array([rng.uniform(*side) for side in sides]) for sides in PEOPLE_POSES[pose])
    if rng.uniform() < 0.5:  # of the poses with names only waving tells one side from the other
        upper, fore = upper[::-1], fore[::-1]
    thighs, shins, turn = rng.uniform(0.02, 0.5, 2), rng.uniform(-0.2, 0.4, 2), rng.uniform(-0.6, 0.6)
    knees, shanks = (
        np.array([[side * np.sin(angle), -np.cos(angle), 0] for side, angle in zip(SIDES, angles, strict=True)])
        for angles in (thighs, shins)
    )
    joints = _body_joints(upper, fore, 0.42 * knees, 0.42 * knees + 0.40 * shanks)
    c, s = np.cos(turn), np.sin(turn)
    joints = joints @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    joints[:, 1] -= joints[:, 1].min() - 0.06
    return joints * scale


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
            limbs = [(a, b, LIMB_RADIUS) for a, b in BONES[:-1] if (a, b) not in ((1, 8), (1, 11))]
            bodies += [Body("capsule", tuple(j[a]), w, rgb, owner, tip=tuple(j[b])) for a, b, w in limbs]
            bodies.append(Body("capsule", tuple(j[1] - [0, 0.22, 0]), 0.19, rgb, owner, tip=tuple(hips)))
            bodies.append(Body("ball", tuple(j[0]), HEAD_RADIUS, rgb, owner))
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
    people: every scene has one person, large enough to be posed (`sample_people`).
    Signals: depth, segmentation and joints, exact, as `render` returns them.
    """

    signals = ("depth", "joints", "segmentation")
    are_scenes = True

    def __init__(
        self,
        name: str,
        world_seed: int,
        train_images: int,
        val_images: int,
        split: Split,
        resolution: int,
        people: bool = False,
    ):
        self.name, self.resolution = name, resolution
        self.world = 2 * world_seed + (split == "val")
        self.count = train_images if split == "train" else val_images
        self.kind, self.sample = ("people", sample_people) if people else ("scene", sample_scene)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        drawn = render(self.sample(self.world, index), self.resolution)
        name, caption = self.describe(index)
        return Sample(id=name, image=drawn.pop("image"), caption=caption, signals=drawn)

    def describe(self, index: int) -> tuple[str, str]:
        return f"{self.kind}-{self.world}-{index}", self.sample(self.world, index).caption

    def fingerprint(self) -> str:
        of_people = "" if self.kind == "scene" else f"-people-v{PEOPLE_VERSION}"
        return f"scenes-v{SCENES_VERSION}{of_people}-world{self.world}-{self.resolution}px-n{self.count}"
