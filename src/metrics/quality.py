"""How good single pictures look, by networks that were trained on what people say; each present only with its weights.

clip_score, clip_iqa: `src/metrics/clip.py`. musiq (Ke et al. 2021, 2108.05997) and maniqa (Yang et al. 2022, 2204.08958): by
pyiqa, in the variants trained on KonIQ-10k. lpips: distance to the original (`src/tasks/picture_metrics.py`).
All of them learned from photos: what they say of rendered scenes compares methods at best, and means nothing by itself.
Legend: N pictures, B of them at once; pictures (H, W, 3) uint8.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from src.metrics.clip import PROMPTS, ClipScores
from src.metrics.clip import SETTING as CLIP_SETTING
from src.metrics.extractors import Pictures, full_precision, sha256
from src.metrics.intervals import Better, metric
from src.tasks.picture_metrics import ALEXNET_FILE, LPIPS
from src.types import UserError

PYIQA = {  # metric -> unit, and the file that pyiqa itself would fetch
    "musiq": ("score of 0 to 100", "musiq_koniq_ckpt-e95806b9.pth"),
    "maniqa": ("score of 0 to 1", "ckpt_koniq10k.pt"),
}
LPIPS_SETTING = "metrics.lpips_weights"
BATCH = 16


class PictureMetric(Protocol):
    """metrics: name -> (unit, which direction is better); described: one line; needs_original: whether it compares."""

    metrics: dict[str, tuple[str, Better]]
    described: str
    needs_original: bool

    def score(self, pictures: Pictures, captions: list[str], originals: Pictures | None) -> dict[str, np.ndarray]:
        """B pictures -> (B,) float64 of each metric; originals: of the same sizes, where there are any."""

    def settings(self) -> dict[str, Any]:
        """Which weights, with their hash: scores with other settings do not compare."""


class PyiqaMetric:
    """musiq or maniqa. weights: the file. Raises UserError where it or the package is missing.

    The file is read as plain tensors and must hold the whole network; pyiqa's own loading would run what is in it, and
    would fetch a network that the file then replaces.
    """

    needs_original = False

    def __init__(self, name: str, weights: str, device: str = "cpu"):
        unit, usual = PYIQA[name]
        self.name, self.file, self.device = name, Path(weights).expanduser(), device
        self.setting, self.metrics = f"metrics.{name}_weights={weights!r}", {name: (unit, "higher")}
        if not self.file.is_file():
            raise UserError(f"{self.setting} is not a file; give pyiqa's {usual}, or null")
        if importlib.util.find_spec("pyiqa") is None:
            raise UserError(f"{self.setting} wants a package: pip install 'controlbench[iqa]', or null")
        self.described = f"{name} from {self.file.name}, sha256 {sha256(self.file)[:8]}"

    def settings(self) -> dict[str, Any]:
        return {self.name: self.file.name, "hash": sha256(self.file)}

    def score(self, pictures: Pictures, captions: list[str], originals: Pictures | None) -> dict[str, np.ndarray]:
        """One picture at a time: they may differ in size."""
        import torch

        found = []
        for picture in pictures:
            x = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float().div(255).to(self.device)
            with torch.no_grad(), full_precision(self.device):
                found.append(float(self._net(x)))
        return {self.name: np.array(found, np.float64)}

    @cached_property
    def _net(self) -> Any:
        import torch

        try:
            stored = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader raises types of its own for a broken file
            raise UserError(f"{self.setting} cannot be read ({type(error).__name__}); fetch it again") from error
        stored = stored.get("params", stored) if isinstance(stored, dict) else {}
        stored = {key.removeprefix("module."): x for key, x in stored.items()}
        with torch.random.fork_rng(devices=[]), _no_download():  # a fresh network draws numbers
            import pyiqa

            whole = pyiqa.create_metric(self.name, device=torch.device("cpu"), pretrained=False)
        try:
            whole.net.load_state_dict(stored)
        except RuntimeError as error:
            raise UserError(f"{self.setting} is not {self.name}'s: {str(error).splitlines()[1].strip()[:120]}") from error
        return whole.net.to(self.device).eval()


class LpipsMetric:
    """LPIPS between each picture and its original, as the tasks compute it. Raises UserError as `LPIPS`."""

    metrics: ClassVar[dict[str, tuple[str, Better]]] = {"lpips": ("distance", "lower")}
    needs_original = True

    def __init__(self, weights: str):
        self._distance = LPIPS(weights)
        self.described = f"lpips with {self._distance.described}"

    def settings(self) -> dict[str, Any]:
        return {"lpips": "AlexNet 0.1", "hash": sha256(self._distance.file)}

    def score(self, pictures: Pictures, captions: list[str], originals: Pictures | None) -> dict[str, np.ndarray]:
        if originals is None:
            raise ValueError("lpips wants originals")
        return {"lpips": np.array([self._distance(a, b) for a, b in zip(pictures, originals, strict=True)])}


def picture_metrics(
    clip: str | None = None,
    musiq_weights: str | None = None,
    maniqa_weights: str | None = None,
    lpips_weights: str | None = None,
    device: str = "cpu",
) -> tuple[list[PictureMetric], list[str]]:
    """Those whose weights are named, and a line for each that is absent, with what would add it.

    Raises UserError for weights that are named and cannot be used: what was asked for is never left out in silence.
    """
    makers: dict[str, tuple[str | None, Callable[[str], PictureMetric], str]] = {
        f"clip_score, {', '.join(PROMPTS)}": (
            clip, lambda source: ClipScores(source, device), f"{CLIP_SETTING}=<folder or hub id of a CLIP model>",
        ),
        "musiq": (
            musiq_weights, lambda file: PyiqaMetric("musiq", file, device), f"metrics.musiq_weights=<{PYIQA['musiq'][1]}>",
        ),
        "maniqa": (
            maniqa_weights, lambda file: PyiqaMetric("maniqa", file, device), f"metrics.maniqa_weights=<{PYIQA['maniqa'][1]}>",
        ),
        "lpips": (lpips_weights, LpipsMetric, f"{LPIPS_SETTING}=<torchvision's {ALEXNET_FILE}>"),
    }  # fmt: skip
    present, absent = [], []
    for names, (source, make, setting) in makers.items():
        if source is None:
            absent.append(f"no {names}: {setting} adds {'it' if ',' not in names else 'them'}")
        else:
            present.append(make(source))
    return present, absent


def picture_scores(
    metrics: list[PictureMetric],
    pictures: Iterable[np.ndarray],
    captions: Iterable[str],
    originals: Iterable[np.ndarray] | None = None,
    batch: int = BATCH,
) -> dict[str, np.ndarray]:
    """name -> (N,) float64, in the order of the pictures. Metrics that compare are left out where there are no originals.

    Raises ValueError if the numbers of pictures, captions and originals differ, or there is none.
    """
    used = [m for m in metrics if originals is not None or not m.needs_original]
    found: dict[str, list[np.ndarray]] = {name: [] for m in used for name in m.metrics}
    rows = zip(pictures, captions, strict=True) if originals is None else zip(pictures, captions, originals, strict=True)
    while some := list(islice(rows, batch)):
        drawn, words, *others = (list(column) for column in zip(*some, strict=True))
        for m in used:
            for name, values in m.score(drawn, words, others[0] if others else None).items():
                found[name].append(values)
    if not all(found.values()):
        raise ValueError("scores of no picture are wanted")
    return {name: np.concatenate(values) for name, values in found.items()}


def entries(metrics: list[PictureMetric], scores: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """`picture_scores` as entries of `results.json`."""
    said = {name: how for m in metrics for name, how in m.metrics.items()}
    return {name: metric(values, *said[name]) for name, values in scores.items()}


@contextmanager
def _no_download() -> Iterator[None]:
    """Lets pyiqa build MANIQA without fetching the ImageNet weights of its trunk, which the named file replaces."""
    import timm

    made = timm.create_model
    timm.create_model = lambda *args, **options: made(*args, **{**options, "pretrained": False})
    try:
        yield
    finally:
        timm.create_model = made
