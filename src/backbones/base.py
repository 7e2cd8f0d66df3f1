"""The backbone interface: a frozen diffusion network unrolled into K steps that adapters can walk through.

Legend in `src.types`. A backbone knows no adapter. Adapters never rewrite a diffusers forward: they call `begin`,
`run` once per step, and `end`, and may put their own tensors between; doing nothing in between gives exactly the
network's own forward.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.backbones.codec import Codec, module_hash
from src.backbones.quantize import Quantize, quantize_linears
from src.backbones.source import ModelSource
from src.hub import from_safetensors
from src.objectives import Objective
from src.types import BackboneFacts, StreamState, TextCond, UserError
from src.vocabulary import resolution_fault


class Backbone(nn.Module, ABC):
    """A frozen network (`net`, absent until `load`), with what is known about it before any weight is read.

    name: short name for run folders; source, revision, licence_url: see `ModelSource`;
    native_resolution: side in pixels that it was trained at; resolution: side in pixels of this run (None: native);
    quantize: precision of the steps' linear layers, see `src.backbones.quantize` (None: that of the rest). Copies are taken
    from the weights as they were before, which stay in the CPU's memory.

    The three heavy parts have lives of their own: the text encoders end when the caption cache is written, the codec
    stays for pictures, the network stays for training.
    """

    NET: ClassVar[str]  # the network's folder in the diffusers layout
    TEXT_PARTS: ClassVar[tuple[str, ...]]

    facts: BackboneFacts
    objective: Objective
    net: nn.Module | None

    def __init__(
        self,
        name: str,
        source: str,
        native_resolution: int,
        revision: str | None = None,
        licence_url: str | None = None,
        resolution: int | None = None,
        quantize: Quantize | None = None,
    ):
        super().__init__()
        self.name, self.native_resolution = name, native_resolution
        self.model = ModelSource(source, revision, licence_url)
        self.model.check((self.NET, "vae", "scheduler", *(p for p in self.TEXT_PARTS if p in ("text_encoder", "tokenizer"))))
        self.facts = self._read_facts()
        self.check_resolution(resolution or native_resolution)
        self.objective = self._make_objective()
        self.net, self._text = None, None
        self.quantize, self._unrounded = quantize, ()
        self.graphs = False  # whether the frozen steps are replayed as CUDA graphs

    @abstractmethod
    def _read_facts(self) -> BackboneFacts:
        """From the configuration files, without a weight."""

    @abstractmethod
    def _make_objective(self) -> Objective:
        """What the network predicts, from its scheduler's configuration."""

    @abstractmethod
    def _load_text(self, folder: Path, device: torch.device) -> Callable[[list[str]], TextCond]:
        """The text encoders of a model folder as a function of captions."""

    def load(self, device: torch.device, dtype: torch.dtype) -> "Backbone":
        """Read the network's weights, freeze them, and return self. A `random:` source gets random ones."""
        if self.model.random:
            with torch.device(device):
                torch.manual_seed(0)
                net = self.net_class().from_config(self.model.config(self.NET))
            return self.attach(nn.Module.to(net, dtype))  # as in `hollow`
        folder = self.model.fetch((self.NET,))
        net = from_safetensors(self.net_class(), folder, subfolder=self.NET, dtype=dtype)
        return self.attach(net).to(device)

    def net_class(self) -> type[nn.Module]:
        """The diffusers class that the network's configuration names."""
        import diffusers

        return getattr(diffusers, self.model.config(self.NET)["_class_name"])

    def hollow(self, dtype: torch.dtype) -> "Backbone":
        """A twin with a frozen network on `meta`, built from the configuration; the original keeps its own."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)  # a shallow copy shares this table, and attaching would write into it
        with torch.device("meta"):
            net = self.net_class().from_config(self.model.config(self.NET))
        return twin.attach(nn.Module.to(net, dtype))  # diffusers' own `to` warns about casts that `from_pretrained` does too

    def attach(self, net: nn.Module) -> "Backbone":
        """Use a network that is already in memory; returns self, frozen, and quantized if it is to be."""
        if self.quantize is None:
            self._adopt(net)
            self._unrounded = ()
            return self.freeze()
        self._adopt(copy.deepcopy(net))
        quantize_linears(self.steps(), self.quantize)
        twin = copy.copy(self)
        twin._modules, twin.quantize = dict(self._modules), None
        on_meta = next(net.parameters()).is_meta
        self._unrounded = (twin.attach(net if on_meta else nn.Module.to(net, "cpu")),)  # a tuple hides it from the module tree
        return self.freeze()

    def _adopt(self, net: nn.Module) -> None:
        self.net = net

    def load_codec(self, device: torch.device) -> Codec:
        """Read the autoencoder; always float32, since half precision overflows some of them."""
        from diffusers import AutoencoderKL

        folder = self.model.fetch(("vae",))
        vae = from_safetensors(AutoencoderKL, folder, subfolder="vae", dtype=torch.float32)
        return Codec(vae).to(device)

    def scheduler(self) -> Any:
        """The model's own diffusers scheduler, of the class that its model_index.json names."""
        import diffusers

        kind = getattr(diffusers, self.model.config("")["scheduler"][1])
        return kind.from_pretrained(self.model.fetch(("scheduler",)), subfolder="scheduler")

    def encode_text(self, captions: list[str], device: torch.device) -> TextCond:
        """Captions -> `TextCond`, float32 on the CPU. Loads the text encoders on first use; see `drop_text`."""
        return self._encoders(device)(captions)

    def text_lengths(self, captions: list[str], device: torch.device) -> dict[str, tuple[int, list[int]]]:
        """Tokenizer -> (tokens that its encoder reads of a caption, tokens of each); what is beyond is cut."""
        return self._encoders(device).lengths(captions)

    def _encoders(self, device: torch.device) -> Any:
        if self._text is None:
            self._text = self._load_text(self.model.fetch(self.TEXT_PARTS), device)
        return self._text

    def text_key(self) -> str:
        """A string that changes when the text encoders' weights do, without loading them: part of the caption cache's key."""
        revision = self.facts.revision
        return self.model.part_hash(self.TEXT_PARTS) if revision == "local" else f"{self.facts.source}@{revision}"

    def drop_text(self) -> None:
        """Free the text encoders."""
        self._text = None

    def new_pass(self) -> None:
        """What the frozen steps gave in the pass before may be overwritten from here on, if they are CUDA graphs."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    @abstractmethod
    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond, entry: nn.Module | None = None) -> StreamState:
        """Noisy latents, noise level in [0, 1] and captions -> the state before step 0, through the frozen entry or a copy
        from `copy_entry`."""

    @abstractmethod
    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        """One step, by its index or as a module from `copy_steps`. Returns a new state, never changes the old one."""

    @abstractmethod
    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        """The state after the last step -> (B, C, H, W), through the frozen head or a copy from `copy_head`."""

    @abstractmethod
    def steps(self) -> Sequence[nn.Module]:
        """The K modules that `run` takes one at a time."""

    def step_module(self, step: int | nn.Module) -> nn.Module:
        """A step given by its number, or as it is."""
        return self.steps()[step] if isinstance(step, int) else step

    @abstractmethod
    def _head(self) -> nn.Module:
        """The modules between the last step and the prediction."""

    @abstractmethod
    def _entry(self) -> nn.Module:
        """The modules before step 0: the latent's embedding, and those of time and text."""

    @abstractmethod
    def _embed(self) -> nn.Module:
        """The convolution that turns latents (B, C, H, W) into the first features, without positions."""

    def thrown_away(self, module: nn.Module, unread: Container[str]) -> list[str]:
        """Names of a copied step's parameters whose gradient is always zero although autograd reaches them.

        unread: names of its parameters that autograd does not reach.
        """
        return []

    def attention(self, step: int | nn.Module, state: StreamState) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, D / heads) of a step's self-attention over the image stream.

        Raises UserError where steps have none (U-Net).
        """
        facts = self.facts
        raise UserError(f"connector=share_attn needs a transformer backbone; {facts.source} is of the family {facts.family}")

    def predict(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> Tensor:
        """The frozen network's own prediction, step by step."""
        state = self.begin(x_BCHW, t_B, text)
        for k in range(self.facts.depth):
            state = self.run(k, state)
        return self.end(state)

    def copy_steps(self, indices: list[int]) -> nn.ModuleList:
        """Trainable float32 deep copies of steps. Modules are copied, never rebuilt from a configuration: `from_config`
        would write into the backbone's own and get the last block wrong."""
        return _trainable(nn.ModuleList(self._exact().steps()[i] for i in indices))

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Latents -> the frozen network's first features, positions included."""
        return self._entry()["pos_embed"](x_BCHW) if not self.facts.spatial else self._embed()(x_BCHW)

    def copy_entry(self) -> nn.Module:
        """A trainable float32 copy of the entry, for `begin(..., entry)`."""
        return _trainable(self._exact()._entry())

    def copy_head(self) -> nn.Module:
        """A trainable float32 copy of the head, for `end(state, head)`."""
        return _trainable(self._exact()._head())

    def copy_embed(self) -> nn.Module:
        """A trainable float32 copy of the latent embedding."""
        return _trainable(self._exact()._embed())

    def _exact(self) -> "Backbone":
        """This backbone with its weights as they were read: copies are made of those."""
        return self._unrounded[0] if self._unrounded else self

    def freeze(self) -> "Backbone":
        """No gradient, no dropout, whatever happens to the modules around it. Returns self."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: a trainer that calls `train()` on everything must not wake the backbone."""
        return super().train(False)

    def check_resolution(self, side: int, key: str = "resolution") -> None:
        """Refuse a side in pixels that does not divide into latents and patches, naming the nearest legal ones, or that is
        beyond the position embedding. key: where it was written."""
        if fault := resolution_fault(key, side, self.facts.multiple, self.facts.largest, self.facts.source):
            raise UserError(fault)

    def shape_key(self) -> str:
        """Equal for backbones whose networks differ in nothing but the values of their weights. Needs no weights."""
        return f"{self.facts} {self.quantize} {self.model.config(self.NET)}"

    def weight_hash(self) -> str:
        """16 hex digits over every parameter and buffer of the network, and behind them how it is quantized, if it is: equal
        before and after training."""
        return module_hash(self.net) + (f"-{self.quantize}" if self.quantize else "")


def _trainable(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float().requires_grad_(True).train()


def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a float32 tensor that is made where it is wanted: a copy from the host would make it wait for the device."""
    return torch.cat([torch.full((1,), float(value), device=device) for value in values])


def project_heads(attn: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a diffusers `Attention`, (B, heads, T, D / heads) each."""
    q, k, v = (p(x_BTD).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    return q, k, v


def unpatchify(x_BTQ: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens of Q = patch * patch * C numbers -> (B, C, H, W), in the order of DiT."""
    (h, w), p = grid, patch
    x_BhwppC = x_BTQ.reshape(len(x_BTQ), h, w, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", x_BhwppC).reshape(len(x_BTQ), -1, h * p, w * p)
