"""What a cell is refused for by its words alone: pairs of adapter and backbone, and resolutions, listed in known.json.

    python -m src.bench.known

writes the list anew from the classes; a test holds the two equal. It is there because to ask the classes is to import torch,
Lightning and the metrics, which takes ten times as long as the answer. What the list does not settle is left to `plan`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import CONF, ConfigError, Unsupported
from src.config.messages import listed
from src.vocabulary import resolution_fault

LIST = Path(__file__).with_suffix(".json")


def refuse_known(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Refuse a cell that the list says cannot be, with all that it says. choices: which yaml of each group it has.

    Raises Unsupported for a pair, ConfigError for a resolution."""
    known, adapter, backbone = json.loads(LIST.read_text(encoding="utf-8")), str(choices["adapter"]), str(choices["backbone"])
    if backbone not in known["sides"] or not _as_in_yaml(cfg, "backbone", backbone):
        return
    about = not cfg.floor and _as_in_yaml(cfg, "adapter", adapter)
    pair = known["pairs"].get(adapter, {}).get(backbone) if about else None
    faults = [one for one in (pair, resolution_fault("resolution", cfg.resolution, *known["sides"][backbone])) if one]
    if faults:
        raise (Unsupported if pair else ConfigError)(listed(faults))


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
