"""Arguments of the classes that conf/ names, as a list that is read without importing them: arguments.json.

It is there because a misspelt key is told with the nearest right one, and to ask the classes for theirs is to import torch
and diffusers. A class whose constructor is not the one that was listed is asked itself, so an old list costs time and gives
no wrong answer. `python -m src.config.known` writes it anew; a test holds it equal to the classes.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

LIST = Path(__file__).with_suffix(".json")
WORDS = {cls.__name__: cls for cls in (bool, int, float, str, Path, dict)} | {"Any": Any, "None": type(None)}


# ---- reading ----------------------------------------------------------------------------------------------------------


@cache
def listed(target: str) -> dict[str, Any] | None:
    """What the list says of a `_target_`, with annotations as they were; None if that is not sure to be true.

    arguments: name -> (annotation, whether it is required); injected: what the class names itself; open: takes any keyword.
    """
    row = _rows().get(target)
    if row is None or any(mark is None or _mark(name) != mark for name, mark in row["of"].items()):
        return None
    return row | {"arguments": {name: (_hint(told), needed) for name, (told, needed) in row["arguments"].items()}}


@cache
def _rows() -> dict[str, Any]:
    return json.loads(LIST.read_text(encoding="utf-8"))


def _mark(name: str) -> str | None:
    """What is another once the arguments of a class may be: a hash of its bases and its constructor. None if it is not here."""
    module, _, cls = name.rpartition(".")
    found = next((node for node in _classes(module) if node.name == cls), None)
    if found is None:
        return None
    own = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    given = (node for node in found.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "injected")
    text = [*map(ast.unparse, found.bases), *(ast.unparse(node.args) for node in own), *map(ast.unparse, given)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


@cache
def _classes(module: str) -> tuple[ast.ClassDef, ...]:
    """Those of a module's file, which is found without an import of its package."""
    package, *below = module.split(".")
    spec = importlib.util.find_spec(package)
    files = [Path(place, *below).with_suffix(".py") for place in (spec and spec.submodule_search_locations) or ()]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return tuple(node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))


def _hint(told: Any) -> Any:
    """An annotation from how `_told` wrote it."""
    if isinstance(told, str):
        return WORDS[told]
    kind, *inner = told
    if kind == "Literal":
        return Literal[tuple(inner)]
    if kind == "class":  # stands for one that cannot be written in yaml
        return type(inner[1], (), {"__module__": inner[0]})
    args = tuple(... if one == "..." else _hint(one) for one in inner)
    return {"Union": Union, "tuple": tuple, "list": list, "dict": dict}[kind][args]


# ---- writing ----------------------------------------------------------------------------------------------------------


def row_of(cls: type, known: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the list. known: what the class itself says, like `listed`."""
    package = cls.__module__.partition(".")[0]
    made_of = [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__ if base.__module__.startswith(f"{package}.")]
    return {
        "of": {name: _mark(name) for name in made_of},
        "arguments": {name: [_told(hint), needed] for name, (hint, needed) in known["arguments"].items()},
        "injected": sorted(known["injected"]),
        "open": known["open"],
    }


def _told(hint: Any) -> Any:
    """An annotation as JSON that `_hint` reads."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if (word := next((word for word, plain in WORDS.items() if hint is plain), None)) is not None:
        return word
    if origin is Literal:
        return ["Literal", *args]
    if origin in (Union, types.UnionType, tuple, list, dict):
        kind = "Union" if origin in (Union, types.UnionType) else origin.__name__
        return [kind, *("..." if one is ... else _told(one) for one in args)]
    return ["class", hint.__module__, hint.__name__] if inspect.isclass(hint) else "Any"
