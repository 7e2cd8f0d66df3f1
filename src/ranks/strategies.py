"""Lightning's strategies for several devices: a copy of the adapter on each (`ddp`), or a part of it on each (`fsdp`).

Both save the same folder, written by rank 0 and whole, so that a run goes on with any number of devices and either strategy.
"""

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from src.ranks.place import device_count


def strategy_for(hardware: Mapping[str, Any]) -> Strategy | str:
    """What Lightning's trainer takes as its strategy. hardware: resolved."""
    count = device_count(hardware)
    if count == 1:
        return "auto"
    limit = datetime.timedelta(seconds=hardware["timeout_s"])
    if hardware["strategy"] == "fsdp":
        return Sharded(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=limit)
    # no buffer of an adapter moves, and parameters without a gradient are frozen by the build
    return Copied(broadcast_buffers=False, gradient_as_bucket_view=True, timeout=limit)


class _SavesTogether:
    """A checkpoint that rank 0 cannot write fails on all ranks, so that whoever catches it does so everywhere."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        whole, failure = in_one_piece(checkpoint), None
        if self.is_global_zero:
            try:
                self.checkpoint_io.save_checkpoint(whole, filepath, storage_options)
            except Exception as error:
                failure = error
        told = self.broadcast(failure)
        if told is not None:
            raise failure or told


class Copied(_SavesTogether, DDPStrategy):
    """Every device has the adapter; gradients are averaged."""


class Sharded(_SavesTogether, ModelParallelStrategy):
    """Every device has a part of each of the adapter's weights, with its gradient, its optimizer state and its average."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        kept, own = checkpoint["state_dict"], self.lightning_module.state_dict()
        if strict and kept.keys() != own.keys():
            raise RuntimeError(f"the checkpoint's tensors are not the adapter's: {sorted(kept.keys() ^ own.keys())[:3]}")
        for name, tensor in own.items():
            tensor.copy_(placed_as(tensor, kept[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, kept in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            state = {number: _like_its_weight(weights[number], of_one) for number, of_one in kept["state"].items()}
            optimizer.load_state_dict({**kept, "state": state})


def _like_its_weight(weight: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one weight, cut as the weight is; what has another shape, such as a counter, stays."""
    cut = {k: isinstance(v, Tensor) and v.shape == weight.shape for k, v in state.items()}
    return {k: placed_as(weight, v) if cut[k] else v for k, v in state.items()}


def placed_as(weight: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor on the weight's device, and cut as the weight is. All ranks call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor):
        return whole.to(weight.device)
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements)


def in_one_piece(tree: Any) -> Any:
    """A checkpoint's dictionary with every sharded tensor put together, on the CPU. All ranks call it."""
    if isinstance(tree, dict):
        return type(tree)((k, in_one_piece(v)) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(in_one_piece(v) for v in tree)
    return tree.full_tensor().cpu() if hasattr(tree, "full_tensor") else tree


# ---- sharding ---------------------------------------------------------------------------------------------------------

ENTRIES = ("training_step", "called")  # through which an adapter is entered from outside


def shard(adapter: nn.Module, frozen_steps: Iterable[nn.Module], count: int, device_type: str) -> None:
    """Cut an adapter's weights over `count` devices, copied block by copied block and the rest as one, and those of the frozen
    steps that are given. A block is put together while it works, and again in the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device_type, (count,))
    copies = adapter.parts().get("copies", ())
    for module in [unit for step in (*copies, *frozen_steps) for unit in _units(step)]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(adapter, mesh=mesh, reshard_after_forward=True)
    for name in ENTRIES:
        register_fsdp_forward_method(adapter, name)


def _units(step: nn.Module) -> list[nn.Module]:
    """The modules of a step that are called whole: a transformer's block, or the parts of a U-Net's step."""
    parts = getattr(step, "parts", None)
    return [step] if parts is None else list(parts.values())
