"""What a method is called beside others of the same adapter: by the keys in which their configurations differ."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from src.config import NOT_SCIENCE
from src.report.rows import CostRow, Row

NO_NAME = (*NOT_SCIENCE, "seed", "adapter.name", "adapter._target_", "control_arm", "validation")


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows with a name each. Rows of one name are repetitions with other seeds, or of one seed at another time.

    An adapter that stands there in several forms gets the keys that tell them apart, where the run's config.yaml is beside its
    results; without one, the name of its experiment or of what was evaluated, where that helps.
    """
    return [replace(row, name=name) for row, name in zip(rows, _names(rows), strict=True)]


def cost_names(rows: Sequence[CostRow]) -> list[str]:
    """A name for each cell of a group: its label, and the adapter's own keys where they tell two of one label apart."""
    names = [row.label for row in rows]
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        options = [_flat(rows[i].result.adapter_options) for i in own]
        keys = [key for key in dict.fromkeys(key for o in options for key in o) if len({str(o.get(key)) for o in options}) > 1]
        for i, option in zip(own, options, strict=True):
            names[i] = " ".join([name, *(f"{key}={option[key]}" for key in keys if option.get(key) is not None)])
    return names


def _names(rows: Sequence[Row]) -> list[str]:
    names = [row.result.adapter for row in rows]
    for adapter in dict.fromkeys(names):
        own = [i for i, row in enumerate(rows) if row.result.adapter == adapter]
        configs = [_science(rows[i]) for i in own]
        if all(config is not None for config in configs):
            keys = [key for key in dict.fromkeys(key for c in configs for key in c) if len({c.get(key) for c in configs}) > 1]
            for i, config in zip(own, configs, strict=True):
                names[i] = " ".join([adapter, *(f"{key.removeprefix('adapter.')}={config.get(key)}" for key in keys)])
        elif len({rows[i].result.seed for i in own}) < len(own):
            said = [getattr(rows[i].result, "experiment", "") or getattr(rows[i].result, "subject", "") for i in own]
            words = said if len(set(said)) == len(own) else [rows[i].place for i in own]
            for i, word in zip(own, words, strict=True):
                names[i] = f"{adapter} ({word})"
    return names


def _science(row: Row) -> dict[str, str] | None:
    """Dotted key -> value, as text, of everything that can change a result; None where the run's configuration is gone."""
    file = row.folder / "config.yaml"
    if not file.is_file():
        return None
    flat = _flat(OmegaConf.to_container(OmegaConf.load(file)))
    return {key: str(value) for key, value in flat.items() if not _below(key, NO_NAME)}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, item in node.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def _below(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)
