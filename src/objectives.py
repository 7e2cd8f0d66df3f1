"""What the network predicts and at which noise levels it learns: the only place that knows.

Legend: B batch, C latent channels, H W latent size. t is float in [0, 1]: 0 is the clean latent, 1 is pure noise.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from src.types import UserError
from src.vocabulary import TIME_LAWS

FLOW_WEIGHT_CAP = 25.0  # an all but pure noise says nothing of x0, however much an error there would weigh


def _column(t_B: Tensor, like: Tensor) -> Tensor:
    return t_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Objective(ABC):
    """Training target and noise law of a family of diffusion models."""

    time_law: str = "native"

    def with_time_law(self, time_law: str) -> "Objective":
        """The same objective, trained on other noise levels: "native", the family's own, or "cubic", t = 1 - u^3, which
        favours high noise (T2I-Adapter, Mou et al. 2023, 2302.08453, section 3.4). Raises ValueError for another word."""
        if time_law not in TIME_LAWS:
            raise ValueError(f"time_law={time_law!r} is not one of {TIME_LAWS}")
        other = copy.copy(self)
        other.time_law = time_law
        return other

    def sample_t(self, uniform_B: Tensor) -> Tensor:
        """(B,) uniform numbers in [0, 1) -> (B,) noise levels t: the inverse distribution function of training's t."""
        return self.native_t(uniform_B) if self.time_law == "native" else self.on_grid(1 - uniform_B.double() ** 3)

    @abstractmethod
    def native_t(self, uniform_B: Tensor) -> Tensor:
        """`sample_t` by the family's own law."""

    @abstractmethod
    def on_grid(self, t_B: Tensor) -> Tensor:
        """Numbers in (0, 1] -> levels that the family can be trained on, float32."""

    @abstractmethod
    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """-> (x_t, target), both (B, C, H, W): the noisy latent and what the network should say about it."""

    @abstractmethod
    def to_model_time(self, t_B: Tensor) -> Tensor:
        """t in [0, 1] -> the number that the backbone's time embedding was trained on."""

    @abstractmethod
    def from_model_time(self, timestep: float) -> float:
        """The inverse of `to_model_time`, for the timesteps of a diffusers scheduler."""

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

    def native_t(self, uniform_B: Tensor) -> Tensor:
        # float64 and a floor: u = 0 would give -inf and so t = 0, where the target cannot be learned
        z = torch.special.ndtri(uniform_B.double().clamp(1e-6, 1 - 1e-6))
        return torch.sigmoid(self.logit_mean + self.logit_std * z).float()

    def on_grid(self, t_B: Tensor) -> Tensor:
        return t_B.clamp(min=1e-6).float()  # at t = 0 the target cannot be learned

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t = _column(t_B, x0_BCHW)
        return (1 - t) * x0_BCHW + t * noise_BCHW, noise_BCHW - x0_BCHW

    def to_model_time(self, t_B: Tensor) -> Tensor:
        return t_B * self.time_scale

    def from_model_time(self, timestep: float) -> float:
        return timestep / self.time_scale

    def weight(self, t_B: Tensor) -> Tensor:
        return torch.ones_like(t_B)

    def to_x0(self, x_t_BCHW: Tensor, prediction_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return x_t_BCHW - _column(t_B, x_t_BCHW) * prediction_BCHW


class Diffusion(Objective):
    """Variance-preserving diffusion in discrete steps (Ho et al. 2020, 2006.11239): x_t = a x0 + s noise, a^2 + s^2 = 1.

    schedule: "scaled_linear" (Stable Diffusion: linear in the square root of beta) or "linear" (DiT, PixArt-alpha);
    beta_start, beta_end: its ends; train_steps: their number. Step k of 0..train_steps - 1 is t = (k + 1) / train_steps;
    a t in between takes the nearest step. min_snr_gamma: clip the signal-to-noise ratio that weighs the loss (Hang et al.
    2023, 2303.09556); None: every step weighs the same, as in the original trainings.
    native_law: "uniform", every step as often, as in the original trainings; or "flow", the levels and weights of SD3's
    flow: s / a is that of a logit-normal time, and an error weighs as much as the velocity's that it amounts to. Of a
    uniform draw on the linear schedule half are all but pure noise, where a small training learns nothing.
    """

    def __init__(
        self,
        schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        train_steps: int = 1000,
        min_snr_gamma: float | None = None,
        native_law: Literal["uniform", "flow"] = "uniform",
    ):
        ends = {
            "linear": lambda: torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float64),
            "scaled_linear": lambda: torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=torch.float64) ** 2,
        }
        if native_law == "flow" and min_snr_gamma is not None:
            raise ValueError("native_law='flow' has weights of its own: leave min_snr_gamma=None")
        self.train_steps, self.min_snr_gamma, self.native_law = train_steps, min_snr_gamma, native_law
        self.signal_T = (1 - ends[schedule]()).cumprod(0)  # a^2 of each step

    def steps(self, t_B: Tensor) -> Tensor:
        """t in [0, 1] -> step numbers (B,) int64 in 0..train_steps - 1."""
        return (t_B.double() * self.train_steps).round().long().sub(1).clamp(0, self.train_steps - 1)

    def _signal(self, device: torch.device) -> Tensor:
        """a^2 of each step where it is used. It stays there: a copy at every use would make the step wait for the device."""
        if device.type == "meta":
            return self.signal_T.to(device)
        if self.signal_T.device != device:
            self.signal_T = self.signal_T.to(device)
        return self.signal_T

    def scales(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of each sample, shaped and typed to multiply `like`."""
        signal = self._signal(t_B.device)[self.steps(t_B)]
        return _column(signal.sqrt(), like), _column((1 - signal).sqrt(), like)

    def native_t(self, uniform_B: Tensor) -> Tensor:
        if self.native_law == "uniform":
            return self.on_grid(uniform_B)
        ratio = torch.special.ndtri(uniform_B.double().clamp(1e-6, 1 - 1e-6)).exp()  # s / a = time / (1 - time)
        signal_T = self._signal(ratio.device)
        step = torch.searchsorted(-signal_T, -1 / (1 + ratio.square())).clamp(max=self.train_steps - 1)
        return ((step + 1) / self.train_steps).float()

    def on_grid(self, t_B: Tensor) -> Tensor:
        step = (t_B.double() * self.train_steps).floor().clamp(max=self.train_steps - 1)
        return ((step + 1) / self.train_steps).float()

    def to_model_time(self, t_B: Tensor) -> Tensor:
        return self.steps(t_B)

    def from_model_time(self, timestep: float) -> float:
        return (timestep + 1) / self.train_steps

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio a^2 / s^2, (B,) float64."""
        signal = self._signal(t_B.device)[self.steps(t_B)]
        return signal / (1 - signal)


class EpsilonPrediction(Diffusion):
    """The network predicts the noise."""

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.scales(t_B, x0_BCHW)
        return a * x0_BCHW + s * noise_BCHW, noise_BCHW

    def weight(self, t_B: Tensor) -> Tensor:
        snr = self.snr(t_B)
        if self.native_law == "flow":  # velocity = noise - x0, and x0 is off by s / a times the noise's error
            return (1 + snr.rsqrt()).square().clamp(max=FLOW_WEIGHT_CAP)
        if self.min_snr_gamma is None:
            return torch.ones_like(t_B)
        return snr.clamp(max=self.min_snr_gamma) / snr

    def to_x0(self, x_t_BCHW: Tensor, prediction_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, s = self.scales(t_B, x_t_BCHW)
        return (x_t_BCHW - s * prediction_BCHW) / a


class VPrediction(Diffusion):
    """The network predicts v = a noise - s x0 (Salimans and Ho 2022, 2202.00512, appendix D)."""

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.scales(t_B, x0_BCHW)
        return a * x0_BCHW + s * noise_BCHW, a * noise_BCHW - s * x0_BCHW

    def weight(self, t_B: Tensor) -> Tensor:
        snr = self.snr(t_B)
        if self.native_law == "flow":  # an error of v is one of a v in the noise and of s v in x0: (a + s)^2
            return ((snr.sqrt() + 1) / (snr + 1).sqrt()).square()
        if self.min_snr_gamma is None:
            return torch.ones_like(t_B)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1)

    def to_x0(self, x_t_BCHW: Tensor, prediction_BCHW: Tensor, t_B: Tensor) -> Tensor:
        a, s = self.scales(t_B, x_t_BCHW)
        return a * x_t_BCHW - s * prediction_BCHW


def diffusion_of(scheduler: dict[str, Any], native_law: Literal["uniform", "flow"] = "uniform") -> Diffusion:
    """The objective that a diffusers scheduler configuration describes. Raises UserError for one that is not known here.

    native_law: see `Diffusion`; no scheduler says how its model was trained.
    """
    given = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000} | scheduler
    known = {"epsilon": EpsilonPrediction, "v_prediction": VPrediction}
    kind, schedule, betas = given.get("prediction_type", "epsilon"), given["beta_schedule"], given.get("trained_betas")
    zero_snr = bool(given.get("rescale_betas_zero_snr"))
    if kind not in known or schedule not in ("linear", "scaled_linear") or betas is not None or zero_snr:
        raise UserError(
            f"scheduler with prediction_type={kind!r}, beta_schedule={schedule!r}, trained_betas={betas is not None}, "
            f"rescale_betas_zero_snr={zero_snr}: known are {sorted(known)} on linear and scaled_linear schedules; "
            "use a model with such a scheduler"
        )
    betas = given["beta_start"], given["beta_end"]
    return known[kind](schedule, *betas, given["num_train_timesteps"], native_law=native_law)
