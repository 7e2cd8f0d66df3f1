"""A frozen network with the linear layers of its steps in 8 bits; entry, head, norms and convolutions stay as they are.

int8: weights only, one scale per output channel, the largest weight of a channel at 127 (row-wise absmax, Dettmers et al.
2022, 2208.07339, section 2). The product is taken in the network's own precision, so this saves memory and not arithmetic.
fp8: weights in e4m3 with one scale per output channel and inputs in e4m3 with one scale per row (Micikevicius et al. 2022,
2209.05433); the product is taken in fp8, which wants a Hopper GPU.

A layer is replaced by one of ours; no forward of the library is touched. The gradient with respect to the input is that of
the rounded weights, so methods whose gradient crosses the backbone train too.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Quantize = Literal["int8", "fp8"]
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
FP8_MULTIPLE = 16  # of both sides of a weight, by the fp8 kernels


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight has 8 bits: weight (out, in), scale (out,) float32, weight * scale near the original.

    Casting a network leaves weight and scale as they are; moving it to a device moves them.
    """

    def __init__(self, layer: nn.Linear, kind: Quantize):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, layer.in_features, layer.out_features
        weight, scale = rounded(layer.weight.detach().float(), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the precision of autocast or else of x."""
        device = x.device.type
        on = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else x.dtype
        product = int8_product if self.kind == "int8" else fp8_product
        if torch.is_grad_enabled() and x.requires_grad:
            y = _FrozenProduct.apply(x, self.weight, self.scale, dtype, product)
        else:
            y = product(x, self.weight, self.scale, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight, scale = self.weight.data, self.scale
        super()._apply(fn, recurse)
        if self.weight.dtype != weight.dtype:
            self.weight = nn.Parameter(weight.to(self.weight.device), requires_grad=False)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def rounded(weight: Tensor, kind: Quantize) -> tuple[Tensor, Tensor]:
    """(rows, columns) float32 -> the same in 8 bits and one float32 scale per row; a row of zeros has scale 1."""
    most = weight.abs().amax(dim=1)
    scale = torch.where(most > 0, most / LARGEST[kind], torch.ones_like(most))
    levels = (weight / scale[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    return (levels.round() if kind == "int8" else levels).to(DTYPES[kind]), scale


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) times the transposed weight, which is written out in `dtype` for as long as this takes."""
    return F.linear(x.to(dtype), _written_out(weight, scale, dtype))


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in), rounded row by row, times the transposed weight, in fp8 with bfloat16 results."""
    rows, row_scale = rounded(x.reshape(-1, x.shape[-1]).contiguous().float(), "fp8")
    y = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale[:, None], scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y.reshape(*x.shape[:-1], -1).to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """A product that keeps nothing for the backward pass but the 8-bit weight, which lives anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, product: Callable) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        return product(x, weight, scale, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        weight, scale = ctx.saved_tensors
        return (gradient @ _written_out(weight, scale, gradient.dtype)).to(ctx.dtype), None, None, None, None


def _written_out(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == torch.float8_e4m3fn:
        weight = weight.to(torch.float32)  # it takes part in no arithmetic itself
    return (weight * scale[:, None]).to(dtype)


def quantize_linears(modules: Iterable[nn.Module], kind: Quantize) -> int:
    """Replace every `nn.Linear` inside the modules, in place. -> how many. fp8 leaves those that its kernels do not take."""
    count = 0
    for parent in (m for module in modules for m in list(module.modules())):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and (kind == "int8" or _fits_fp8(layer)):
                setattr(parent, name, QuantizedLinear(layer, kind))
                count += 1
    return count


def _fits_fp8(layer: nn.Linear) -> bool:
    return layer.in_features % FP8_MULTIPLE == 0 and layer.out_features % FP8_MULTIPLE == 0
