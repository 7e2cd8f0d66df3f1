"""SD3, SD3.5-medium and SD3.5-large: `SD3Transformer2DModel` unrolled block by block.

Source of the order of operations: diffusers `models/transformers/transformer_sd3.py`, forward. A block's text output is
None after the last block (`context_pre_only`). Dual attention and qk-norm of SD3.5 live inside the blocks.
"""

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.backbones.source import ModelSource
from src.objectives import FlowMatching
from src.text.sd3 import SD3Text
from src.types import BackboneFacts, StreamState, TextCond

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3")


class SD3(Backbone):
    """Stable Diffusion 3 (2403.03206).

    name: short name for run folders; source, revision, licence_url: see `ModelSource`;
    native_resolution: side in pixels that it was trained at; t5_tokens: T5 tokens appended to CLIP's (0: none),
    the same in training and sampling; resolution: side in pixels of this run (None: native).
    """

    def __init__(
        self,
        name: str,
        source: str,
        native_resolution: int,
        t5_tokens: int,
        revision: str | None = None,
        licence_url: str | None = None,
        resolution: int | None = None,
    ):
        super().__init__()
        self.name, self.t5_tokens, self.native_resolution = name, t5_tokens, native_resolution
        self.model = ModelSource(source, revision, licence_url)
        self.model.check(("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"))
        self.facts = self._read_facts()
        self.check_resolution(resolution or native_resolution)
        self.objective = FlowMatching()
        self.net = None
        self._text: SD3Text | None = None

    def _read_facts(self) -> BackboneFacts:
        net, vae, clip = (self.model.config(p) for p in ("transformer", "vae", "text_encoder"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return BackboneFacts(
            family="mmdit",
            source=self.model.source,
            revision=self.model.resolved_revision,
            latent_channels=net["in_channels"],
            factor=factor,
            multiple=factor * net["patch_size"],
            depth=net["num_layers"],
            width=net["num_attention_heads"] * net["attention_head_dim"],
            text_tokens=clip["max_position_embeddings"] + self.t5_tokens,
            text_width=net["joint_attention_dim"],
            pooled_width=net["pooled_projection_dim"],
            licence_url=self.model.licence_url,
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> "SD3":
        from diffusers import SD3Transformer2DModel

        folder = self.model.fetch(("transformer",))
        net = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype, local_files_only=True)
        return self.attach(net).to(device)

    def attach(self, net: nn.Module) -> "SD3":
        """Use an `SD3Transformer2DModel` that is already in memory; returns self, frozen."""
        self.net = net
        return self.freeze()

    def load_codec(self, device: torch.device) -> Codec:
        from diffusers import AutoencoderKL

        folder = self.model.fetch(("vae",))
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, local_files_only=True)
        return Codec(vae).to(device)

    def scheduler(self):
        """The model's own `FlowMatchEulerDiscreteScheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.model.fetch(("scheduler",)), subfolder="scheduler")

    def encode_text(self, captions: list[str], device: torch.device) -> TextCond:
        if self._text is None:
            self._text = SD3Text(self.model.fetch(TEXT_PARTS), self.model.config("transformer"), self.t5_tokens, device)
        return self._text(captions)

    def text_key(self) -> str:
        revision = self.facts.revision
        return self.model.part_hash(TEXT_PARTS) if revision == "local" else f"{self.facts.source}@{revision}"

    def drop_text(self) -> None:
        self._text = None

    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond) -> StreamState:
        dtype = self.net.pos_embed.proj.weight.dtype
        p = self.net.config.patch_size
        x_BTD = self.net.pos_embed(x_BCHW.to(dtype)).contiguous()
        # time stays float32 until its embedding: bfloat16 cannot tell 999 from 1000
        time_BD = self.net.time_text_embed(self.objective.to_model_time(t_B.float()), text.pooled_BP.to(dtype))
        text_BLD = self.net.context_embedder(text.tokens_BLD.to(dtype))
        return StreamState(x=x_BTD, text=text_BLD, time=time_BD, grid=(x_BCHW.shape[-2] // p, x_BCHW.shape[-1] // p))

    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        block = self.net.transformer_blocks[step] if isinstance(step, int) else step
        text_BLD, x_BTD = block(hidden_states=state.x, encoder_hidden_states=state.text, temb=state.time)
        return state.with_(x=x_BTD, text=text_BLD)

    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        head = self._head() if head is None else head
        x_BTQ = head["proj_out"](head["norm_out"](state.x, state.time))  # Q = patch * patch * C
        (h, w), p, c = state.grid, self.net.config.patch_size, self.net.out_channels
        x_BhwppC = x_BTQ.reshape(len(x_BTQ), h, w, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", x_BhwppC).reshape(len(x_BTQ), c, h * p, w * p)

    def steps(self) -> nn.ModuleList:
        return self.net.transformer_blocks

    def _dead_parts(self, step: nn.Module) -> list[nn.Module]:
        # the last block drops its text output: what asks on behalf of the text is computed and thrown away
        parts = (step.attn.add_q_proj, step.attn.norm_added_q) if step.context_pre_only else ()
        return [p for p in parts if p is not None]

    def _head(self) -> nn.Module:
        return nn.ModuleDict({"norm_out": self.net.norm_out, "proj_out": self.net.proj_out})

    def _embed(self) -> nn.Module:
        return self.net.pos_embed.proj
