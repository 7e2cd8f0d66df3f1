"""PixArt-alpha: `PixArtTransformer2DModel` unrolled block by block.

Source of the order of operations: diffusers `models/transformers/pixart_transformer_2d.py`, forward. One modulation of
time serves all blocks (adaLN-single), text enters by cross-attention with a mask, and the network also gives a learned
variance, which is cut off: the loss and diffusers' sampler read the first half of the channels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone, constants, project_heads, unpatchify
from src.objectives import Diffusion, diffusion_of
from src.text.stock import PixArtText
from src.types import BackboneFacts, StreamState, TextCond


class PixArt(Backbone):
    """PixArt-alpha (2310.00426).

    text_tokens: T5 tokens, padded and masked; native_law: the noise levels that it was trained at (see `Diffusion`), and
    adapters with it; the rest: see `Backbone`. The 1024-pixel model also embeds size and aspect
    ratio, which are those of the latents that it is given.
    """

    NET: ClassVar = "transformer"
    TEXT_PARTS: ClassVar = ("text_encoder", "tokenizer")

    def __init__(self, *, text_tokens: int, native_law: Literal["uniform", "flow"], **common: Any):
        self.text_tokens, self.native_law = text_tokens, native_law
        super().__init__(**common)

    def _read_facts(self) -> BackboneFacts:
        net, vae = self.model.config(self.NET), self.model.config("vae")
        factor, depth = 2 ** (len(vae["block_out_channels"]) - 1), net["num_layers"]
        return BackboneFacts(
            family="dit",
            source=self.model.source,
            revision=self.model.resolved_revision,
            latent_channels=net["in_channels"],
            factor=factor,
            patch=net["patch_size"],
            multiple=factor * net["patch_size"],
            depth=depth,
            widths=(net["num_attention_heads"] * net["attention_head_dim"],) * (depth + 1),
            middle=depth // 2,
            text_tokens=self.text_tokens,
            text_width=net["caption_channels"],
            pooled_width=None,
            text_mask=True,
            licence_url=self.model.licence_url,
        )

    def _make_objective(self) -> Diffusion:
        return diffusion_of(self.model.config("scheduler"), self.native_law)

    def _load_text(self, folder: Path, device: torch.device) -> Callable[[list[str]], TextCond]:
        return PixArtText(folder, device, self.text_tokens)

    def begin(self, x_BCHW: Tensor, t_B: Tensor, text: TextCond, entry: nn.Module | None = None) -> StreamState:
        if entry is None:
            self.new_pass()
            entry = self._entry()
        dtype, p = entry["pos_embed"].proj.weight.dtype, self.net.config.patch_size
        x_BTD = entry["pos_embed"](x_BCHW.to(dtype))
        # modulation: what all blocks share; embedded: the same before its projection, for the head
        modulation, embedded = entry["adaln_single"](
            self.objective.to_model_time(t_B), self._size_conditions(x_BCHW), batch_size=len(x_BCHW), hidden_dtype=dtype
        )
        text_BLD = entry["caption_projection"](text.tokens_BLD.to(dtype))
        bias = (1 - text.mask_BL.to(dtype)) * -10000.0
        grid = (x_BCHW.shape[-2] // p, x_BCHW.shape[-1] // p)
        return StreamState(x_BTD, text_BLD, modulation, grid, head_time=embedded, mask=bias.unsqueeze(1))

    def _size_conditions(self, x_BCHW: Tensor) -> dict[str, Tensor | None]:
        if not self.net.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        h, w = (side * self.facts.factor for side in x_BCHW.shape[-2:])
        sizes = constants((h, w), x_BCHW.device).expand(len(x_BCHW), 2)
        ratio = constants((h / w,), x_BCHW.device).expand(len(x_BCHW), 1)
        return {"resolution": sizes, "aspect_ratio": ratio}

    def run(self, step: int | nn.Module, state: StreamState) -> StreamState:
        block = self.step_module(step)
        x_BTD = block(state.x, encoder_hidden_states=state.text, encoder_attention_mask=state.mask, timestep=state.time)
        return state.with_(x=x_BTD)

    def end(self, state: StreamState, head: nn.Module | None = None) -> Tensor:
        head = self._head() if head is None else head
        out_B2CHW = unpatchify(head(state.x, state.head_time), state.grid, self.net.config.patch_size)
        return out_B2CHW[:, : self.facts.latent_channels]

    def steps(self) -> nn.ModuleList:
        return self.net.transformer_blocks

    def attention(self, step: int | nn.Module, state: StreamState) -> tuple[Tensor, Tensor, Tensor]:
        block = self.step_module(step)
        shift, scale = (block.scale_shift_table[None] + state.time.reshape(len(state.x), 6, -1)).chunk(6, dim=1)[:2]
        attn, normed_BTD = block.attn1, block.norm1(state.x) * (1 + scale) + shift
        return project_heads(attn, normed_BTD)

    def _entry(self) -> nn.Module:
        return nn.ModuleDict({name: getattr(self.net, name) for name in ("pos_embed", "adaln_single", "caption_projection")})

    def _head(self) -> nn.Module:
        return PixArtHead(self.net.norm_out, self.net.scale_shift_table, self.net.proj_out)

    def _embed(self) -> nn.Module:
        return self.net.pos_embed.proj


class PixArtHead(nn.Module):
    """Norm, modulation by time, projection to patches: the network's own modules, or deep copies of them."""

    def __init__(self, norm_out: nn.Module, scale_shift_table: nn.Parameter, proj_out: nn.Module):
        super().__init__()
        self.norm_out, self.scale_shift_table, self.proj_out = norm_out, scale_shift_table, proj_out

    def forward(self, x_BTD: Tensor, embedded_BD: Tensor) -> Tensor:
        """-> (B, T, patch * patch * 2C)."""
        shift, scale = (self.scale_shift_table[None] + embedded_BD[:, None]).chunk(2, dim=1)
        return self.proj_out(self.norm_out(x_BTD) * (1 + scale) + shift)
