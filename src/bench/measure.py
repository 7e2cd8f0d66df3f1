"""A cell on a device: peaks by allocator and driver, times by events after a warm-up, bytes by autograd's own storages."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from src import build
from src.bench.estimate import numbers
from src.bench.flags import optimizer_kernel
from src.bench.plan import Cell, low_dtype
from src.bench.work import Drawing, training_step, watch_drawing
from src.construct import construct
from src.profiling.counter import OpCounter
from src.profiling.step import Step, watch
from src.profiling.tracker import GIB
from src.sampling import denoise, solver_for
from src.spread import spread
from src.types import TextCond
from src.vocabulary import EIGHT_BIT

PHASES = ("forward", "backward", "optimizer")


class Clock:
    """Marks in time on a device: CUDA events, which hold up nobody, or the wall clock."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def mark(self) -> Any:
        """Now, as the device gets there."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def between_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two marks that have passed."""
        return first.elapsed_time(second) if self.on_gpu else 1000 * (second - first)


def measure(cell: Cell) -> tuple[dict[str, Any], Any]:
    """-> the numbers of a `CostResult`, and the adapter. Lets torch's out-of-memory errors through."""
    cfg, device = cell.cfg, build.device_of(cell.cfg)
    torch.set_num_threads(cfg.hardware.threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    backbone = cell.backbone.load(device, low_dtype(cfg.hardware.precision))
    adapter = cell.make(backbone).to(device)
    found = (_draw if cfg.what == "inference" else _train)(cell, adapter, device)
    if device.type == "cuda":
        found |= device_memory(device)
        found["peak_mem_gib"] = found["device_memory_gib"]["allocated"]
    return found, adapter


def device_memory(device: torch.device) -> dict[str, Any]:
    """Peaks since they were last reset: what tensors had, what the allocator held for them, what the driver counts on the
    whole device, the CUDA context and other processes included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.max_memory_reserved(device)
    # the driver keeps no peak: what it counts beside the allocator now, and the allocator's own peak
    beside = total - free - torch.cuda.memory_reserved(device)
    peaks = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": reserved, "driver": beside + reserved}
    return {"device_memory_gib": {name: nbytes / GIB for name, nbytes in peaks.items()}}


def _train(cell: Cell, adapter: Any, device: torch.device) -> dict[str, Any]:
    """Steps of training: one that is watched, then those that are timed, with the profile's switches."""
    cfg, clock, counter = cell.cfg, Clock(device), OpCounter()
    step = training_step(cell, adapter, device, _autocast(cfg.hardware.precision, device))
    if cell.trains:
        _run(step)  # gives the optimizer its state
    found = numbers(watch(step, counter=counter), counter.tally, 0) | {"attention": counter.tally.attention}
    if not cfg.floor:
        build.speed_up(cfg, adapter.backbone, adapter)
    for _ in range(cfg.warm_up):
        _run(step)
    _fresh_peak(device, lambda: _run(step))
    rows = []
    for _ in range(cfg.repeats):
        rows.append([clock.mark()])
        for phase in (step.forward, step.backward, step.update):
            phase()
            rows[-1].append(clock.mark())
    clock.wait()
    times = {p: spread([clock.between_ms(r[i], r[i + 1]) for r in rows]) for i, p in enumerate(PHASES)}
    times["total"] = spread([clock.between_ms(r[0], r[-1]) for r in rows])
    return found | {"step_time_ms": times, "img_per_s": 1000 * cfg.batch / times["total"]["median"]}


def _draw(cell: Cell, adapter: Any, device: torch.device) -> dict[str, Any]:
    """Pictures from noise to latent: one step that is watched, then whole pictures that are timed."""
    cfg, clock, counter = cell.cfg, Clock(device), OpCounter()
    adapter.eval()
    drawing = Drawing(cell, adapter, device)
    memory, condition = watch_drawing(drawing, counter)
    found = numbers(memory, counter.tally, condition) | {"attention": counter.tally.attention}
    if not cfg.floor:
        build.speed_up(cfg, adapter.backbone, adapter)
    picture, empty = _picture(cell, drawing), drawing.batch.text[:1]
    for _ in range(max(1, cfg.warm_up // cfg.steps)):
        drawing.encode()
        picture(empty)
    _fresh_peak(device, lambda: picture(empty))
    rows = []
    for _ in range(cfg.repeats):
        rows.append([clock.mark()])
        for part in (drawing.encode, lambda: picture(empty)):
            part()
            rows[-1].append(clock.mark())
    clock.wait()
    once = [clock.between_ms(r[0], r[1]) for r in rows]
    steps = [clock.between_ms(r[1], r[2]) / cfg.steps for r in rows]
    nothing = spread([0.0] * len(rows))
    times = {"forward": spread(steps), "backward": nothing, "optimizer": nothing, "total": spread(steps)}
    latency = latencies(once, steps, cfg.steps)
    return found | {"step_time_ms": times, "latency_ms": latency, "img_per_s": 1000 * cfg.batch / latency["batch"]["median"]}


def latencies(once: Sequence[float], steps: Sequence[float], count: int) -> dict[str, Any]:
    """The `latency_ms` of a row. once: ms of encoding the conditions, of each batch; steps: of a solver step, out of count."""
    whole = [a + count * b for a, b in zip(once, steps, strict=True)]
    return {"condition": spread(once), "step": spread(steps), "batch": spread(whole)}


def _picture(cell: Cell, drawing: Drawing) -> Callable[[TextCond], Tensor]:
    """Draws the batch from its noise with the backbone's own solver, made from its configuration: no file is fetched."""
    import diffusers

    backbone = drawing.adapter.backbone
    kind = getattr(diffusers, backbone.model.config("")["scheduler"][1])
    solver = solver_for(backbone.objective, kind.from_config(backbone.model.config("scheduler")))
    predict, noise, text = drawing.adapter.predictor(), drawing.batch.noise_BCHW, drawing.batch.text

    def draw(empty: TextCond) -> Tensor:
        options = (cell.cfg.steps, text, empty, drawing.features, cell.cfg.guidance)
        return denoise(predict, noise, solver, backbone.objective, *options)

    return draw


def _run(step: Step) -> None:
    step.forward()
    step.backward()
    step.update()


def _fresh_peak(device: torch.device, again: Callable[[], Any]) -> None:
    """Forget what came before: loading, the watched step, a compiler's own. again: one more of what is timed, since the
    allocator has to ask the driver for everything anew."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        again()


def _autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context of the forward pass, as Lightning makes it."""
    dtype = low_dtype(precision)
    return nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)


def kernel_of(cell: Cell) -> str | None:
    """How the optimizer's step is done; None where nothing trains. Imports no package that only a measurement needs."""
    if not cell.trains:
        return None
    node = cell.cfg.optimizer.algorithm
    if node["_target_"] in EIGHT_BIT:
        return node["_target_"].partition(".")[0]
    return optimizer_kernel(construct(node), cell.cfg.hardware.accelerator == "gpu")
