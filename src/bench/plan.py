"""A cell before anything runs: what the configuration names, refused where it cannot be, without a weight or a download."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from src import build
from src.backbones.base import Backbone
from src.backbones.source import SHAPES, ModelSource
from src.bench.floor import Floor
from src.bench.known import check_switches
from src.config import CONF, resolve_hardware
from src.config.profiles import is_gpu
from src.construct import construct
from src.matching import matched
from src.objectives import TIME_LAWS
from src.profiling.counter import Rates
from src.profiling.device import device_name
from src.support import check_cell
from src.types import UserError


@dataclass
class Cell:
    """cfg: resolved, with `adapter.params_match` decided; backbone: its facts, without weights; rates: of the GPU that bounds
    are for, or None. make: an adapter on a backbone, loaded or without data; the backbone alone for the floor."""

    cfg: DictConfig
    backbone: Backbone
    rates: Rates | None

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.cfg.what == "training" and not self.cfg.floor

    def make(self, backbone: Backbone) -> Any:
        adapter = Floor(backbone) if self.cfg.floor else build.new_adapter(self.cfg, backbone, training=False)
        if self.cfg.naive:
            backbone.net.requires_grad_(True)  # which would train nothing, for no optimizer is given these weights
        return adapter


def plan(cfg: DictConfig, say: Callable[[str], None]) -> Cell:
    """Check a composed configuration as far as that is possible without a weight. Raises UserError.

    say: takes one line per decision. In an estimate the profile need not fit this machine; a measurement has no use for the
    rates of another one.
    """
    cfg = cfg.copy()
    if cfg.mode == "measure" or cfg.hardware.accelerator == "auto":
        cfg = resolve_hardware(cfg)
    check_switches(cfg)
    with open_dict(cfg):
        cfg.time_law = TIME_LAWS[0]  # costs nothing, and an adapter asks for it
        cfg.backbone.source = shape_of(cfg.backbone, say)
    backbone = construct(cfg.backbone, resolution=cfg.resolution)
    if not cfg.floor:
        check_cell(cfg, backbone)
        cfg, chosen = matched(cfg, backbone)
        if chosen:
            say(chosen)
    return Cell(cfg, backbone, _rates_here(cfg, say))


def _rates_here(cfg: DictConfig, say: Callable[[str], None]) -> Rates | None:
    """What a cell's times may be held against: of a measurement, the rates of the device that it is taken on."""
    rates = rates_of(cfg.hardware)
    if rates is None or cfg.mode != "measure":
        return rates
    here = device_name(cfg.hardware.accelerator == "gpu")
    if is_gpu(here, rates.gpu):
        return rates
    say(f"hardware={cfg.hardware.name} has the rates of {rates.gpu}, and this is {here}: no bound on time, no MFU")
    return None


def shape_of(node: DictConfig, say: Callable[[str], None]) -> str:
    """The source to read the network's shape from: that of a public model is known here, and costs no download.

    What ships with the project, a folder, and another model than the one that the name stands for stay as they are.
    """
    model, known = ModelSource(node.source), json.loads(SHAPES.read_text())
    public = OmegaConf.load(CONF / "backbone" / f"{node.name}.yaml") if node.name in known else None
    if model.random or model.embedded or public is None or public.source != node.source or Path(node.source).is_dir():
        return node.source
    say(f"backbone={node.name}: the shape of {node.source} with random weights; cost does not depend on them")
    return f"random:{node.name}"


def rates_of(hardware: DictConfig) -> Rates | None:
    """The rates of a profile under torch's present TF32 switches; None where it names none."""
    if not hardware.rates:
        return None
    from src.bench.flags import tf32

    given = OmegaConf.to_container(hardware.rates, resolve=True)
    missing = [key for key in ("gpu", "tflops", "bandwidth_gb_s") if not given.get(key)]
    if missing:
        raise UserError(f"hardware.rates has no {missing[0]}: give gpu, tflops and bandwidth_gb_s, or hardware.rates={{}}")
    return Rates(given["gpu"], given["tflops"], given["bandwidth_gb_s"], *tf32())


def low_dtype(precision: str) -> torch.dtype:
    """What products are computed in at a precision, as Lightning names it."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
