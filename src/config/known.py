"""Which adapters and resolutions a backbone refuses, as a list that is read within milliseconds: known.json.

    python -m src.config.known

writes it anew from the classes, and arguments.json of `src.config.arguments` with it; a test holds list and classes equal.
It is there because to ask the classes is to import torch, Lightning and the metrics, which takes ten times as long as the
answer. What the list does not settle, such as options that are not those of the yaml files, is left to the classes.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import LIST as ARGUMENTS
from src.config.arguments import row_of
from src.config.compose import CONF
from src.config.messages import ConfigError, Gather, Incompatible, Unsupported
from src.config.nodes import node_of
from src.config.signatures import asked, locate
from src.vocabulary import resolution_fault

LIST = Path(__file__).with_suffix(".json")


def refuse_listed(cfg: DictConfig, choices: Mapping[str, Any], pair: bool = True) -> None:
    """Refuse what the list rules out, with all there is to say of it. Raises ConfigError; Unsupported where it is the pair of
    adapter and backbone alone. choices: which yaml of each group it has; pair: whether the adapter works on the backbone."""
    gather, backbone = Gather(), str(choices["backbone"])
    if _as_in_yaml(cfg, "backbone", backbone):
        known = json.loads(LIST.read_text(encoding="utf-8"))
        if pair:
            gather(_check_pair, cfg, str(choices["adapter"]), backbone, known["pairs"])
        gather(_check_side, cfg, known["sides"].get(backbone))
    gather.done()


def _check_pair(cfg: DictConfig, adapter: str, backbone: str, pairs: Mapping[str, Any]) -> None:
    fault = pairs.get(adapter, {}).get(backbone)
    if fault and _as_in_yaml(cfg, "adapter", adapter):
        raise Unsupported(fault)


def _check_side(cfg: DictConfig, given: Sequence[Any] | None) -> None:
    if given and (fault := resolution_fault("resolution", cfg.resolution, *given)):
        raise ConfigError(fault)


def _as_in_yaml(cfg: DictConfig, group: str, name: str) -> bool:
    """Whether a node says what the yaml of this name says, so that the list is about it."""
    known = (CONF / group / f"{name}.yaml").is_file()  # a folder of --config-dir may have others
    return known and node_of(group, name) == OmegaConf.to_container(cfg[group], resolve=False)


def list_of_classes() -> dict[str, Any]:
    """The list, from the classes. pairs: adapter -> backbone -> the refusal; sides: backbone -> the arguments of
    `resolution_fault` after the side."""
    from src.support import facts_of, options, unsupported

    facts = {name: facts_of(name) for name in options("backbone")}
    pairs = {a: {b: unsupported(node_of("adapter", a), b, known) for b, known in facts.items()} for a in options("adapter")}
    refused = {a: {b: fault for b, fault in row.items() if fault} for a, row in pairs.items()}
    sides = {b: (known.multiple, known.largest, known.source) for b, known in facts.items()}
    return {"pairs": {a: row for a, row in refused.items() if row}, "sides": sides}


def list_of_arguments() -> dict[str, Any]:
    """The list of src/config/arguments.py, of the classes that conf/ names and whose packages are here."""
    found = {target: _class_of(target) for target in targets_of_conf()}
    return {target: row_of(cls, asked(cls)) for target, cls in found.items() if cls is not None}


def _class_of(target: str) -> Any:
    try:
        return locate(target, "conf", lambda _: "conf")
    except Incompatible:
        return None


def targets_of_conf() -> list[str]:
    """Every `_target_` of the yaml files, apart from Hydra's own."""
    files = [file for file in CONF.rglob("*.yaml") if file.relative_to(CONF).parts[0] != "hydra"]
    trees = (OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files)
    return sorted({target for tree in trees for target in _targets(tree)})


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for child in node.values():
            yield from _targets(child)


if __name__ == "__main__":
    if len(sys.argv) != 1:
        raise SystemExit("error: python -m src.config.known takes no words")
    LIST.write_text(json.dumps(list_of_classes(), indent=1) + "\n", encoding="utf-8")
    rows = (f"{json.dumps(target)}: {json.dumps(row)}" for target, row in list_of_arguments().items())
    ARGUMENTS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"wrote {LIST} and {ARGUMENTS}")
