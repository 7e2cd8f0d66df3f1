"""Lets tensors without data take the path that they would take on a GPU: its attention kernel, its autocast."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOW_PRECISION = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# What `torch.autocast("cuda")` runs in the low precision and in float32: those of its two lists that networks here use.
CAST_LOW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.einsum,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
CAST_FLOAT = {
    F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt,
}  # fmt: skip


class MetaKernels(TorchFunctionMode):
    """Attention goes to a flash kernel, for on `meta` torch would choose the form that writes out all tokens by all tokens.

    low: the low precision of autocast, or None for none; `torch.autocast` itself does not know `meta`.
    active: False makes it do nothing.
    """

    def __init__(self, low: torch.dtype | None, active: bool = True):
        super().__init__()
        self.low, self.active, self._casts = low, active, {}

    def end_forward(self) -> None:
        """Autocast ends here: drop its copies of weights and make no more that outlive their operation."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.active and self.low is not None and (func in CAST_LOW or func in CAST_FLOAT):
            dtype = self.low if func in CAST_LOW else torch.float32
            args = self._cast(args, dtype)
            kwargs = {k: self._cast(v, dtype) for k, v in kwargs.items()}
        redirected = self.active and func is F.scaled_dot_product_attention
        return (_flash if redirected else func)(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(self._cast(item, dtype) for item in x)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        # copies of trained weights are kept, with and without a graph
        if self._casts is None or dtype != self.low or not (x.is_leaf and x.requires_grad and x.dtype == torch.float32):
            return x.to(dtype)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(dtype)
        return self._casts[id(x)]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The CPU's kernel has shapes for `meta`, and saves what a GPU's do: query, key, value, output, one number per row."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
