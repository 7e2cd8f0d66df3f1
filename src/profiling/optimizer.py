"""The optimizer's step on tensors without data: what it keeps, needs for a moment, computes and moves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.vocabulary import EIGHT_BIT


@dataclass(frozen=True)
class OptimizerModel:
    """An optimizer by its numbers, per trained parameter: for kernels that do not take tensors without data.

    state_bytes: what it keeps; temporary_bytes: what one step needs besides; flops: additions, multiplications, divisions
    and roots of a step; traffic_bytes: what a step at least reads and writes.
    """

    state_bytes: float
    temporary_bytes: float
    flops: int
    traffic_bytes: float


# two float32 moments; in groups of tensors a step writes out the root of the second one (a float32 number per parameter)
ADAMW = OptimizerModel(state_bytes=8, temporary_bytes=4, flops=14, traffic_bytes=80)
# one kernel: weight, gradient and moments are read, weight and moments written
FUSED_ADAMW = OptimizerModel(state_bytes=8, temporary_bytes=0, flops=14, traffic_bytes=28)
# two moments of one byte, with one float32 scale each per block of 256 (Dettmers et al. 2021, 2110.02861)
ADAMW_8BIT = OptimizerModel(state_bytes=2 + 8 / 256, temporary_bytes=0, flops=14, traffic_bytes=16 + 16 / 256)


def model_of(algorithm: Mapping[str, Any]) -> OptimizerModel | None:
    """The model for an `optimizer.algorithm` node on a GPU; None where there is none, and only a real step can tell."""
    name = str(algorithm["_target_"])
    if name in EIGHT_BIT:
        return ADAMW_8BIT
    if name in ("torch.optim.AdamW", "torch.optim.Adam"):
        return FUSED_ADAMW if algorithm.get("fused") else ADAMW
    return None


def needs_model(algorithm: Mapping[str, Any]) -> bool:
    """Whether the step cannot be run on `meta`: fused kernels, and those of bitsandbytes."""
    return bool(algorithm.get("fused")) or not str(algorithm["_target_"]).startswith("torch.optim.")


def prime(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    """Make the state that exists from the first step on, by a step with gradients of zero; weights may decay by it."""
    trained = list(trained)
    kept = [p.grad for p in trained]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, gradient in zip(trained, kept, strict=True):
        p.grad = gradient


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps, its counters of steps included."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def in_groups(algorithm: Callable[..., Any], on_gpu: bool) -> dict[str, bool]:
    """The choice that torch makes by the tensors' device, spelled out, since it does not know it on `meta`: groups of
    tensors at once on a GPU, one after the other on a CPU. Empty where the configuration has chosen."""
    chosen = getattr(algorithm, "keywords", {})
    return {} if {"foreach", "fused"} & chosen.keys() else {"foreach": on_gpu}
