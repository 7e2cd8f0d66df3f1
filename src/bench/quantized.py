"""What a quantized backbone does to the loss of an adapter, on held-out images: the same weights, noise and t on both."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.adapters.base import ControlAdapter
from src.backbones.base import Backbone
from src.metrics.intervals import metric
from src.types import Batch


def loss_change(
    make: Callable[[Backbone], ControlAdapter],
    weights: dict[str, Tensor],
    exact: Backbone,
    quantized: Backbone,
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """-> "loss" on the exact backbone, "quantized_loss", "change" (their paired difference) with 95 % intervals, "relative".

    make: an untrained adapter on a backbone; weights: its trained tensors; batches: held-out, see `ControlData`.
    relative: change over loss. The adapter was trained on one of the two: the other is what it is moved to.
    """
    adapters = [make(backbone) for backbone in (exact, quantized)]
    for adapter in adapters:
        adapter.load_state_dict(weights)
        adapter.eval()
    pairs = []
    for batch in batches:
        moved = batch.to(next(exact.net.parameters()).device)
        pairs.append([_losses(adapter, moved) for adapter in adapters])
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    change = metric(after - before, "mse", "lower")
    told = {"loss": metric(before, "mse", "lower"), "quantized_loss": metric(after, "mse", "lower"), "change": change}
    return told | {"quantize": quantized.quantize, "relative": change["value"] / told["loss"]["value"]}


@torch.no_grad()
def _losses(adapter: ControlAdapter, batch: Batch) -> np.ndarray:
    with adapter.autocast():
        return adapter.losses(batch).double().cpu().numpy()
