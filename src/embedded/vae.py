"""The embedded autoencoder: an ordinary `AutoencoderKL` whose latent space is fixed before it is trained.

The latent is 16 principal components of each 8x8 RGB patch. The encoder regresses them, the decoder learns to undo
them with the help of the neighbourhood. Two things follow: a backbone can train on the exact components while the
autoencoder trains beside it, and the autoencoder can be improved later without touching any backbone.
Control maps take part in basis and training: an autoencoder that saw only pictures ruins encoded edges.
Legend: N pictures, P patches, C = 16 latent channels; pictures are uint8 or float in [-1, 1].
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

PATCH, CHANNELS = 8, 16
MAP_WEIGHT = 0.05  # share of the control maps' covariance in the basis; 0.2 would cost the pictures 2 dB
MAP_SHARE = 0.3  # share of control maps in each training batch
LOG_VARIANCE = -8.0  # the posterior's spread: 0.018, so that `latent_dist.sample()` and `.mode()` agree


@dataclass(frozen=True)
class PatchBasis:
    """Linear map between 8x8x3 patches and C components. basis (192, C), mean (192,), scale (C,)."""

    basis: Tensor
    mean: Tensor
    scale: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> (N, C, S/8, S/8) with unit mean variance."""
        patches = F.pixel_unshuffle(pictures, PATCH).movedim(1, -1)  # (N, S/8, S/8, 192)
        return (((patches - self.mean) @ self.basis) / self.scale).movedim(-1, 1).contiguous()


def fit_basis(images: np.ndarray, maps: np.ndarray) -> PatchBasis:
    """Principal components of patches of pictures (N, S, S, 3) uint8, with the maps' covariance mixed in.

    A component of standard deviation s is divided by sqrt(s): coarse structure keeps a larger share of the latent's
    variance than detail, but no longer drowns it.
    """

    def moments(pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        x = to_signed(torch.from_numpy(np.ascontiguousarray(pictures)))
        patches = F.pixel_unshuffle(x, PATCH).movedim(1, -1).reshape(-1, 3 * PATCH**2).double()
        mean = patches.mean(0)
        return mean, (patches - mean).T @ (patches - mean) / len(patches)

    mean, cov = moments(images)
    _, vectors = torch.linalg.eigh(cov + MAP_WEIGHT * moments(maps)[1])
    basis = vectors.flip(1)[:, :CHANNELS]
    std = (basis.T @ cov @ basis).diagonal().sqrt()
    scale = std.sqrt() * std.mean().sqrt()  # mean over channels of the scaled variance is 1
    return PatchBasis(basis.float(), mean.float(), scale.float())


def to_signed(pictures: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float in [-1, 1]."""
    return pictures.movedim(-1, 1).float() / 127.5 - 1


def build_vae(size: int) -> AutoencoderKL:
    """The 0.7 M parameter `AutoencoderKL`; scaling 1 and shift 0 serve pipelines with and without a shift."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        sample_size=size,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over pictures of the reconstruction's PSNR in dB (peak: the full range)."""
    x = to_signed(torch.from_numpy(np.ascontiguousarray(pictures)))
    with torch.no_grad():
        out = torch.cat([vae.decode(vae.encode(c).latent_dist.mode()).sample for c in x.split(64)])
    mse = ((out.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


def train_vae(
    images: np.ndarray,
    maps: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    basis: PatchBasis,
    steps: int,
    batch: int,
    seed: int,
    log: Callable[[dict], None],
    checkpoint: Path,
) -> AutoencoderKL:
    """Train for `steps` batches and return the autoencoder.

    images, maps: (N, S, S, 3) uint8; held_out: (pictures, maps) for the logged PSNR. log receives one row per 200 steps.
    checkpoint: a file that lets a killed run go on.
    """
    torch.manual_seed(seed)
    vae = build_vae(images.shape[1])
    opt = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps, pct_start=0.05)
    first, began = 0, time.process_time()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["vae"])
        opt.load_state_dict(saved["opt"])
        plan.load_state_dict(saved["plan"])
        first, began = saved["step"], began - saved["cpu_s"]
    n_maps = round(batch * MAP_SHARE)
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        rows = np.concatenate(
            [
                images[np.sort(rng.integers(len(images), size=batch - n_maps))],
                maps[np.sort(rng.integers(len(maps), size=n_maps))],
            ]
        )
        x = to_signed(torch.from_numpy(rows))
        target = basis.encode(x)
        posterior = vae.encode(x).latent_dist
        regression = F.mse_loss(posterior.mean, target) + 1e-3 * (posterior.logvar - LOG_VARIANCE).square().mean()
        # half of the batch decodes the exact components, as a backbone makes them; half the encoder's own
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step)) * 0.05
        exact = torch.arange(len(x)).remainder(2).view(-1, 1, 1, 1).bool()
        decoded = vae.decode(torch.where(exact, target, posterior.mean.detach()) + noise).sample
        loss = regression + (decoded - x).abs().mean() * 2 + (decoded - x).square().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        plan.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            spent = time.process_time() - began
            row = {"step": step + 1, "images_seen": (step + 1) * batch, "cpu_s": round(spent, 1)}
            log(row | _quality(vae, posterior.mean.detach(), target, held_out))
            state = {"vae": vae.state_dict(), "opt": opt.state_dict(), "plan": plan.state_dict()}
            save_atomically({**state, "step": step + 1, "cpu_s": spent}, checkpoint)
    return vae.eval()


def _quality(vae: AutoencoderKL, mean: Tensor, target: Tensor, held_out: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Error of the encoder on the present batch, and PSNR on held-out pictures and maps."""
    vae.eval()
    row = {
        "latent_rmse": round(float(F.mse_loss(mean, target).sqrt()), 4),
        "psnr_db": round(psnr(vae, held_out[0]), 2),
        "map_psnr_db": round(psnr(vae, held_out[1]), 2),
    }
    vae.train()
    return row


def save_atomically(state: dict, file: Path) -> None:
    """torch.save beside the target, then rename: a killed run leaves the old file whole."""
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)
