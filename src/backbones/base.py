"""The backbone interface: a frozen diffusion network unrolled into K steps that adapters can walk through.

Legend in `src.types`. A backbone knows no adapter. Adapters never rewrite a diffusers forward: they call `begin`,
`run` once per step, and `end`, and may put their own tensors between; doing nothing in between gives exactly the
network's own forward.
"""

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from src.backbones.codec import Codec, module_hash
from src.objectives import Objective
from src.types import BackboneFacts, StreamState, TextCond, UserError


class Backbone(nn.Module, ABC):
    """A frozen network (`net`, absent until `load`), with what is known about it before any weight is read.

    The three heavy parts have lives of their own: the text encoders end when the caption cache is written, the codec
    stays for pictures, the network stays for training.
    """

    facts: BackboneFacts
    objective: Objective
    net: nn.Module | None

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> "Backbone":
        """Read the network's weights, freeze them, and return self."""

    @abstractmethod
    def load_codec(self, device: torch.device) -> Codec:
        """Read the autoencoder; always float32, since half precision overflows some of them."""

    @abstractmethod
    def encode_text(self, captions: list[str], device: torch.device) -> TextCond:
        """Captions -> (B, L, D) and (B, P) float32 on the CPU. Loads the text encoders on first use; see `drop_text`."""

    @abstractmethod
    def text_key(self) -> str:
        """A string that changes when the text encoders' weights do, without loading them: part of the caption cache's key."""

    @abstractmethod
    def drop_text(self) -> None:
        """Free the text encoders."""

    @abstractmethod
    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> StreamState:
        """Noisy latents, noise level in [0, 1] and captions -> the state before step 0."""

    @abstractmethod
    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        """One step, by its index or as a module from `copy_steps`. Returns a new state, never changes the old one."""

    @abstractmethod
    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        """The state after the last step -> (B, C, H, W), through the frozen head or a copy from `copy_head`."""

    @abstractmethod
    def steps(self) -> nn.ModuleList:
        """The K modules that `run` takes one at a time."""

    @abstractmethod
    def _head(self) -> nn.Module:
        """The modules between the last step and the prediction."""

    @abstractmethod
    def _embed(self) -> nn.Module:
        """The convolution that turns latents (B, C, H, W) into the first features, without positions."""

    def _dead_parts(self, step: nn.Module) -> list[nn.Module]:
        """Modules of a step whose parameters cannot reach the output: frozen in copies, or distributed training would wait
        for their gradients."""
        return []

    def predict(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        """The frozen network's own prediction, step by step."""
        state = self.begin(x_BCHW, t_B, text)
        for k in range(self.facts.depth):
            state = self.run(k, state)
        return self.end(state)

    def copy_steps(self, indices: list[int]) -> nn.ModuleList:
        """Trainable float32 deep copies of steps. Modules are copied, never rebuilt from a configuration: `from_config`
        would write into the backbone's own and get the last block wrong."""
        copies = _trainable(nn.ModuleList(self.steps()[i] for i in indices))
        for copied in copies:
            for dead in self._dead_parts(copied):
                dead.requires_grad_(False)
        return copies

    def copy_head(self) -> nn.Module:
        """A trainable float32 copy of the head, for `end(state, head)`."""
        return _trainable(self._head())

    def copy_embed(self) -> nn.Module:
        """A trainable float32 copy of the latent embedding."""
        return _trainable(self._embed())

    def freeze(self) -> "Backbone":
        """No gradient, no dropout, whatever happens to the modules around it. Returns self."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: a trainer that calls `train()` on everything must not wake the backbone."""
        return super().train(False)

    def check_resolution(self, resolution: int) -> None:
        """Refuse a resolution that does not divide into latents and patches, naming the nearest legal ones."""
        m = self.facts.multiple
        if resolution % m or resolution < m:
            low = max(m, resolution // m * m)
            raise UserError(f"resolution={resolution} is not a multiple of {m} (autoencoder x patch): use {low} or {low + m}")

    def weight_hash(self) -> str:
        """16 hex digits over every parameter and buffer of the network: equal before and after training."""
        return module_hash(self.net)


def _trainable(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().requires_grad_(True).train()
