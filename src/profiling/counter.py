"""Arithmetic and memory traffic of a step, operation by operation, and the time that a named GPU cannot beat with them.

What counts as a FLOP. Forward and backward: matrix products, convolutions and attention by the formulas of
`torch.utils.flop_counter` (2 m n k for a product; attention 2 products forward and 5 backward, of which one repeats the
scores); everything elementwise, norms and softmax count nothing, as is the custom. Optimizer: its arithmetic is elementwise,
so there each addition, multiplication, division and root of an element counts, by `ELEMENTWISE`.

What counts as traffic: each operation reads its operands and writes its results once, from and to main memory; views and
allocations are free. A flash attention reads queries, keys and values and never the matrix of scores.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from src.types import UserError

aten = torch.ops.aten
Part = Literal["frozen_forward", "adapter_forward", "backward", "optimizer"]
PARTS: tuple[Part, ...] = ("frozen_forward", "adapter_forward", "backward", "optimizer")
# arithmetic per element, without the names' `_foreach_` in front and `_` behind
ELEMENTWISE = {
    "add": 1, "sub": 1, "mul": 1, "div": 1, "sqrt": 1, "neg": 1, "reciprocal": 1, "rsqrt": 2, "maximum": 1, "minimum": 1,
    "abs": 1, "sign": 1, "clamp_min": 1, "clamp_max": 1, "lerp": 3, "addcmul": 3, "addcdiv": 3, "norm": 2,
    "linalg_vector_norm": 2, "_fused_adamw": 14, "_fused_adam": 14,
}  # fmt: skip
TENSOR_TRAFFIC_FREE = ("empty", "new_empty", "lift_fresh", "_local_scalar_dense", "detach", "alias", "_record_function")
WRITTEN_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
CONVOLUTIONS = {aten.convolution, aten._convolution, aten.cudnn_convolution, aten.convolution_backward}
ATTENTION = {
    aten._scaled_dot_product_flash_attention: "flash",
    aten._scaled_dot_product_efficient_attention: "efficient",
    aten._scaled_dot_product_cudnn_attention: "cudnn",
    aten._scaled_dot_product_flash_attention_for_cpu: "flash_cpu",
    aten._scaled_dot_product_attention_math: "math",
    aten._scaled_dot_product_attention_math_for_mps: "math",
}
DTYPE_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "int8",
    torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8",
}  # fmt: skip


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


@cache
def formulas() -> dict[Any, Any]:
    """Operation -> its FLOP formula: torch's, and those of the CPU's flash kernels, for which torch has none."""
    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return {**own, **flop_registry}


@dataclass(frozen=True)
class Rates:
    """What a GPU can do at most. tflops: dense TFLOP/s by the type of the operands; bandwidth_gb_s: of its main memory.

    tf32_matmul, tf32_conv: whether float32 products and convolutions run in TF32, as torch's switches say.
    """

    gpu: str
    tflops: dict[str, float]
    bandwidth_gb_s: float
    tf32_matmul: bool = False
    tf32_conv: bool = True

    def per_ms(self, dtype: torch.dtype, convolution: bool = False) -> float:
        """FLOPs per millisecond of operands of a type. Raises UserError where the profile has no rate for it."""
        name = DTYPE_NAMES.get(dtype, str(dtype))
        if name == "fp32" and (self.tf32_conv if convolution else self.tf32_matmul):
            name = "tf32"
        if name not in self.tflops:
            raise UserError(
                f"hardware.rates.tflops has no {name} for {self.gpu}, and the step computes in it: add it, dense, in TFLOP/s"
            )
        return self.tflops[name] * 1e9

    @property
    def bytes_per_ms(self) -> float:
        return self.bandwidth_gb_s * 1e6


@dataclass
class Tally:
    """Sums by part of the step. flops: of `PARTS`; recomputed: the share of backward's FLOPs that repeats a forward pass.

    bound_ms: sum over operations of max(FLOPs / rate, bytes / bandwidth); arithmetic_ms: of FLOPs / rate alone; both stay
    empty without rates. nbytes: traffic. attention: names of the attention kernels that ran.
    """

    flops: Counter[str] = field(default_factory=Counter)
    recomputed: int = 0
    nbytes: Counter[str] = field(default_factory=Counter)
    bound_ms: Counter[str] = field(default_factory=Counter)
    arithmetic_ms: Counter[str] = field(default_factory=Counter)
    attention: set[str] = field(default_factory=set)


class OpCounter(TorchDispatchMode):
    """Adds up every operation inside it into `tally`. phase: forward, backward or optimizer, set by whoever runs the step.

    frozen_forward is whatever runs inside the frozen network's own modules in the forward pass, whatever the method;
    adapter_forward is the rest of it (the condition's encoding and the loss included). inside: see `own_calls`.
    """

    def __init__(self, rates: Rates | None = None, inside: list[str] | None = None):
        super().__init__()
        self.rates, self.phase, self.tally = rates, "forward", Tally()
        self.inside = [] if inside is None else inside

    @property
    def part(self) -> str:
        """The part of the step that runs now."""
        if self.phase != "forward":
            return self.phase
        return "frozen_forward" if self.inside else "adapter_forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in formulas():  # what only stands for other operations, as under inference mode
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.add(func, args, kwargs, out)
        return out

    def add(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Account for one operation that ran."""
        packet = func.overloadpacket
        formula = formulas().get(packet)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        if self.phase == "optimizer" and not flops:
            flops = _elementwise(packet.__name__, args)
        self.add_numbers(flops, traffic(func, args, kwargs, out), _dtype(args), convolution=packet in CONVOLUTIONS)
        if packet in ATTENTION:
            self.tally.attention.add(ATTENTION[packet])

    def add_numbers(self, flops: int, nbytes: int, dtype: torch.dtype, convolution: bool = False) -> None:
        """Account for arithmetic and traffic of the present part; dtype: of the operands."""
        tally, part = self.tally, self.part
        tally.flops[part] += flops
        tally.nbytes[part] += nbytes
        # the backward pass proper runs without grad mode: where it is on, a checkpointed block is computed again
        if part == "backward" and torch.is_grad_enabled():
            tally.recomputed += flops
        if self.rates is not None:
            moved = nbytes / self.rates.bytes_per_ms
            # elementwise arithmetic never outlasts its traffic, and no datasheet has a rate for it
            counted = flops and part != "optimizer"
            computed = flops / self.rates.per_ms(dtype, convolution) if counted else 0.0
            tally.arithmetic_ms[part] += computed
            tally.bound_ms[part] += max(computed, moved)


def traffic(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation at least reads and writes in main memory; 0 for a view."""
    name = func.overloadpacket.__name__
    if name.startswith(TENSOR_TRAFFIC_FREE) or not isinstance(func, torch._ops.OpOverload):
        return 0
    given = list({id(t): t for t in _tensors((args, kwargs))}.values())  # x * x reads x once
    known = {t.untyped_storage()._cdata for t in given}
    made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in known]
    changed = list(_tensors([a for a, write in zip(args, _writes(func), strict=False) if write]))
    if not made and not changed:
        return 0
    if name in WRITTEN_ONLY:
        given = given[len(changed) :]
    return sum(map(_size, (*given, *made, *changed)))


@cache
def _writes(func: Any) -> tuple[bool, ...]:
    """Which positional arguments an operation changes. The fused optimizers name gradients too, which they only change
    where a loss was scaled."""
    arguments = func._schema.arguments
    return tuple(bool(a.alias_info and a.alias_info.is_write) and a.name != "grads" for a in arguments)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those that an expansion repeats count once."""
    return tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)


def _elementwise(name: str, args: tuple) -> int:
    """FLOPs of an optimizer's operation; what it does to counters of steps is left out."""
    per_element = ELEMENTWISE.get(name.removeprefix("_foreach_").removesuffix("_"), 0)
    first = args[0] if args and isinstance(args[0], (tuple, list)) else args[:1]
    return per_element * sum(t.numel() for t in first if isinstance(t, Tensor) and t.ndim) if per_element else 0


def _dtype(args: tuple) -> torch.dtype:
    """The type of the widest-shaped operand: a bias in front of a product says nothing of its rate."""
    found = list(_tensors(args))
    return max(found, key=lambda t: t.ndim).dtype if found else torch.float32
