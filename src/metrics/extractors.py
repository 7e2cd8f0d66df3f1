"""What turns pictures into the features that FID and KID compare. Its weights' hash belongs to every such number.

A number may be called `fid` only with Inception's original weights and clean-fid's resizing (Parmar et al. 2022, 2104.11222);
every other extractor has a suffix, as `fid_scenes`. The one for scenes is in `src/embedded/scene_features.py`.
Legend: B batch, F features; pictures (H, W, 3) uint8.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from src.types import UserError

SIDE = 299  # pixels, Inception's input
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLEANFID_FOLDER = Path("/tmp")  # where clean-fid itself keeps the file
SETTING = "metrics.inception_weights"  # how messages call the path
REACH_S = 1.0  # how long a server may take to answer at all
BATCH = 64
Pictures = list[np.ndarray]  # (H, W, 3) uint8 each


class FeatureExtractor(ABC):
    """name: for records; suffix: of the metrics' names, "" for Inception alone; hash: of the weights; described: one line."""

    name: str
    suffix: str
    hash: str
    described: str

    @abstractmethod
    def read(self, pictures: Pictures) -> np.ndarray:
        """B pictures -> (B, F) float. What a picture gives depends on no other, up to rounding."""

    def settings(self) -> dict[str, Any]:
        """Everything that changes a feature: numbers with other settings do not compare."""
        return {"extractor": self.name, "hash": self.hash}


def extract(
    extractor: FeatureExtractor, pictures: Iterable[np.ndarray], batch: int = BATCH, seen: Callable[[int], None] | None = None
) -> np.ndarray:
    """All features in the order of the pictures, (N, F) float32; `seen` receives the count after each batch.

    Raises ValueError for no picture, or one that is no (H, W, 3) uint8.
    """
    found, count, stream = [], 0, iter(pictures)
    while some := list(islice(stream, batch)):
        for picture in some:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(f"pictures (H, W, 3) uint8 are wanted, got {picture.shape} {picture.dtype}")
        found.append(np.asarray(extractor.read(some), np.float32))
        count += len(some)
        if seen is not None:
            seen(count)
    if not found:
        raise ValueError("features of no picture are wanted")
    return np.concatenate(found)


def read_pictures(files: Iterable[str | Path]) -> Iterator[np.ndarray]:
    """Image files as RGB, one after another. Raises UserError, naming the file, for one that cannot be read."""
    from PIL import Image

    for file in files:
        try:
            with Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"{file} cannot be read as a picture ({error}); draw it again, or take it out") from error


class TorchScript(FeatureExtractor):
    """A TorchScript file that maps (B, 3, 299, 299) float32 in [0, 255] to (B, F), after clean-fid's own resizing.

    Its metrics are named after it, as `fid_<name>`. Runs in float32 without TF32, whose ten bits of mantissa would show in
    the third digit. Raises UserError, before anything is loaded, where the file or clean-fid is missing.
    """

    def __init__(self, file: str | Path, name: str, device: str = "cpu"):
        self.file, self.name, self.suffix, self.device = Path(file).expanduser(), name, f"_{name}", device
        need_cleanfid(name)
        if not self.file.is_file():
            raise UserError(f"the extractor {name}: {str(file)!r} is not a file; give a TorchScript file")
        self.hash = sha256(self.file)
        self.described = f"{name} from {self.file.name}, sha256 {self.hash[:8]}, with clean-fid's resizing to {SIDE} px"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "resize": f"clean-fid clean: Pillow bicubic per channel in float32, {SIDE} px"}

    def read(self, pictures: Pictures) -> np.ndarray:
        import torch

        sized = np.stack([self._resize(picture) for picture in pictures])
        x_B3HW = torch.from_numpy(sized).movedim(-1, 1).contiguous().to(self.device)
        with torch.no_grad(), full_precision(self.device):
            return self.forward(x_B3HW).flatten(1).float().cpu().numpy()

    def forward(self, x_B3HW: Any) -> Any:
        """-> (B, F), or (B, F, 1, 1)."""
        return self.net(x_B3HW)

    @cached_property
    def net(self) -> Any:
        """The module, read at its first use. Raises UserError for a file that is no TorchScript."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the weights exist in this format alone
            try:
                return torch.jit.load(str(self.file), map_location=self.device).eval()
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{self.file.name} is no TorchScript file ({str(error).splitlines()[0]})") from error

    @cached_property
    def _resize(self) -> Callable[[np.ndarray], np.ndarray]:
        from cleanfid.resize import build_resizer

        return build_resizer("clean")


class Inception(TorchScript):
    """The extractor of `fid` and `kid`: Inception of 2015-12-05 as NVIDIA translated it, F = 2048.

    weights: the file; None looks where torch keeps downloads and where clean-fid puts it, and else downloads it to the
    former, with `said` told. A file with another hash is refused: under that name it would be another metric.
    Raises UserError in about a second where it can be had in no way.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu", said: Callable[[str], None] = lambda line: None):
        need_cleanfid("inception")
        super().__init__(inception_file(weights, said), "inception", device)
        self.suffix = ""
        if self.hash != INCEPTION_SHA256:
            raise UserError(
                f"{SETTING}: {str(self.file)!r} is not {INCEPTION_FILE}: its sha256 begins with {self.hash[:8]}, not "
                f"{INCEPTION_SHA256[:8]}; delete it to have it fetched again, or give the right file"
            )

    def forward(self, x_B3HW: Any) -> Any:
        # the part behind the network's own resizing and normalization, which clean-fid leaves out
        return self.net.layers((x_B3HW - 128) / 128)


def find_inception(weights: str | None) -> Path | None:
    """Where the weights are; None where they have to be downloaded, and can be. Raises UserError, in about a second, if not."""
    if weights is not None:
        file = Path(weights).expanduser()
        if not file.is_file():
            raise UserError(f"{SETTING}={weights!r} is not a file; give {INCEPTION_FILE}, or null to look for it")
        return file
    home = _torch_downloads() / INCEPTION_FILE
    for place in (home, CLEANFID_FOLDER / INCEPTION_FILE):
        if place.is_file():
            return place
    if not _answers(_inception_url()):
        raise UserError(
            f"fid wants {INCEPTION_FILE}, which is not in {home.parent}, and its server does not answer: fetch it on a "
            f"machine with a network and name it in {SETTING}=<file>; for scenes take the extractor `scenes`"
        )
    return None


def _inception_url() -> str:
    from cleanfid import downloads_helper  # imports neither torch nor numpy

    return downloads_helper.inception_url


def inception_file(weights: str | None, said: Callable[[str], None]) -> Path:
    """Where the weights are; downloads them where they are not and the server answers. Raises UserError if all fails."""
    if (found := find_inception(weights)) is not None:
        return found
    home, url = _torch_downloads() / INCEPTION_FILE, _inception_url()
    said(f"downloading {INCEPTION_FILE} (96 MB) to {home.parent}")
    home.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=home.parent, prefix=f".{home.name}.")
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as stream:
            shutil.copyfileobj(stream, out)
        os.replace(part, home)
    except OSError as error:
        raise UserError(f"the download of {INCEPTION_FILE} failed ({error}); try again, or give {SETTING}=<file>") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return home


def need_cleanfid(name: str) -> None:
    """Raises UserError where the package is missing whose resizing defines the metric."""
    if importlib.util.find_spec("cleanfid") is None:
        raise UserError(
            f"the extractor {name} resizes with clean-fid, which is not installed: pip install 'controlbench[fid]'; "
            "for scenes take the extractor `scenes`"
        )


def sha256(file: Path) -> str:
    """64 hex digits over a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def full_precision(device: str) -> AbstractContextManager:
    """Convolutions on a GPU without TF32; nothing elsewhere."""
    if not str(device).startswith("cuda"):
        return nullcontext()
    import torch

    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=True, allow_tf32=False)


def _torch_downloads() -> Path:
    """What `torch.hub` answers, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub" / "checkpoints"


def _answers(url: str) -> bool:
    """Whether a server answers within `REACH_S`; looking up its name has no time limit of its own, so it has a thread."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_S):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()  # it does not like the question, but it is there
        except (OSError, ValueError):
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_S + 0.5)
    return answered.is_set()
