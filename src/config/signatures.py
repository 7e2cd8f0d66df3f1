"""Nodes with a `_target_` have no schema of their own: the signature of the class they name is the schema."""

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from src.config.arguments import listed
from src.config.messages import ConfigError, Incompatible, Where, key_is, nearest

# Constructor arguments that src/build.py fills in, by group; a class may name more in a tuple attribute `injected`.
INJECTED: dict[str, set[str]] = {
    "adapter": {"backbone", "objective", "optimizer", "checkpointing"},
    "backbone": {"resolution"},
    "data": {"resolution", "split"},
    "optimizer.algorithm": {"params"},
}
# Keys beside the constructor's arguments that the program reads itself, by group, with their types.
BESIDE: dict[str, dict[str, Any]] = {"adapter": {"params_match": float | str | None}}
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}


@dataclasses.dataclass(frozen=True)
class Signature:
    """Arguments that yaml may give to a `_target_`. open: the target takes any keyword; injected: what build.py gives."""

    hints: dict[str, Any]
    required: set[str]
    injected: set[str]
    open: bool


def locate(target: Any, key: str, where: Where) -> Any:
    """Import the class or function named by a `_target_`; ConfigError if there is none."""
    module, _, name = str(target).rpartition(".")
    place = where(f"{key}._target_")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as exc:
        if exc.name and not f"{module}.".startswith(f"{exc.name}."):
            raise ConfigError(key_is(place, f"{key}._target_", target, f"needs a package: pip install {exc.name}")) from exc
        if exc.name and "." not in exc.name and exc.name != "src":
            raise Incompatible(key_is(place, f"{key}._target_", target, f"is not here: pip install {exc.name}")) from exc
        folder = Path(__file__).parents[2].joinpath(*module.split(".")[:-1])
        known = [f"{module.rpartition('.')[0]}.{p.stem}.{name}" for p in folder.glob("[a-z]*.py")]
        raise ConfigError(key_is(place, f"{key}._target_", target, f"does not exist{nearest(str(target), known)}")) from exc
    except ValueError:
        found = None
    if not callable(found):
        known = [f"{module}.{n}" for n, v in vars(importlib.import_module(module)).items() if callable(v)] if module else []
        raise ConfigError(key_is(place, f"{key}._target_", target, f"does not exist{nearest(str(target), known)}"))
    return found


def signature(node: Mapping[str, Any], group: str, key: str, where: Where) -> Signature:
    """What may stand beside the `_target_` of a node; arguments of `INJECTED` are left out. Imports the class only if it is
    not listed."""
    if not node.get("_target_"):
        raise ConfigError(f"{where(key)}: {key} has no _target_, the class that it configures")
    known = listed(str(node["_target_"])) or asked(locate(node["_target_"], key, where))
    injected = INJECTED.get(group, set()) | set(known["injected"])
    named = {name: row for name, row in known["arguments"].items() if name not in injected}
    return Signature(
        hints={name: hint for name, (hint, _) in named.items()} | BESIDE.get(group, {}),
        required={name for name, (_, needed) in named.items() if needed},
        injected=injected,
        open=known["open"],
    )


def asked(target: Any) -> dict[str, Any]:
    """Like `listed` of src/config/arguments.py, of the class or function itself."""
    taken, hints = _arguments(target)
    named = [p for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {
        "arguments": {p.name: (hints.get(p.name, Any), p.default is p.empty) for p in named},
        "injected": getattr(target, "injected", ()),
        "open": any(p.kind is p.VAR_KEYWORD for p in taken),
    }


def _arguments(target: Any) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Parameters and annotations of a class or function. A constructor of this project that ends in `**common` hands that to
    its base class, whose parameters then count as its own."""
    call = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(call)
    except (NameError, TypeError):
        hints = {}
    taken = list(inspect.signature(target).parameters.values())
    passes_on = bool(taken) and taken[-1].kind is inspect.Parameter.VAR_KEYWORD
    if passes_on and inspect.isclass(target) and target.__base__.__module__.startswith("src."):
        above, their_hints = _arguments(target.__base__)
        own = {p.name for p in taken}
        return taken[:-1] + [p for p in above if p.name not in own], their_hints | hints
    return taken, hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a yaml value can be an argument with this annotation; what cannot be judged is accepted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    simple = {bool: bool, int: int, float: (int, float), str: str, Path: str, dict: dict}
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        fit = True
    elif origin in (Union, types.UnionType):
        fit = any(fits(value, a) for a in args)
    elif origin is Literal:
        fit = any(value == a and type(value) is type(a) for a in args)
    elif hint in (None, type(None)):
        fit = value is None
    elif (origin or hint) in (tuple, list, set, frozenset):
        fit = isinstance(value, list) and _elements_fit(value, origin, args)
    elif hint in simple or origin is dict:
        fit = isinstance(value, simple.get(hint, dict)) and (hint is bool or not isinstance(value, bool))
    elif inspect.isclass(hint) and issubclass(hint, Enum):
        fit = value in hint.__members__
    else:
        fit = isinstance(value, (dict, list)) or not inspect.isclass(hint)
    return fit


def _elements_fit(values: list, origin: Any, args: tuple) -> bool:
    if origin is tuple and Ellipsis not in args:
        return len(values) == len(args) and all(fits(v, a) for v, a in zip(values, args, strict=True))
    return not args or all(fits(v, args[0]) for v in values)


def hint_name(hint: Any) -> str:
    """An annotation as a yaml writer would say it: `full | decoder`, `int | null`, `[float, float]`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(hint_name(a) for a in args if a.__module__ in ("builtins", "typing", "types")) or str(hint)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple and Ellipsis not in args:
        return f"[{', '.join(hint_name(a) for a in args)}]"
    if origin in (list, tuple):
        return f"a list of {hint_name(args[0])}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
