"""Pictures to latents and back, the same way for targets, latent conditions, validation and sampling."""

import hashlib

import torch
from torch import Tensor, nn

from src.types import UserError


class Codec(nn.Module):
    """A frozen `AutoencoderKL`. Latents are (z - shift) * scale, the law of diffusers' SD3 pipeline.

    The mode of the posterior is taken, never a sample: a cached latent and a fresh one are then equal.
    """

    def __init__(self, vae: nn.Module, encode_batch: int = 32):
        super().__init__()
        self.vae = vae.float().requires_grad_(False).eval()
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.encode_batch = encode_batch

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def encode(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H/8, W/8) float32. Raises UserError on a non-finite latent."""
        if x_B3HW.min() < 0 or x_B3HW.max() > 1:
            raise ValueError(f"Codec.encode wants [0, 1], got [{float(x_B3HW.min()):.3f}, {float(x_B3HW.max()):.3f}]")
        signed = (x_B3HW.to(self.device, torch.float32) * 2 - 1).split(self.encode_batch)
        z = torch.cat([self.vae.encode(part).latent_dist.mode() for part in signed])
        return _finite((z - self.shift) * self.scale, "encoding")

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) latents -> (B, 3, 8H, 8W) float32 in [0, 1]. Raises UserError on a non-finite picture."""
        z = z_BCHW.to(self.device, torch.float32) / self.scale + self.shift
        x = torch.cat([self.vae.decode(part).sample for part in z.split(self.encode_batch)])
        return _finite(x, "decoding").add(1).div(2).clamp(0, 1)

    def weight_hash(self) -> str:
        """16 hex digits over the autoencoder's weights: part of every latent cache's key."""
        return module_hash(self.vae)


def module_hash(module: nn.Module) -> str:
    """16 hex digits over names, types, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, given in sorted(module.state_dict().items()):
        tensor = given.full_tensor() if hasattr(given, "full_tensor") else given  # of one that is cut over devices
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _finite(x: Tensor, doing: str) -> Tensor:
    if not torch.isfinite(x).all():
        raise UserError(
            f"the autoencoder gave NaN or Inf while {doing}: a black picture would hide it; check the input latents"
        )
    return x
