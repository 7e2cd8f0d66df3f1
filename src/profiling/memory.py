"""How much memory a training step will take, told before any weight is read and without a device.

Backbone and adapter are built from the configuration on torch's `meta` device, where tensors have a shape and no data.
One real forward and backward pass of the adapter's own loss then runs on them, while `StorageTracker` keeps the books.

The estimate is a sum of tensor sizes, to be compared with `torch.cuda.max_memory_allocated`. Not in it: the CUDA context,
workspaces of cuBLAS, cuDNN and attention kernels, rounding and gaps of the allocator, buckets of multi-device training,
the text encoders, the autoencoder, and whatever validation needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from src.backbones.base import Backbone
from src.profiling.meta import LOW_PRECISION
from src.profiling.optimizer import ADAMW, OptimizerModel
from src.profiling.step import Step, watch
from src.profiling.tracker import GIB, MemoryEstimate, describe
from src.types import BackboneFacts, Batch, ConditionSpace, TextCond

__all__ = ["GIB", "MemoryEstimate", "blank_batch", "describe", "estimate_for", "hollow_adapter", "track_step"]


def estimate_for(
    backbone: Backbone,
    build_adapter: Callable[[Backbone], Any],
    *,
    batch: int,
    resolution: int,
    precision: str,
    ema: bool,
    accumulates: bool = True,
    optimizer: OptimizerModel = ADAMW,
) -> MemoryEstimate:
    """Peak memory of one training step with `batch` images at once, `resolution` pixels wide.

    backbone: only its facts and configuration are read; its network may be absent and is never touched.
    build_adapter: makes the adapter on the backbone that it is given (one without data).
    precision: "32-true", "bf16-mixed" or "16-mixed", as Lightning names them. In the mixed ones frozen weights are kept
    in 16 bits and trainable weights, gradients and optimizer in 32, and autocast is emulated: matrix products,
    convolutions and attention in 16 bits, norms, softmax and powers in 32, everything else in the type that it meets;
    the 16-bit copies of trainable weights live until the forward pass ends, or longer where backward needs them.
    ema, accumulates, optimizer: see `track_step`. Raises ValueError for another precision.
    """
    if precision not in LOW_PRECISION:
        raise ValueError(f"precision={precision!r} cannot be estimated: use one of {sorted(LOW_PRECISION)}")
    backbone.check_resolution(resolution)
    adapter = hollow_adapter(backbone, build_adapter, precision)
    with torch.device("meta"):
        step = blank_batch(backbone.facts, adapter.condition_space, batch, resolution)
    return track_step(adapter, step, precision=precision, ema=ema, accumulates=accumulates, optimizer=optimizer)


def hollow_adapter(backbone: Backbone, build_adapter: Callable[[Backbone], Any], precision: str) -> Any:
    """An adapter on a twin of the backbone, both without data, the frozen weights in the precision that they train with."""
    # the builder may seed and draw: whoever asks for an estimate must not get another training for it
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        hollow = backbone.hollow(torch.float32)
        adapter = build_adapter(hollow)  # in float32, for it may run the network, and there is no autocast here
    nn.Module.to(hollow.net, LOW_PRECISION[precision] or torch.float32)  # diffusers' own warns
    return adapter


def blank_batch(facts: BackboneFacts, space: ConditionSpace, batch: int, resolution: int) -> Batch:
    """A micro-batch of the right shapes and of zeros, on torch's default device."""
    side = resolution // facts.factor
    latents = (batch, facts.latent_channels, side, side)
    text = {"tokens": torch.zeros(batch, facts.text_tokens, facts.text_width)}
    if facts.pooled_width is not None:
        text["pooled"] = torch.zeros(batch, facts.pooled_width)
    if facts.text_mask:
        text["mask"] = torch.ones(batch, facts.text_tokens)
    return Batch(
        index=list(range(batch)),
        ids=[""] * batch,
        latents_BCHW=torch.zeros(latents),
        noise_BCHW=torch.zeros(latents),
        uniform_B=torch.full((batch,), 0.5),
        text=TextCond.of(text),
        condition=torch.zeros(latents if space == "latent" else (batch, 3, resolution, resolution)),
    )


def track_step(
    adapter: Any,
    batch: Batch,
    *,
    precision: str = "32-true",
    ema: bool = False,
    accumulates: bool = True,
    optimizer: OptimizerModel = ADAMW,
) -> MemoryEstimate:
    """Run one training step where the tensors are, and account for it. Leaves the adapter without gradients.

    See `watch`. It is a later step of a run, so the optimizer's state exists, and so do gradients during the forward pass,
    since Lightning clears them only before the backward pass. accumulates: they stay in the backward pass too, as in all
    micro-batches of a step but the first. ema: an averaged copy of the trainable weights is kept beside them.
    optimizer: see `model_of`; by default AdamW in groups of tensors, torch's choice on a GPU.
    """
    average = [p.detach().clone() for p in adapter.parameters() if p.requires_grad] if ema else []
    gradients = "kept" if accumulates else "until_backward"
    return watch(Step(adapter, batch, average=average), precision=precision, gradients=gradients, model=optimizer)
