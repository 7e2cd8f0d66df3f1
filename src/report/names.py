"""What a method is called beside others of the same adapter: by the keys in which their configurations differ."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from src.report.rows import CostRow, Row
from src.results.design import flat


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows with a name each. Rows of one name are repetitions with other seeds, or of one seed at another time.

    An adapter that stands there in several forms gets the keys of its designs that tell them apart; where a result has none,
    the name of its experiment or of what was evaluated, where that helps.
    """
    return [replace(row, name=name) for row, name in zip(rows, _names(rows), strict=True)]


def cost_names(rows: Sequence[CostRow]) -> list[str]:
    """A name for each cell of a group: its label, and the adapter's own keys where they tell two of one label apart."""
    names = [row.label for row in rows]
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        options = [flat(rows[i].result.adapter_options) for i in own]
        keys = [key for key in dict.fromkeys(key for o in options for key in o) if len({str(o.get(key)) for o in options}) > 1]
        for i, option in zip(own, options, strict=True):
            names[i] = " ".join([name, *(f"{key}={option[key]}" for key in keys if option.get(key) is not None)])
    return names


def _names(rows: Sequence[Row]) -> list[str]:
    names = [row.result.adapter for row in rows]
    for adapter in dict.fromkeys(names):
        own = [i for i, row in enumerate(rows) if row.result.adapter == adapter]
        designs = [rows[i].result.design for i in own]
        if all(design is not None for design in designs):
            keys = differing(designs)
            for i, design in zip(own, designs, strict=True):
                names[i] = " ".join([adapter, *(f"{key}={said(design.get(key))}" for key in keys)])
        elif len({rows[i].result.seed for i in own}) < len(own):
            told = [getattr(rows[i].result, "experiment", "") or getattr(rows[i].result, "subject", "") for i in own]
            words = told if len(set(told)) == len(own) else [rows[i].place for i in own]
            for i, word in zip(own, words, strict=True):
                names[i] = f"{adapter} ({word})"
    return names


def differing(designs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which they are not all alike. What 1 and 1.0 say is the same."""
    keys = dict.fromkeys(key for design in designs for key in design)
    return [key for key in keys if any(design.get(key) != designs[0].get(key) for design in designs)]


def said(value: Any) -> str:
    """A value of a key as one would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
