"""Full-reference picture metrics: PSNR, SSIM, and LPIPS where its weights are named. Pictures are uint8, data range 255."""

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from src.types import UserError

PSNR_CAP_DB = 100.0
SSIM_WINDOW_PX = 11
LPIPS_LEAST_PX = 32  # AlexNet's last layers see nothing of smaller ones
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's ImageNet weights, of which LPIPS reads the convolutions


def psnr(output: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape, over all values of all channels.

    10 log10(255^2 / MSE), at most `PSNR_CAP_DB`: equal pictures would be infinite, and no mean over images survives that.
    """
    _same(output, image)
    mse = np.mean((output.astype(np.float64) - image.astype(np.float64)) ** 2)
    return PSNR_CAP_DB if mse == 0 else float(min(PSNR_CAP_DB, 10 * np.log10(255.0**2 / mse)))


def ssim(output: np.ndarray, image: np.ndarray) -> float:
    """Mean structural similarity of two uint8 pictures, (H, W) or (H, W, C); channels are compared one by one and averaged.

    Wang et al. 2004, Eq. 13, with its constants: an 11-pixel Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, only
    windows that lie inside the picture. RGB and not luma, so that a wrong colour of the right brightness counts. Raises
    UserError for pictures smaller than the window.
    """
    _same(output, image)
    _large_enough("ssim", SSIM_WINDOW_PX, output)
    a, b = output.astype(np.float64), image.astype(np.float64)
    edge = SSIM_WINDOW_PX // 2

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (SSIM_WINDOW_PX, SSIM_WINDOW_PX), 1.5)[edge:-edge, edge:-edge]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(found.mean())


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018, 1801.03924), AlexNet, version 0.1; 0 for equal pictures.

    The network and its five linear heads are torchmetrics'; the heads come with that package, AlexNet's convolutions do
    not and are read from `weights`: torchvision's state dictionary, as .pth or .safetensors. Nothing is downloaded.
    Runs on the CPU in float32. Raises UserError, before anything is trained, for a file that is missing or another
    network's, and where torchvision is not installed.
    """

    def __init__(self, weights: str):
        self.file = Path(weights).expanduser()
        if not self.file.is_file():
            raise UserError(f"task.lpips_weights={weights!r} is not a file; give torchvision's {ALEXNET_FILE}, or null")
        try:
            import torch
            import torchvision  # noqa: F401
            from torchmetrics.functional.image.lpips import _LPIPS
        except ImportError as error:
            raise UserError(f"task.lpips_weights wants torchvision ({error}): pip install torchvision, or null") from error
        with torch.random.fork_rng(devices=[]):  # a fresh AlexNet draws numbers, and a run's must not depend on that
            self.net = _LPIPS(net="alex", pnet_rand=True)  # AlexNet without weights, the heads with theirs
        self.net.net.load_state_dict(self._convolutions())

    @property
    def described(self) -> str:
        """Network and hash of the file, for the record of a run."""
        return f"AlexNet from {self.file.name}, sha256 {hashlib.sha256(self.file.read_bytes()).hexdigest()[:8]}"

    def __call__(self, output: np.ndarray, image: np.ndarray) -> float:
        """Distance of two (H, W, 3) uint8 pictures. Raises UserError for fewer than `LPIPS_LEAST_PX` on a side."""
        import torch

        _same(output, image)
        _large_enough("lpips", LPIPS_LEAST_PX, output)
        pair = torch.from_numpy(np.stack([output, image])).movedim(-1, 1).float() / 255
        with torch.no_grad():
            return float(self.net(pair[:1], pair[1:], normalize=True))

    def _convolutions(self) -> dict[str, Any]:
        """The file's convolutions under the names of torchmetrics, which keep torchvision's layer numbers."""
        wanted = self.net.net.state_dict()
        stored = _read_state(self.file)
        names = {name: f"features.{name.split('.', 1)[1]}" for name in wanted}
        for name, source in names.items():
            found = stored.get(source)
            if found is None or found.shape != wanted[name].shape:
                has = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise UserError(
                    f"task.lpips_weights={str(self.file)!r} is not torchvision's AlexNet: {source} should have shape "
                    f"{tuple(wanted[name].shape)}, it has {has}; give {ALEXNET_FILE}, or null"
                )
        return {name: stored[source] for name, source in names.items()}


def _read_state(file: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    try:
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise types of their own for a broken file
        raise UserError(f"task.lpips_weights={str(file)!r} cannot be read ({type(error).__name__}); fetch it again") from error
    return {k: v for k, v in stored.items() if hasattr(v, "shape")} if isinstance(stored, dict) else {}


def _same(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"two uint8 pictures of one shape are compared, got {a.shape} {a.dtype} and {b.shape} {b.dtype}")


def _large_enough(metric: str, least_px: int, picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    if min(height, width) < least_px:
        fix = f"write resolution={least_px} or more, or leave the metric out"
        raise UserError(f"{metric} wants pictures of at least {least_px} pixels on a side, these are {width} x {height}; {fix}")
