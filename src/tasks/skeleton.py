"""Skeleton maps: joints drawn as coloured bones, in the hue order of OpenPose (Cao et al., 1812.08008).

Joints are (P, J, 3) float: column and row in pixels, and a third number that is positive where the joint is there: a
confidence, a visibility flag of COCO, or a depth. P people, J joints of a layout; a pixel spans one unit.
"""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

from src.data.scenes import BONES, JOINTS
from src.types import UserError

# Deviations of human annotations over the square root of the area (COCO's keypoint evaluation); COCO has no neck and no
# head, for which CrowdPose (Li et al., 1812.00324) takes the shoulders' number.
SIGMAS = {
    **{"nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062},
    **{"hip": 0.107, "knee": 0.087, "ankle": 0.089, "neck": 0.079, "head": 0.079},
}
STICK, DOT, DIM = 4 / 512, 4 / 512, 0.6  # of OpenPose maps: half a bone's width, a joint's radius, a bone's brightness


@dataclass(frozen=True)
class Layout:
    """A named order of joints. bones: pairs of joints, in the order of their colours; the k-th has hue k / hues.

    dots: whether joints are drawn over bones, each in the hue of its own number.
    """

    name: str
    joints: tuple[str, ...]
    bones: tuple[tuple[int, int], ...]
    hues: int
    dots: bool

    @property
    def sigmas(self) -> np.ndarray:
        """(J,) of `SIGMAS`, whichever side a joint is on."""
        return np.array([SIGMAS[name.rpartition("_")[2]] for name in self.joints])


_ARMS = ("right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist")
_LEGS = ("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle")
_OPENPOSE_BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("scene14", JOINTS, BONES, len(BONES), False),
        Layout(
            "openpose18",
            ("nose", "neck", *_ARMS, *_LEGS, "right_eye", "left_eye", "right_ear", "left_ear"),
            _OPENPOSE_BONES,
            18,
            True,
        ),
        Layout(  # drawn as OpenPose's, once its neck is added
            "coco17",
            ("nose", *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                       for side in ("left", "right"))),
            (),
            18,
            True,
        ),
    )
}  # fmt: skip


def layout_of(name: str, joints: np.ndarray | None = None) -> Layout:
    """The layout of a name. Raises UserError for an unknown one, or if joints are not (P, J, 2 or 3) in it; no joints at all
    are nobody's, in any layout."""
    if name not in LAYOUTS:
        raise UserError(f"layout {name!r} is not known; there are {', '.join(LAYOUTS)}")
    layout, wanted = LAYOUTS[name], len(LAYOUTS[name].joints)
    if joints is not None and joints.size and (joints.ndim != 3 or joints.shape[1] != wanted or joints.shape[2] not in (2, 3)):
        fits = [n for n, other in LAYOUTS.items() if joints.ndim == 3 and len(other.joints) == joints.shape[1]]
        fix = f"write task.layout={fits[0]}" if fits else f"there are {', '.join(LAYOUTS)}"
        raise UserError(f"joints of the layout {name} are (people, {wanted}, 2 or 3), these are {joints.shape}; {fix}")
    return layout


def draw_skeletons(joints: np.ndarray, bones: tuple[tuple[int, int], ...], size: int | tuple[int, int]) -> np.ndarray:
    """(P, J, >= 2) joints -> (H, W, 3) uint8: black with one hue per bone. size: (H, W), or the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    canvas = np.zeros((height, width, 3), np.uint8)
    thick = max(1, round(min(height, width) / 64))
    for person in joints:
        for k, (a, b) in enumerate(bones):
            if _there(person, a) and _there(person, b):
                cv2.line(canvas, _fixed(person[a]), _fixed(person[b]), _hue(k, len(bones)), thick, cv2.LINE_AA, shift=4)
    return canvas


def skeleton_map(joints: np.ndarray, name: str, size: tuple[int, int]) -> np.ndarray:
    """(P, J, 2 or 3) joints of a named layout -> (H, W, 3) uint8 in that layout's colours.

    scene14: thin bones, as the embedded autoencoder knows them. openpose18, coco17: OpenPose's drawing as ControlNet was
    trained on it, bones at 0.6 of their colour under dots, 8 pixels wide at 512. size: (H, W).
    """
    layout = layout_of(name, joints)
    if not joints.size:
        return np.zeros((*size, 3), np.uint8)
    if name == "coco17":
        joints, layout = coco_to_openpose(joints), LAYOUTS["openpose18"]
    if not layout.dots:
        return draw_skeletons(joints, layout.bones, size)
    canvas, side = np.zeros((*size, 3), np.uint8), min(size)
    stick, dot = max(0.5, STICK * side), max(1, round(DOT * side))
    for person in joints:
        for k, (a, b) in enumerate(layout.bones):
            if _there(person, a) and _there(person, b):
                colour = tuple(round(DIM * c) for c in _hue(k, layout.hues))
                cv2.fillConvexPoly(canvas, _spindle(person[a][:2], person[b][:2], stick), colour, shift=4)
        for k in range(len(layout.joints)):
            if _there(person, k):
                cv2.circle(canvas, tuple(round(float(v)) for v in person[k][:2]), dot, _hue(k, layout.hues), -1)
    return canvas


def coco_to_openpose(joints: np.ndarray) -> np.ndarray:
    """(P, 17, 2 or 3) of COCO -> (P, 18, 3) of OpenPose: the neck is the middle of the shoulders, there if both are."""
    coco, openpose = LAYOUTS["coco17"].joints, LAYOUTS["openpose18"].joints
    known = joints if joints.shape[2] == 3 else np.concatenate([joints, np.ones((*joints.shape[:2], 1))], 2)
    shoulders = known[:, [coco.index("left_shoulder"), coco.index("right_shoulder")]]
    neck = np.concatenate([shoulders[..., :2].mean(1), shoulders[..., 2:].min(1)], 1)
    columns = [neck if name == "neck" else known[:, coco.index(name)] for name in openpose]
    return np.stack(columns, 1).astype(np.float32)


def _there(person: np.ndarray, joint: int) -> bool:
    return person.shape[1] < 3 or person[joint][2] > 0


def _hue(k: int, hues: int) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / hues, 1, 1))


def _fixed(joint: np.ndarray) -> tuple[int, ...]:
    """In sixteenths of a pixel, as OpenCV draws between pixels."""
    return tuple(round(float(v) * 16) for v in joint[:2])


def _spindle(a: np.ndarray, b: np.ndarray, half_width: float) -> np.ndarray:
    """The ellipse from a to b as a polygon of 36 points, (36, 2) int32 in sixteenths of a pixel."""
    along = (np.asarray(b, np.float64) - a) / 2
    length = max(float(np.hypot(*along)), 1e-6)
    across = np.array([-along[1], along[0]]) / length * half_width
    turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)[:, None]
    outline = (np.asarray(a, np.float64) + b) / 2 + np.cos(turn) * along + np.sin(turn) * across
    return np.round(outline * 16).astype(np.int32)
