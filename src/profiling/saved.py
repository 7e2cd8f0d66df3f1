"""What autograd keeps for the backward pass, and whether any of it was kept while the frozen backbone ran."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone
from src.profiling.own import own_calls


@dataclass(frozen=True)
class SavedReport:
    """Bytes that autograd saved for backward, each storage once, parameters and buffers of the given modules left out.

    backbone_bytes: the part that was first saved inside the backbone's own modules; frozen_steps: how often one of its
    own steps ran, so that a zero can be told from a backbone that was never asked.
    """

    total_bytes: int
    backbone_bytes: int
    frozen_steps: int


def saved_bytes(fn: Callable[[], Any], modules: Iterable[nn.Module], backbone: Backbone | None = None) -> SavedReport:
    """Call `fn` (a forward pass) and count what it saves.

    modules: their parameters and buffers live anyway and are not counted. backbone: if given, `begin`, a step given by
    its number, and `end` without a foreign head count as the backbone's own. Inside a checkpointed block nothing is
    saved but its inputs, and so it is reported. Everything saved is kept alive until this returns.
    """
    owned = [t for m in (*modules, *([backbone] if backbone is not None else [])) for t in (*m.parameters(), *m.buffers())]
    persistent = {t.untyped_storage()._cdata for t in owned}
    seen: dict[int, tuple[Tensor, bool]] = {}  # the tensor is kept, or its storage's address could come back as another's

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in persistent and key not in seen:
            seen[key] = (tensor.detach(), bool(inside))
        return tensor

    with own_calls(backbone) as (inside, calls), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = fn()
    sizes = [(t.untyped_storage().nbytes(), own) for t, own in seen.values()]
    del kept
    return SavedReport(sum(n for n, _ in sizes), sum(n for n, own in sizes if own), calls["run"])
