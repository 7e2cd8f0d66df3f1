"""A cost row for reading."""

from collections.abc import Iterator
from typing import Any

from src.results import CostResult


def lines(row: CostResult) -> Iterator[str]:
    """What was found, in a few lines."""
    what = "the floor" if row.adapter == "none" else f"trainable {row.trainable_m:.2f} M"
    size = f"{row.resolution} px, batch {row.batch}, {row.precision}, checkpointing {row.flags['checkpointing']}"
    naive = ", backbone NOT frozen" if row.flags["naive"] else ""
    yield f"{row.what} of {row.adapter} on {row.backbone['name']}: frozen {row.frozen_m:.2f} M, {what}; {size}{naive}"
    if row.status != "done":
        yield "out of memory: nothing was measured"
    else:
        yield from _found(row)
    if row.predicted and row.predicted["peak_mem_gib"] is not None:
        yield f"estimated: peak {row.predicted['peak_mem_gib']:.3f} GiB in the {row.predicted['peak_when']}"


def _found(row: CostResult) -> Iterator[str]:
    split = ", ".join(f"{name.replace('_', ' ')} {gib:.3f}" for name, gib in row.memory_gib.items() if gib)
    yield f"peak {row.peak_mem_gib:.3f} GiB in the {row.peak_when} ({split})"
    if row.device_memory_gib:
        yield "GPU memory in GiB: " + ", ".join(f"{name} {gib:.3f}" for name, gib in row.device_memory_gib.items())
    flops = ", ".join(f"{name.replace('_', ' ')} {_tera(n)}" for name, n in row.flops.items() if n)
    yield f"TFLOP: {flops}"
    if row.step_time_ms is None:
        yield f"no bound on time: hardware={row.hardware} has no rates of a GPU"
    elif row.mode == "estimate":
        times = ", ".join(f"{name} {row.step_time_ms[name]:.1f}" for name in ("forward", "backward", "optimizer"))
        arithmetic = f"arithmetic alone {row.arithmetic_ms['total']:.1f}"
        total = f"{row.step_time_ms['total']:.1f} ms"
        yield f"bound: {row.rates['gpu']} takes no less than {total} with separate kernels ({times}); {arithmetic}"
    else:
        times = ", ".join(f"{name} {_ms(row.step_time_ms[name])}" for name in ("forward", "backward", "optimizer", "total"))
        yield f"ms per step, median [quartiles]: {times}; {row.img_per_s:.2f} images/s"
        if row.latency_ms:
            names = {"condition": "conditions", "step": "step", "batch": f"all {row.batch} pictures"}
            yield "latency in ms: " + ", ".join(f"{names.get(name, name)} {_ms(t)}" for name, t in row.latency_ms.items())
        if row.mfu is not None:
            yield f"MFU {row.mfu:.1%} of {row.rates['gpu']}'s dense {row.precision}"
    if row.sampling:
        yield f"{row.sampling['steps']} steps at guidance {row.sampling['guidance']:g}: {row.sampling['batch']} at once"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.4g}"


def _ms(time: dict[str, Any]) -> str:
    return f"{time['median']:.2f} [{time['quartiles'][0]:.2f}, {time['quartiles'][1]:.2f}]"
