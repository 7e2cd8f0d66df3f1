"""The detector for scenes: a small network that sees depth and joints in a 64-pixel picture, real or generated.

It stands to scenes as a depth model and a keypoint model stand to photos. `src/embedded/probe.py` trains it.
Legend: B batch, J = 14 joints; pictures (B, 3, 64, 64) float in [0, 1]; a pixel spans one unit, the first from 0 to 1.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from src.data.scenes import JOINTS
from src.types import UserError

SIZE, CELLS = 64, 32  # pixels of a side; cells of a heat map's side
CELL_PX = SIZE // CELLS
FOLDER = Path(__file__).parent / "weights" / "scene_probe"
WEIGHTS, FACTS = "model.safetensors", "probe.json"
REACH = 2  # cells around a heat map's peak over which a joint's place is averaged, and its confidence summed


class SceneProbe(nn.Module):
    """0.6 M parameters, 1.2 MB on disk: a U-Net from 32 to 4 cells a side and back.

    `forward` -> nearness (B, 64, 64) in [0, 1]; heat (B, J, 32, 32) as logits of a distribution over the cells, one per
    joint; person (B,), the logit that there is one at all.
    """

    def __init__(self):
        super().__init__()
        self.stem = _block(3 * CELL_PX**2, 32)
        self.down = nn.ModuleList([nn.Sequential(_block(a, b, 2), _block(b, b)) for a, b in ((32, 64), (64, 96), (96, 128))])
        self.narrow = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in ((128, 96), (96, 64), (64, 32))])
        self.up = nn.ModuleList([_block(96, 96), _block(64, 64), _block(32, 48)])
        self.depth, self.heat = nn.Conv2d(48, CELL_PX**2, 1), nn.Conv2d(48, len(JOINTS), 1)
        self.person = nn.Linear(128, 1)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        skips = [self.stem(F.pixel_unshuffle(x_B3HW * 2 - 1, CELL_PX))]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        person = self.person(x.amax((2, 3))).squeeze(1)
        for narrow, up in zip(self.narrow, self.up, strict=True):
            x = up(F.interpolate(narrow(x), scale_factor=2) + skips.pop())
        return F.pixel_shuffle(self.depth(x), CELL_PX).squeeze(1).sigmoid(), self.heat(x), person

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 64, 64, 3) uint8 -> nearness (N, 64, 64) float32 in [0, 1]; joints (N, J, 3): column and row in pixels,
        confidence in [0, 1].

        Raises ValueError for pictures of another size or type.
        """
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"the scene probe wants (N, {SIZE}, {SIZE}, 3) uint8, got {pictures.shape} {pictures.dtype}")
        near, joints = [], []
        for first in range(0, len(pictures), 64):
            some = torch.from_numpy(np.array(pictures[first : first + 64])).movedim(-1, 1).float() / 255
            nearness, heat, person = self(some)
            near.append(nearness)
            joints.append(_decode(heat, person))
        return torch.cat(near).numpy(), torch.cat(joints).numpy()


def _block(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), nn.ReLU())


def _decode(heat: Tensor, person: Tensor) -> Tensor:
    """-> (B, J, 3): the mean place around each peak in pixels, and the share of the mass that is there."""
    mass = heat.flatten(2).softmax(-1)
    peak = mass.argmax(-1)
    ticks = torch.arange(CELLS)
    in_rows = (ticks - (peak // CELLS)[..., None]).abs() <= REACH  # (B, J, CELLS)
    in_columns = (ticks - (peak % CELLS)[..., None]).abs() <= REACH
    near = mass.unflatten(-1, (CELLS, CELLS)) * (in_rows[..., :, None] & in_columns[..., None, :])
    total = near.sum((-1, -2))
    place = torch.stack([(near.sum(-2) * ticks).sum(-1), (near.sum(-1) * ticks).sum(-1)], -1) / total[..., None]
    confidence = total * person.sigmoid()[:, None]
    return torch.cat([(place + 0.5) * CELL_PX, confidence[..., None]], -1)


@cache
def load_probe(folder: Path = FOLDER) -> SceneProbe:
    """The trained probe. Raises UserError if it is not there or sees other joints than those of today's scenes."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"no scene probe in {folder}: make it with `python -m src.prepare probe`, or name another detector")
    joints = json.loads((folder / FACTS).read_text())["joints"]
    if joints != list(JOINTS):
        raise UserError(f"the scene probe in {folder} sees {joints}, not today's joints: delete that folder and train it again")
    probe = SceneProbe()
    weights = load_file(folder / WEIGHTS)
    probe.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return probe.eval()


def probe_hash(folder: Path = FOLDER) -> str:
    """16 hex digits over the weights: two scores compare only if it is the same."""
    return hashlib.blake2b((folder / WEIGHTS).read_bytes(), digest_size=8).hexdigest()


def look(image: np.ndarray, folder: Path = FOLDER) -> tuple[np.ndarray, np.ndarray]:
    """The probe on a picture of any size: (H, W, 3) uint8 -> nearness (H, W) float32, joints (J, 3) in its pixels.

    Other sizes than 64 are scaled to it (averaged when smaller), and what was seen is scaled back.
    """
    height, width = image.shape[:2]
    if (height, width) == (SIZE, SIZE):
        nearness, joints = load_probe(folder).read(image[None])
        return nearness[0], joints[0]
    shrinks = min(height, width) > SIZE
    small = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    nearness, joints = load_probe(folder).read(small[None])
    scale = np.array([width / SIZE, height / SIZE, 1], np.float32)
    return cv2.resize(nearness[0], (width, height), interpolation=cv2.INTER_LINEAR), joints[0] * scale
