"""What a cell is refused for by its words alone: switches, and pairs and resolutions that are listed."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from src.config.known import refuse_listed
from src.config.messages import ConfigError, Gather


def refuse_known(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Refuse a cell that its switches or the list rule out, with all there is to say of it. Raises ConfigError; Unsupported
    where it is the pair of adapter and backbone alone. choices: which yaml of each group it has."""
    gather = Gather()
    gather(check_switches, cfg)
    gather(refuse_listed, cfg, choices, not cfg.floor)
    gather.done()


def check_switches(cfg: DictConfig) -> None:
    """Refuse what no cell is made of: several devices, and switches that its numbers would carry in their flags and know
    nothing of. Raises ConfigError."""
    hardware = cfg.hardware
    if hardware.devices not in (None, 1):  # None: of hardware=auto, before it has been asked
        raise ConfigError(f"hardware.devices={hardware.devices}: one device works on a cell; write hardware.devices=1")
    if cfg.naive and (cfg.floor or cfg.what != "training"):
        raise ConfigError("naive=true leaves gradients on in a training's backbone; write what=training floor=false with it")
    if hardware.overlap:
        fault = "a cell is a step by itself, and has no next pass to make ahead"
        raise ConfigError(f"hardware.overlap=true: {fault}; python -m src.bench.speed overlap measures it")
    still = {"compile": "none", "channels_last": False}
    moved = [key for key, value in still.items() if hardware[key] not in (value, None)]
    if cfg.mode == "estimate" and moved:
        key, fault = moved[0], "an estimate counts operations as they stand in the code, one kernel each"
        typed = str(hardware[key]).lower()
        fix = f"write mode=measure, or hardware.{key}={str(still[key]).lower()}"
        raise ConfigError(f"hardware.{key}={typed}: {fault}; {fix}")
