"""The result of one cell of `python -m src.bench`: what a method costs on a backbone, estimated or measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.results.checks import (
    SCHEMA_VERSION,
    ResultError,
    all_finite,
    date,
    filled,
    mapping,
    number,
    one_of,
    quartiles,
    text,
    truth,
)  # fmt: skip
from src.results.files import read_row, write_row

MEMORY = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "ema", "activations", "temporaries")
FLOPS = ("frozen_forward", "adapter_forward", "backward", "optimizer")
PHASES = ("forward", "backward", "optimizer", "total")
LATENCY = ("condition", "step", "batch")  # of drawing pictures
# without these a time or a peak says nothing; rows also carry `overlap`, which is false in each: a cell cannot have it
FLAGS = (
    "precision", "attention", "attention_enabled", "compile", "cuda_graphs", "checkpointing", "optimizer", "optimizer_kernel",
    "tf32_matmul", "tf32_conv", "cudnn_benchmark", "cudnn_deterministic", "channels_last", "micro_batch", "threads", "naive",
    "quantize", "clip_norm",
)  # fmt: skip


@dataclass
class CostResult:
    """One cell. Memory in GiB, times in milliseconds, sizes in millions of parameters; None only where "or None" is said.

    mode: estimate (on tensors without data) or measure; what: training (one optimizer step) or inference (one denoising
    step of a guided batch); status: done, or oom, where nothing was measured. adapter: "none" for the floor, the frozen
    backbone alone. adapter_options: the method's own keys; backbone: {name, id, revision}.
    peak_mem_gib: the sum of `memory_gib` in an estimate and on a CPU, the allocator's largest total on a GPU; peak_when:
    the phase of the peak; saved_gib: activations at the end of the forward pass; phases_gib: the peak of each phase;
    device_memory_gib: {allocated, reserved, driver} of a GPU, or None.
    flops: {frozen_forward, adapter_forward, backward, optimizer} and recomputed, the part of backward that repeats a forward
    pass, and condition, what is computed once per image and not in each denoising step (see src/profiling/counter.py).
    step_time_ms: {forward, backward, optimizer, total}, each {median, quartiles, n} when measured; in an estimate plain
    numbers with frozen_forward (a part of forward) and "bound": true, or None where the GPU's rates are unknown.
    arithmetic_ms: the same from FLOPs alone, by the parts of `flops` and total, or None.
    latency_ms: of inference {condition, step, batch}, or None: of encoding the conditions of a batch, of one solver step, and
    until all pictures of the batch are there, which is when its first one is, too; img_per_s: pictures of a batch over that
    time. sampling: of inference {steps, guidance, batch}, or None.
    rates: {gpu, tflops, bandwidth_gb_s} that bounds and mfu are for, or None; mfu: FLOPs of forward and backward without
    what is recomputed, over the measured step and the dense rate; predicted: the estimate beside a measurement, of the step
    without the flags compile, cuda_graphs and channels_last, or None.
    """

    mode: str
    what: str
    status: str
    adapter: str
    adapter_options: dict[str, Any]
    backbone: dict[str, str]
    hardware: str
    device: str
    resolution: int
    batch: int
    precision: str
    trainable_m: float
    frozen_m: float
    trainable_parts_m: dict[str, float]
    peak_mem_gib: float | None
    peak_when: str | None
    memory_gib: dict[str, float] | None
    saved_gib: float | None
    phases_gib: dict[str, float] | None
    device_memory_gib: dict[str, float] | None
    flops: dict[str, int] | None
    step_time_ms: dict[str, Any] | None
    arithmetic_ms: dict[str, float] | None
    img_per_s: float | None
    mfu: float | None
    latency_ms: dict[str, Any] | None
    sampling: dict[str, float] | None
    rates: dict[str, Any] | None
    predicted: dict[str, Any] | None
    flags: dict[str, Any]
    seed: int
    git_sha: str
    versions: dict[str, str]
    date: str
    command: str
    git_dirty: bool | None = None
    kind: str = "cost"
    schema_version: int = SCHEMA_VERSION


def write_cost(path: str | Path, result: CostResult | Mapping[str, Any]) -> None:
    """Check a cost and put it at `path`; see `write_row`. Raises ResultError."""
    write_row(path, result, check_cost)


def read_cost(path: str | Path) -> CostResult:
    """Read and check the results.json of a cell. Raises ResultError naming the file and the field."""
    return read_row(path, check_cost)


def check_cost(raw: Mapping[str, Any]) -> CostResult:
    """A mapping -> CostResult with plain Python numbers. Raises ResultError."""
    cost = filled(CostResult, raw)
    one_of("mode", cost.mode, ("estimate", "measure"))
    one_of("what", cost.what, ("training", "inference"))
    one_of("status", cost.status, ("done", "oom"))
    for name in ("adapter", "hardware", "device", "precision", "git_sha", "command"):
        text(name, getattr(cost, name))
    for name in ("name", "id", "revision"):
        text(f"backbone.{name}", mapping("backbone", cost.backbone).get(name))
    for name, least in {"seed": 0, "resolution": 1, "batch": 1}.items():
        number(name, getattr(cost, name), least, whole=True)
    for name in ("trainable_m", "frozen_m"):
        number(name, getattr(cost, name), 0)
    for name, value in mapping("trainable_parts_m", cost.trainable_parts_m).items():
        number(f"trainable_parts_m.{name}", value, 0)
    for name, value in mapping("versions", cost.versions, empty=False).items():
        text(f"versions.{name}", value)
    all_finite("adapter_options", mapping("adapter_options", cost.adapter_options))
    _flags(cost)
    truth("git_dirty", cost.git_dirty, unknown=True)
    date("date", cost.date)
    _numbers(cost)
    return cost


def _flags(cost: CostResult) -> None:
    mapping("flags", cost.flags, empty=False)
    for name in FLAGS:
        if name not in cost.flags:
            raise ResultError(f"flags.{name} is missing: a cost without its conditions is refused")
    all_finite("flags", cost.flags)
    for name, same in {"precision": cost.precision, "micro_batch": cost.batch}.items():
        if cost.flags[name] != same:
            raise ResultError(f"flags.{name} is {cost.flags[name]!r}, and the row says {same!r}")


def _numbers(cost: CostResult) -> None:
    """What was found: all of it, or nothing where memory ran out."""
    found = ("peak_mem_gib", "peak_when", "memory_gib", "saved_gib", "phases_gib", "flops")
    if cost.status == "oom":
        for name in (*found, "device_memory_gib", "step_time_ms", "img_per_s", "mfu", "latency_ms"):
            if getattr(cost, name) is not None:
                raise ResultError(f"{name} is {getattr(cost, name)!r}, and status is oom: nothing was measured")
    else:
        number("peak_mem_gib", cost.peak_mem_gib, 0)
        one_of("peak_when", cost.peak_when, PHASES[:-1])
        _whole("memory_gib", cost.memory_gib, MEMORY)
        if cost.device_memory_gib is None and abs(sum(cost.memory_gib.values()) - cost.peak_mem_gib) > 1e-6 * cost.peak_mem_gib:
            raise ResultError(f"memory_gib adds up to {sum(cost.memory_gib.values())}, and peak_mem_gib is {cost.peak_mem_gib}")
        number("saved_gib", cost.saved_gib, 0)
        _whole("phases_gib", cost.phases_gib, ())
        _whole("flops", cost.flops, (*FLOPS, "recomputed", "condition"))
        _times(cost)
    for name in ("device_memory_gib", "arithmetic_ms", "sampling"):
        if getattr(cost, name) is not None:
            _whole(name, getattr(cost, name), ())
    for name in ("rates", "predicted"):
        all_finite(name, mapping(name, getattr(cost, name) or {}))
    for name in ("img_per_s", "mfu"):
        if getattr(cost, name) is not None:
            number(name, getattr(cost, name), 0)
    if (cost.what == "inference") != (cost.sampling is not None):
        raise ResultError(f"sampling is {cost.sampling!r}, and what is {cost.what}")
    if (cost.what, cost.mode, cost.status) == ("inference", "measure", "done"):
        for name in LATENCY:
            if name not in (cost.latency_ms or {}):
                raise ResultError(f"latency_ms.{name} is missing: pictures were drawn, and that takes time")


def _times(cost: CostResult) -> None:
    """Measured times have their spread; bounds say that they are bounds."""
    if cost.step_time_ms is None:
        if cost.mode == "measure":
            raise ResultError("step_time_ms is missing: a measurement has times")
        return
    times = dict(mapping("step_time_ms", cost.step_time_ms))
    bound = times.pop("bound", False)
    if bound is not (cost.mode == "estimate"):
        raise ResultError(f"step_time_ms.bound is {bound!r}, and mode is {cost.mode}")
    for name in PHASES:
        if name not in times:
            raise ResultError(f"step_time_ms.{name} is missing")
    for where, entries in {"step_time_ms": times, "latency_ms": cost.latency_ms or {}}.items():
        for name, entry in mapping(where, entries).items():
            if bound:
                number(f"{where}.{name}", entry, 0)
            else:
                _spread(f"{where}.{name}", entry)


def _spread(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"median", "quartiles", "n"}:
        raise ResultError(f"{name} is {entry!r}, wanted {{median, quartiles, n}}: a measured time carries its spread")
    number(f"{name}.n", entry["n"], 1, whole=True)
    quartiles(f"{name}.quartiles", entry["quartiles"], number(f"{name}.median", entry["median"], 0))


def _whole(name: str, value: Any, wanted: tuple[str, ...]) -> None:
    """A mapping of numbers that has at least the names that are wanted."""
    for key in wanted:
        if key not in mapping(name, value):
            raise ResultError(f"{name}.{key} is missing")
    for key, item in mapping(name, value, empty=False).items():
        number(f"{name}.{key}", item, 0)
