"""A cell on tensors without data: memory, FLOPs, and the time that a named GPU cannot beat. Seconds, and no weights."""

from collections import Counter
from typing import Any

import torch

from src.bench.plan import Cell
from src.bench.work import Drawing, no_autocast, training_step, watch_drawing
from src.profiling.counter import PARTS, OpCounter, Tally
from src.profiling.memory import hollow_adapter
from src.profiling.optimizer import model_of, needs_model, prime
from src.profiling.step import watch
from src.profiling.tracker import MemoryEstimate
from src.types import UserError

META = torch.device("meta")


def hollow(cell: Cell) -> Any:
    """The cell's adapter on its backbone, both without data."""
    return hollow_adapter(cell.backbone, cell.make, cell.cfg.hardware.precision)


def estimate(cell: Cell, adapter: Any = None) -> dict[str, Any]:
    """The numbers of a `CostResult`. adapter: from `hollow`, if it is there already."""
    adapter = adapter or hollow(cell)
    counter, condition = OpCounter(cell.rates), 0
    if cell.cfg.what == "inference":
        memory, condition = watch_drawing(Drawing(cell, adapter, META), counter)
    else:
        memory = _training(cell, adapter, counter)
    found = numbers(memory, counter.tally, condition) | {"attention": {"flash"} if counter.tally.attention else set()}
    if cell.rates is not None:
        found |= bounds(counter.tally)
    return found


def _training(cell: Cell, adapter: Any, counter: OpCounter) -> MemoryEstimate:
    """One optimizer step of a run that has made some before."""
    step, node, model = training_step(cell, adapter, META, no_autocast), cell.cfg.optimizer.algorithm, None
    if step.trained and needs_model(node):
        model = model_of(node)
        if model is None:
            raise UserError(
                f"optimizer.algorithm._target_={node['_target_']} cannot be estimated: it runs on a device alone; "
                "write mode=measure, or an optimizer of torch"
            )
    elif step.trained:
        prime(step.optimizer, step.trained)
    if cell.cfg.naive:  # the backbone's gradients are those that an earlier step has left behind
        watch(step, precision=cell.cfg.hardware.precision)
    return watch(step, precision=cell.cfg.hardware.precision, model=model, counter=counter)


def numbers(memory: MemoryEstimate, tally: Tally, condition: int) -> dict[str, Any]:
    """Memory and FLOPs as a row has them."""
    flops = {part: tally.flops[part] for part in PARTS}
    return {
        "peak_mem_gib": memory.peak_gib,
        "peak_when": memory.when,
        "memory_gib": memory.split_gib,
        "saved_gib": memory.saved_gib,
        "phases_gib": memory.phases_gib,
        "flops": flops | {"recomputed": tally.recomputed, "condition": condition},
    }


def bounds(tally: Tally) -> dict[str, Any]:
    """Times that the GPU cannot beat, in ms: with every operand fetched from main memory, as separate kernels do; and by
    arithmetic alone, which fused kernels cannot beat either. No share of the peak is assumed to be reached."""
    return {
        "step_time_ms": {
            "frozen_forward": tally.bound_ms["frozen_forward"],
            "forward": tally.bound_ms["frozen_forward"] + tally.bound_ms["adapter_forward"],
            "backward": tally.bound_ms["backward"],
            "optimizer": tally.bound_ms["optimizer"],
            "total": _sum(tally.bound_ms),
            "bound": True,
        },
        "arithmetic_ms": {part: tally.arithmetic_ms[part] for part in PARTS} | {"total": _sum(tally.arithmetic_ms)},
    }


def _sum(times: Counter[str]) -> float:
    return sum(times[part] for part in PARTS)
