"""One cell from its configuration to its row: plan, estimate, measure if asked, write, say."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from src import build
from src.bench.estimate import estimate, hollow
from src.bench.flags import flags
from src.bench.measure import kernel_of, measure
from src.bench.plan import Cell, low_dtype, plan
from src.bench.words import lines
from src.profiling.device import device_name as name_of_device
from src.results import CostResult, dated_origin, write_cost
from src.runs import new_run
from src.sampling import is_out_of_memory
from src.support import NOT_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_MEMORY = 3  # exit code
NOTHING = dict.fromkeys(
    ("peak_mem_gib", "peak_when", "memory_gib", "saved_gib", "phases_gib", "device_memory_gib", "flops", "step_time_ms",
     "arithmetic_ms", "img_per_s", "mfu", "latency_ms")
)  # fmt: skip


@dataclass
class OutOfMemory(Exception):
    """A measurement that did not fit; its row is written."""

    folder: Path
    message: str

    def report(self) -> int:
        """Say it. -> the exit code."""
        print(f"error: {self.message}", file=sys.stderr, flush=True)
        print(f"run: {self.folder}", flush=True)
        return OUT_OF_MEMORY


def run(cfg: DictConfig) -> Path:
    """Do one cell. -> its folder. Raises UserError for what cannot be, and OutOfMemory."""
    build.quiet()
    cell = plan(cfg, _say)
    adapter = hollow(cell)
    told = estimate(cell, adapter)
    if cfg.mode == "estimate":
        return _write(cell, row(cell, adapter, told))
    size = sizes(adapter)
    predicted = {k: told.get(k) for k in ("peak_mem_gib", "peak_when", "memory_gib", "step_time_ms", "arithmetic_ms")}
    try:
        found, adapter = measure(cell)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result = row(cell, None, NOTHING | {"attention": ()}, predicted, "oom", size)
        estimated = f"estimated {told['peak_mem_gib']:.1f} GiB at the peak, in the {told['peak_when']}"
        line = f"out of memory: {first_line(error)} ({estimated})"
        raise OutOfMemory(_write(cell, result, ended=False), line) from error
    return _write(cell, row(cell, adapter, found, predicted))


def first_line(error: BaseException) -> str:
    """What an exception says, in a line; its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def row(
    cell: Cell,
    adapter: Any,
    found: dict[str, Any],
    predicted: dict[str, Any] | None = None,
    status: str = "done",
    size: tuple[float, dict[str, float]] | None = None,
) -> CostResult:
    """The row of a cell. found: its numbers; size: of networks that did not come to be."""
    cfg, facts = cell.cfg, cell.backbone.facts
    frozen, parts = size or sizes(adapter)
    measured, inference = cfg.mode == "measure", cfg.what == "inference"
    guided = cfg.batch * (1 if cfg.guidance == 1 else 2)
    found = dict(found)
    attention = found.pop("attention")
    return CostResult(
        **(NOTHING | found | {"mfu": mfu(cell, found) if measured and status == "done" else None}),
        mode=cfg.mode,
        what=cfg.what,
        status=status,
        adapter="none" if cfg.floor else cfg.adapter.name,
        adapter_options={} if cfg.floor else _options(cfg),
        backbone={"name": cfg.backbone.name, "id": facts.source, "revision": facts.revision},
        hardware=cfg.hardware.name,
        device=device_name(cfg),
        resolution=cfg.resolution,
        batch=cfg.batch,
        precision=cfg.hardware.precision,
        trainable_m=sum(parts.values()),
        frozen_m=frozen,
        trainable_parts_m=parts,
        sampling={"steps": cfg.steps, "guidance": cfg.guidance, "batch": guided} if inference else None,
        rates=OmegaConf.to_container(cfg.hardware.rates, resolve=True) if cell.rates else None,
        predicted=predicted,
        flags=flags(cfg, kernel_of(cell), attention),
        seed=cfg.seed,
        **dated_origin(ROOT),
    )


def sizes(adapter: Any) -> tuple[float, dict[str, float]]:
    """Millions of the backbone's parameters, and of the trained ones by part."""
    return sum(p.numel() for p in adapter.backbone.net.parameters()) / 1e6, adapter.trainable_parts_m()


def device_name(cfg: DictConfig) -> str:
    """Where the numbers come from."""
    if cfg.mode == "estimate":
        return "none: tensors without data"
    return name_of_device(cfg.hardware.accelerator == "gpu")


def mfu(cell: Cell, found: dict[str, Any]) -> float | None:
    """Share of the GPU's dense peak that forward and backward reach in the whole step, by FLOPs without recomputation.

    None where there are no rates of this device.
    """
    if cell.rates is None:
        return None
    flops = found["flops"]
    useful = flops["frozen_forward"] + flops["adapter_forward"] + flops["backward"] - flops["recomputed"]
    return useful / (found["step_time_ms"]["total"]["median"] * cell.rates.per_ms(low_dtype(cell.cfg.hardware.precision)))


def _options(cfg: DictConfig) -> dict[str, Any]:
    return {k: v for k, v in OmegaConf.to_container(cfg.adapter, resolve=True).items() if k not in NOT_OPTIONS}


def _write(cell: Cell, result: CostResult, ended: bool = True) -> Path:
    folder = new_run(cell.cfg).folder
    write_cost(folder / "results.json", result)
    if cell.cfg.logger.name != "local":
        from src.loggers.results import log_result  # Lightning comes with it

        log_result(cell.cfg.logger, folder, cell.cfg.name, OmegaConf.to_container(cell.cfg, resolve=True), result)
    for line in lines(result):
        _say(line)
    if ended:
        _say(f"run: {folder}")
    return folder


def _say(line: str) -> None:
    print(line, flush=True)
