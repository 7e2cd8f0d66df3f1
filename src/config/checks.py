"""What makes a configuration wrong, said in one line: the place it stands in, the key, the value, the nearest right one.

A "tree" is a plain nested dict of resolved values; `where(key)` names the yaml file, or the command line, that set a key.
Nodes with a `_target_` have no schema of their own: the signature of the class they name is the schema.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.types import UserError

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
Where = Callable[[str], str]


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line."""


class Incompatible(ConfigError):
    """Values that are legal one by one, but not together or not on this machine: a sweep loses this cell only."""


class Unsupported(Incompatible):
    """An adapter on a backbone that it was never made for: a sweep skips this cell and is none the worse."""


def key_is(place: str, key: str, value: Any, fault: str) -> str:
    """The one form of every message: `<place>: <key>=<value> <fault>`."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{place}: {key}={text if len(text) <= 60 else text[:57] + '...'} {fault}"


def guess(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) or [k for k in known if word and k.startswith(word)]
    return f"; did you mean {close[0]}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Like `guess`, with the list to choose from when nothing is near."""
    return guess(word, known) or f"; known: {', '.join(sorted(known)) or 'none'}"


def nearest_key(key: str, legal: set[str]) -> str:
    """The nearest of dotted keys: among the neighbours, then the same name elsewhere, then, without neighbours, anything."""
    head, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in sorted(legal) if k.rpartition(".")[0] == head}
    twins = sorted((k for k in legal if k.rpartition(".")[2] == leaf), key=lambda k: (k.count("."), k))[:3]
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {siblings[close[0]]}?"
    if twins:
        return f"; did you mean {' or '.join(twins)}?"
    if not siblings and (close := difflib.get_close_matches(key, sorted(legal), n=1)):
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(siblings.values()) or ', '.join(sorted(k for k in legal if '.' not in k))}"


# ---- signatures -------------------------------------------------------------------------------------------------------


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
    """What may stand beside the `_target_` of a node; arguments of `INJECTED` are left out."""
    if not node.get("_target_"):
        raise ConfigError(f"{where(key)}: {key} has no _target_, the class that it configures")
    target = locate(node["_target_"], key, where)
    injected = INJECTED.get(group, set()) | set(getattr(target, "injected", ()))
    taken, hints = _arguments(target)
    named = [p for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in injected]
    return Signature(
        hints={p.name: hints.get(p.name, Any) for p in named} | BESIDE.get(group, {}),
        required={p.name for p in named if p.default is p.empty},
        injected=injected,
        open=any(p.kind is p.VAR_KEYWORD for p in taken),
    )


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


# ---- the tree against schema and signatures ---------------------------------------------------------------------------


def schema_fields(schema: type) -> Iterator[tuple[dataclasses.Field, Any, str | None]]:
    """(field, nested dataclass or None, kind): kind "node" has a `_target_`, "nodes" is a mapping of such."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        nested = hints[field.name] if dataclasses.is_dataclass(hints[field.name]) else None
        yield field, nested, field.metadata.get("kind")


def target_nodes(tree: Any, schema: type, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, group, node) of every node with a `_target_`."""
    for field, nested, kind in schema_fields(schema):
        key, node = f"{path}{field.name}", tree.get(field.name) if isinstance(tree, Mapping) else None
        if nested:
            yield from target_nodes(node, nested, f"{key}.")
        elif kind == "node" and node is not None:
            yield key, key, node
        elif kind == "nodes" and isinstance(node, Mapping):
            yield from ((f"{key}.{name}", key, child) for name, child in node.items())


def legal_keys(tree: Any, schema: type, where: Where, path: str = "") -> set[str]:
    """Every dotted key that the schema, or the signature of a `_target_` node, knows."""
    keys = set(getattr(schema, "also", ()))
    for field, nested, _ in schema_fields(schema):
        keys.add(f"{path}{field.name}")
        if nested:
            child = tree.get(field.name) if isinstance(tree, Mapping) else None
            keys |= legal_keys(child, nested, where, f"{path}{field.name}.")
    if not path:
        for key, group, node in target_nodes(tree, schema):
            if isinstance(node, Mapping):
                keys |= {key} | {f"{key}.{name}" for name in signature(node, group, key, where).hints}
    return keys


def check_unknown(cfg: DictConfig, schema: type, where: Where) -> None:
    """Refuse keys that neither the schema nor a constructor knows (`+key=value` slips past Hydra's own check)."""
    raw = OmegaConf.to_container(cfg, resolve=False)

    def walk(tree: Any, cls: type, path: str) -> None:
        known = {field.name: nested for field, nested, _ in schema_fields(cls)}
        for name, value in tree.items():
            key = f"{path}{name}"
            if name not in known:
                fault = f"is not a known key{nearest_key(key, legal_keys(raw, schema, where))}"
                raise ConfigError(key_is(where(key), key, value, fault))
            if known[name] and isinstance(value, dict):
                walk(value, known[name], f"{key}.")

    walk(raw, schema, "")
    for key, group, node in target_nodes(raw, schema):
        if not isinstance(node, dict):
            fault = "is not a node with a _target_; to leave it out, write ~" + key
            raise ConfigError(key_is(where(key), key, node, fault))
        known = signature(node, group, key, where)
        for name in node:
            if name in known.injected:
                raise ConfigError(key_is(where(f"{key}.{name}"), f"{key}.{name}", node[name], "is filled in by the program"))
            if not (known.open or name in known.hints or name in HYDRA_KEYS):
                legal = legal_keys(raw, schema, where)
                fault = f"is no argument of {node['_target_']}{nearest_key(f'{key}.{name}', legal)}"
                raise ConfigError(key_is(where(f"{key}.{name}"), f"{key}.{name}", node[name], fault))


def resolve(cfg: Any, where: Where, path: str = "") -> Any:
    """Interpolations filled in, as plain containers; ConfigError for a value left `???` or that cannot be filled in."""
    if not isinstance(cfg, (DictConfig, ListConfig)):
        return cfg
    plain = {}
    for name in cfg if isinstance(cfg, DictConfig) else range(len(cfg)):
        key = f"{path}{name}"
        if OmegaConf.is_missing(cfg, name):
            raise ConfigError(f"{where(key)}: {key} has no default; give it: {key}=...")
        try:
            plain[name] = resolve(cfg[name], where, f"{key}.")
        except OmegaConfBaseException as exc:
            value = OmegaConf.to_container(cfg, resolve=False)[name]
            raise ConfigError(key_is(where(key), key, value, f"cannot be filled in: {str(exc).splitlines()[0]}")) from exc
    return plain if isinstance(cfg, DictConfig) else list(plain.values())


def check_values(tree: dict, schema: type, where: Where, path: str = "") -> None:
    """Required keys, choices and lower bounds of the schema; required arguments and types of the signatures."""
    for field, nested, _ in schema_fields(schema):
        key = f"{path}{field.name}"
        if field.name not in tree:
            raise ConfigError(f"command line: {key} is required, but was removed")
        value = tree[field.name]
        choices, least, below = (field.metadata.get(m) for m in ("choices", "least", "below"))
        if choices and value is not None and value not in choices:
            raise ConfigError(key_is(where(key), key, value, f"is not one of {', '.join(choices)}{guess(str(value), choices)}"))
        if least is not None and value is not None and value < least:
            raise ConfigError(key_is(where(key), key, value, f"is below {least}"))
        if below is not None and value >= below:
            raise ConfigError(key_is(where(key), key, value, f"is not below {below}"))
        if nested:
            check_values(value, nested, where, f"{key}.")
    for key, group, node in target_nodes(tree, schema) if not path else ():
        known = signature(node, group, key, where)
        for name in sorted(known.required - node.keys()):
            raise ConfigError(
                f"{where(f'{key}._target_')}: {key}.{name} is missing, and {node['_target_']} has no default for it"
            )
        for name, value in node.items():
            if name in known.hints and not fits(value, known.hints[name]):
                choices = [str(a) for a in typing.get_args(known.hints[name])]
                near = guess(str(value), choices) if typing.get_origin(known.hints[name]) is Literal else ""
                fault = f"should be {hint_name(known.hints[name])}{near}"
                raise ConfigError(key_is(where(f"{key}.{name}"), f"{key}.{name}", value, fault))
