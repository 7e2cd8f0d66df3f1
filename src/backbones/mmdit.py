"""SD3, SD3.5-medium and SD3.5-large: `SD3Transformer2DModel` unrolled block by block.

Source of the order of operations: diffusers `models/transformers/transformer_sd3.py`, forward. A block's text output is
None after the last block (`context_pre_only`). Dual attention and qk-norm of SD3.5 live inside the blocks.
"""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone, project_heads, unpatchify
from src.objectives import FlowMatching
from src.text.stock import SD3Text
from src.types import BackboneFacts, StreamState, TextCond


class SD3(Backbone):
    """Stable Diffusion 3 (2403.03206).

    t5_tokens: T5 tokens appended to CLIP's (0: none), the same in training and sampling; the rest: see `Backbone`.
    """

    NET: ClassVar = "transformer"
    TEXT_PARTS: ClassVar = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3")

    def __init__(self, *, t5_tokens: int, **common: Any):
        self.t5_tokens = t5_tokens
        super().__init__(**common)

    def _read_facts(self) -> BackboneFacts:
        net, vae, clip = (self.model.config(p) for p in (self.NET, "vae", "text_encoder"))
        factor, depth = 2 ** (len(vae["block_out_channels"]) - 1), net["num_layers"]
        return BackboneFacts(
            family="mmdit",
            source=self.model.source,
            revision=self.model.resolved_revision,
            latent_channels=net["in_channels"],
            factor=factor,
            patch=net["patch_size"],
            multiple=factor * net["patch_size"],
            depth=depth,
            widths=(net["num_attention_heads"] * net["attention_head_dim"],) * (depth + 1),
            middle=depth // 2,
            text_tokens=clip["max_position_embeddings"] + self.t5_tokens,
            text_width=net["joint_attention_dim"],
            pooled_width=net["pooled_projection_dim"],
            largest=factor * net["patch_size"] * net["pos_embed_max_size"],
            licence_url=self.model.licence_url,
        )

    def _make_objective(self) -> FlowMatching:
        return FlowMatching()

    def _load_text(self, folder: Path, device: torch.device) -> Callable[[list[str]], TextCond]:
        return SD3Text(folder, device, self.model.config(self.NET), self.t5_tokens)

    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond, entry: nn.Module | None = None) -> StreamState:
        if entry is None:
            self.new_pass()
            entry = self._entry()
        dtype = entry["pos_embed"].proj.weight.dtype
        p = self.net.config.patch_size
        x_BTD = entry["pos_embed"](x_BCHW.to(dtype)).contiguous()
        # time stays float32 until its embedding: bfloat16 cannot tell 999 from 1000
        time_BD = entry["time_text_embed"](self.objective.to_model_time(t_B.float()), text.pooled_BP.to(dtype))
        text_BLD = entry["context_embedder"](text.tokens_BLD.to(dtype))
        return StreamState(x=x_BTD, text=text_BLD, time=time_BD, grid=(x_BCHW.shape[-2] // p, x_BCHW.shape[-1] // p))

    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        block = self.step_module(step)
        text_BLD, x_BTD = block(hidden_states=state.x, encoder_hidden_states=state.text, temb=state.time)
        return state.with_(x=x_BTD, text=text_BLD)

    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        head = self._head() if head is None else head
        x_BTQ = head["proj_out"](head["norm_out"](state.x, state.time))  # Q = patch * patch * C
        return unpatchify(x_BTQ, state.grid, self.net.config.patch_size)

    def steps(self) -> nn.ModuleList:
        return self.net.transformer_blocks

    def attention(self, step: int | nn.Module, state: StreamState) -> tuple[Tensor, Tensor, Tensor]:
        block = self.step_module(step)
        attn, normed_BTD = block.attn, block.norm1(state.x, emb=state.time)[0]
        q, k, v = project_heads(attn, normed_BTD)
        q = q if attn.norm_q is None else attn.norm_q(q)
        return q, k if attn.norm_k is None else attn.norm_k(k), v

    def thrown_away(self, module: nn.Module, unread: Container[str]) -> list[str]:
        # where nobody reads the text output, the text's queries are computed and cut off behind the attention
        if module.context_pre_only or "attn.to_add_out.weight" in unread:
            return [n for n, _ in module.named_parameters() if n.startswith(("attn.add_q_proj.", "attn.norm_added_q."))]
        return []

    def _entry(self) -> nn.Module:
        return nn.ModuleDict({name: getattr(self.net, name) for name in ("pos_embed", "time_text_embed", "context_embedder")})

    def _head(self) -> nn.Module:
        return nn.ModuleDict({"norm_out": self.net.norm_out, "proj_out": self.net.proj_out})

    def _embed(self) -> nn.Module:
        return self.net.pos_embed.proj
