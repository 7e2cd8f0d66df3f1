"""What the network predicts and at which noise levels it learns: the only place that knows.

Legend: B batch, C latent channels, H W latent size. t is float in [0, 1]: 0 is the clean latent, 1 is pure noise.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def _column(t_B: Tensor, like: Tensor) -> Tensor:
    return t_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Objective(ABC):
    """Training target and noise law of a family of diffusion models."""

    @abstractmethod
    def sample_t(self, uniform_B: Tensor) -> Tensor:
        """(B,) uniform numbers in [0, 1) -> (B,) noise levels t: the inverse distribution function of training's t."""

    @abstractmethod
    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """-> (x_t, target), both (B, C, H, W): the noisy latent and what the network should say about it."""

    @abstractmethod
    def to_model_time(self, t_B: Tensor) -> Tensor:
        """t in [0, 1] -> the number that the backbone's time embedding was trained on."""

    @abstractmethod
    def weight(self, t_B: Tensor) -> Tensor:
        """(B,) factor of each sample's loss."""

    @abstractmethod
    def to_x0(self, x_t_BCHW: Tensor, prediction_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that a prediction implies."""

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """(B,) weighted mean squared error per sample, in float32."""
        error = (prediction_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)
        return error * self.weight(t_B).to(error.dtype)


class FlowMatching(Objective):
    """Rectified flow: x_t = (1 - t) x0 + t noise, target noise - x0 (Esser et al. 2024, 2403.03206, eq. 13).

    logit_mean, logit_std: t is sigmoid of a normal with these moments (the same paper, section 3.1; SD3 uses 0 and 1).
    time_scale: the backbone sees t * time_scale (SD3: 1000).
    """

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0, time_scale: float = 1000.0):
        self.logit_mean, self.logit_std, self.time_scale = logit_mean, logit_std, time_scale

    def sample_t(self, uniform_B: Tensor) -> Tensor:
        # float64 and a floor: u = 0 would give -inf and so t = 0, where the target cannot be learned
        z = torch.special.ndtri(uniform_B.double().clamp(1e-6, 1 - 1e-6))
        return torch.sigmoid(self.logit_mean + self.logit_std * z).float()

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t = _column(t_B, x0_BCHW)
        return (1 - t) * x0_BCHW + t * noise_BCHW, noise_BCHW - x0_BCHW

    def to_model_time(self, t_B: Tensor) -> Tensor:
        return t_B * self.time_scale

    def weight(self, t_B: Tensor) -> Tensor:
        return torch.ones_like(t_B)

    def to_x0(self, x_t_BCHW: Tensor, prediction_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return x_t_BCHW - _column(t_B, x_t_BCHW) * prediction_BCHW
