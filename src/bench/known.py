"""What a cell is refused for by its words alone: switches, and the pairs and resolutions that are listed in known.json.

    python -m src.bench.known

writes the list anew from the classes; a test holds the two equal. It is there because to ask the classes is to import torch,
Lightning and the metrics, which takes ten times as long as the answer. What the list does not settle is left to `plan`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import CONF, ConfigError, Unsupported
from src.config.messages import Gather
from src.vocabulary import resolution_fault

LIST = Path(__file__).with_suffix(".json")


def refuse_known(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Refuse a cell that the list or its switches rule out, with all there is to say of it. Raises ConfigError; Unsupported
    where it is the pair of adapter and backbone alone. choices: which yaml of each group it has."""
    gather, backbone = Gather(), str(choices["backbone"])
    gather(check_switches, cfg)
    if _as_in_yaml(cfg, "backbone", backbone):
        known = json.loads(LIST.read_text(encoding="utf-8"))
        gather(_check_pair, cfg, str(choices["adapter"]), backbone, known["pairs"])
        gather(_check_side, cfg, known["sides"].get(backbone))
    gather.done()


def _check_pair(cfg: DictConfig, adapter: str, backbone: str, pairs: Mapping[str, Any]) -> None:
    fault = pairs.get(adapter, {}).get(backbone)
    if fault and not cfg.floor and _as_in_yaml(cfg, "adapter", adapter):
        raise Unsupported(fault)


def _check_side(cfg: DictConfig, given: Sequence[Any] | None) -> None:
    if given and (fault := resolution_fault("resolution", cfg.resolution, *given)):
        raise ConfigError(fault)


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


def _as_in_yaml(cfg: DictConfig, group: str, name: str) -> bool:
    """Whether a node says what the yaml of this name says, so that the list is about it."""
    file = CONF / group / f"{name}.yaml"
    return file.is_file() and OmegaConf.load(file) == OmegaConf.create(OmegaConf.to_container(cfg[group], resolve=False))


def list_of_classes() -> dict[str, Any]:
    """The list, from the classes. pairs: adapter -> backbone -> the refusal; sides: backbone -> the arguments of
    `resolution_fault` after the side."""
    from src.support import facts_of, node_of, options, unsupported

    facts = {name: facts_of(name) for name in options("backbone")}
    pairs = {a: {b: unsupported(node_of("adapter", a), b, known) for b, known in facts.items()} for a in options("adapter")}
    refused = {a: {b: fault for b, fault in row.items() if fault} for a, row in pairs.items()}
    sides = {b: (known.multiple, known.largest, known.source) for b, known in facts.items()}
    return {"pairs": {a: row for a, row in refused.items() if row}, "sides": sides}


if __name__ == "__main__":
    if len(sys.argv) != 1:
        raise SystemExit("error: python -m src.bench.known takes no words")
    LIST.write_text(json.dumps(list_of_classes(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {LIST}")
