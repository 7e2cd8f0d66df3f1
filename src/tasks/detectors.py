"""What sees depth and joints in a picture: the scene probe for scenes, models of transformers for photos.

A detector is named by `scene_probe`, a folder as `save_pretrained` writes it, or a hub id, owner/name or owner/name@revision.
Naming one reads its small configuration files, so that a missing or unfit model is refused at once; its weights are read at
the first picture. A folder never contacts the hub. All of them work on the CPU, one picture at a time.
"""

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from src.hub import answers, hub_fault
from src.tasks import scene_probe
from src.tasks.nearness import relative_nearness
from src.tasks.skeleton import LAYOUTS
from src.types import UserError

PROBE = "scene_probe"
# what the number of a pixel means, by model type; Depth Anything says it in its own configuration, and a DPT is one of
# MiDaS's unless task.predicts says otherwise
PREDICTS = {"dpt": "nearness", "depth_pro": "distance", "glpn": "distance", "zoedepth": "distance", "depth_anything": None}
Meaning = Literal["auto", "nearness", "distance"]
KEYPOINTS = {"vitpose": "coco17"}  # model type -> layout of its joints
FILES = ("config.json", "preprocessor_config.json")


class DepthDetector(ABC):
    """absolute: whether its numbers lie on the fixed scale of scenes, and not on one made for each picture.

    described: what is worth a line when a run starts.
    """

    absolute: bool
    described: str

    @abstractmethod
    def nearness(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (H, W) float32 in [0, 1], near is 1."""

    @abstractmethod
    def settings(self) -> dict:
        """Which detector, with the hash of its weights or its revision."""


class PoseDetector(ABC):
    """layout: name of the order of its joints, one of `skeleton.LAYOUTS`; described: as of a `DepthDetector`."""

    layout: str
    described: str

    @abstractmethod
    def joints(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (J, 3) float32 of the one person that is looked for: column, row, confidence."""

    @abstractmethod
    def settings(self) -> dict:
        """As of a `DepthDetector`."""


class SceneDetector(DepthDetector, PoseDetector):
    """The scene probe, both ways. It reads scenes alone: what it says about a photo means nothing."""

    absolute, layout = True, "scene14"

    def __init__(self):
        scene_probe.load_probe()
        self.described = f"scene probe {scene_probe.probe_hash()}, which knows rendered scenes and no photos"

    def nearness(self, image: np.ndarray) -> np.ndarray:
        return scene_probe.look(image)[0]

    def joints(self, image: np.ndarray) -> np.ndarray:
        return scene_probe.look(image)[1]

    def settings(self) -> dict:
        return {"detector": PROBE, "weights": scene_probe.probe_hash()}


class HubModel:
    """A model folder of transformers, here or on the hub.

    kinds: model types that will do, None for any; what: how messages call them. Raises UserError, in seconds, for a model
    that cannot be had.
    """

    def __init__(self, source: str, kinds: dict[str, Any] | None, what: str):
        self.source, self.key = source, f"task.detector={source!r}"
        name, _, revision = source.partition("@")
        folder = Path(source).expanduser()
        self.hub_id, self.revision = (None, "local") if folder.is_dir() else (name, revision or None)
        if self.hub_id is not None and (source.startswith((".", "/", "~")) or name.count("/") != 1):
            raise UserError(f"{self.key} is not {PROBE}, no folder and no hub id of the form owner/name")
        config = json.loads(self._file(folder, FILES[0]).read_text())
        self.folder = self._file(folder, FILES[1]).parent
        if self.hub_id is not None:
            self.revision = self.folder.name  # the hub cache names a snapshot's folder by its commit
        self.config, self.kind = config, config.get("model_type")
        self.described = f"{self.kind} model {source}"
        if kinds is not None and self.kind not in kinds:
            raise UserError(f"{self.key} is of the type {self.kind!r}, no {what} known here: {', '.join(kinds)}")
        if self.hub_id is None and not list(self.folder.glob("*.safetensors")):
            raise UserError(f"{self.key} holds no weights (*.safetensors): copy the whole model, or save it again")

    def _file(self, folder: Path, name: str) -> Path:
        if self.hub_id is None:
            if not (folder / name).is_file():
                raise UserError(f"{self.key} has no {name}: save model and image processor there with save_pretrained")
            return folder / name
        from huggingface_hub import hf_hub_download

        return self._fetched(lambda: hf_hub_download(self.hub_id, name, revision=self.revision, local_files_only=not answers()))

    def _fetched(self, fetch: Callable[[], str]) -> Path:
        """What the hub's own function gives; its exceptions become one line with the remedy."""
        try:
            return Path(fetch())
        except Exception as error:
            fault = hub_fault(error)
            if fault is None:
                raise
            said = {
                "gated": "is gated: accept its licence on its page, then run `hf auth login` or set HF_TOKEN",
                "missing": "is not on the hub, or is private: check the spelling, then `hf auth login` or HF_TOKEN",
                "layout": f"is no model of transformers: it has no {' and no '.join(FILES)}",
                "unreachable": f"is not cached here and the hub cannot be reached ({type(error).__name__}): download it on a "
                f"machine with a network (`hf download {self.hub_id}`) and name that folder; data=scenes works with "
                f"task.detector={PROBE}",
            }
            if fault == "revision":
                raise UserError(f"{self.key}: the hub has no such revision; leave out what follows the @") from error
            raise UserError(f"{self.key} {said[fault]}") from error

    def weights(self) -> Path:
        """A folder with the weights; downloads them from the hub where they are not cached."""
        if self.hub_id is None:
            return self.folder
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors"]
        return self._fetched(
            lambda: snapshot_download(
                self.hub_id, revision=self.revision, allow_patterns=wanted, local_files_only=not answers()
            )
        )

    def settings(self) -> dict:
        content = self.revision if self.hub_id else _content_hash(self.folder)
        return {"detector": self.hub_id or self.kind, "weights": content}


class DepthModel(HubModel, DepthDetector):
    """A depth estimator of transformers. Its output is made relative to each picture by `relative_nearness`.

    predicts: what its numbers mean; auto knows the model types of `PREDICTS`.
    """

    absolute = False

    def __init__(self, source: str, predicts: Meaning):
        super().__init__(source, PREDICTS if predicts == "auto" else None, "depth model")
        relative = self.config.get("depth_estimation_type", "relative") == "relative"
        known = PREDICTS.get(self.kind) or ("nearness" if relative else "distance")
        self.predicts = known if predicts == "auto" else predicts

    def nearness(self, image: np.ndarray) -> np.ndarray:
        import torch

        processor, model = _loaded(self, "AutoModelForDepthEstimation")
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        size = [image.shape[:2]]
        padded = {"source_sizes": size} if self.kind == "zoedepth" else {}
        sized = processor.post_process_depth_estimation(outputs, target_sizes=size, **padded)
        return relative_nearness(sized[0]["predicted_depth"].float().numpy(), self.predicts)

    def settings(self) -> dict:
        return {**HubModel.settings(self), "predicts": self.predicts}


class KeypointModel(HubModel, PoseDetector):
    """A top-down keypoint model of transformers (ViTPose, Xu et al., 2204.12484), whose box is the whole picture."""

    def __init__(self, source: str):
        super().__init__(source, KEYPOINTS, "keypoint model")
        self.layout = KEYPOINTS[self.kind]
        if importlib.util.find_spec("scipy") is None:
            raise UserError(f"{self.key}: image processing of {self.kind} needs a package: pip install scipy")

    def joints(self, image: np.ndarray) -> np.ndarray:
        import torch

        processor, model = _loaded(self, "VitPoseForPoseEstimation")
        boxes = [[[0.0, 0.0, float(image.shape[1]), float(image.shape[0])]]]
        experts = self.config.get("backbone_config", {}).get("num_experts", 1)
        chosen = {"dataset_index": torch.zeros(1, dtype=torch.long)} if experts > 1 else {}  # 0 is COCO
        with torch.no_grad():
            outputs = model(**processor(images=image, boxes=boxes, return_tensors="pt"), **chosen)
        person = processor.post_process_pose_estimation(outputs, boxes=boxes)[0][0]
        place, score = person["keypoints"].numpy(), person["scores"].numpy()
        if len(place) != len(LAYOUTS[self.layout].joints):
            raise UserError(f"{self.key} finds {len(place)} joints; only models of the layout {self.layout} are known here")
        return np.concatenate([place, score.reshape(-1, 1).clip(0, 1)], 1).astype(np.float32)


@cache
def _loaded(detector: HubModel, kind: str) -> tuple[Any, Any]:
    """-> image processor and model, read once per process."""
    import transformers

    folder = detector.weights()
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        options = {"local_files_only": True, "output_loading_info": True, "use_safetensors": True}
        model, loaded = getattr(transformers, kind).from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{detector.key} cannot be loaded: {str(error).splitlines()[0]}") from error
    if loaded["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{detector.key} lacks weights: {sorted(loaded['missing_keys'])[:3]}; copy the whole model")
    return processor, model.eval()


@cache
def _content_hash(folder: Path) -> str:
    """16 hex digits over configuration and weights of a folder."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def depth_detector(source: str, predicts: Meaning = "auto") -> DepthDetector:
    """The detector of a name. Raises UserError with the remedy."""
    if source != PROBE:
        return DepthModel(source, predicts)
    if predicts != "auto":
        raise UserError(f"task.predicts={predicts} is for depth models; with task.detector={PROBE} write task.predicts=auto")
    return SceneDetector()


def pose_detector(source: str) -> PoseDetector:
    """The detector of a name. Raises UserError with the remedy."""
    return SceneDetector() if source == PROBE else KeypointModel(source)
