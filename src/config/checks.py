"""What makes a configuration wrong: a tree against the schema first, which costs nothing, then against signatures.

A "tree" is a plain nested dict of resolved values; `where(key)` names the yaml file, or the command line, that set a key.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.messages import COMMAND_LINE, ConfigError, Gather, Where, guess, key_is, nearest_key
from src.config.signatures import HYDRA_KEYS, fits, hint_name, signature
from src.results import HIDDEN, hide_secrets
from src.vocabulary import EIGHT_BIT

KEYS_GO = "keys and tokens are read from the environment alone, since a configuration is kept in files; leave it out"


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
                names = node if _known_by_numbers(tree, group, node) else signature(node, group, key, where).hints
                keys |= {key} | {f"{key}.{name}" for name in names}
    return keys


def check_typed(overrides: Iterable[str]) -> None:
    """Refuse a key or token on the command line, which sweeps and histories keep, without saying it. Raises ConfigError."""
    for word in overrides:
        key, _, value = word.partition("=")
        if hide_secrets(word) != word or hide_secrets(value, key) != value:
            raise ConfigError(key_is("command line", hide_secrets(key), HIDDEN, f"holds a key or token: {KEYS_GO}"))


def check_secrets(tree: Any, where: Where, key: str = "") -> None:
    """Refuse a value that holds a key, a token or a user's name in a URL, wherever it was written. Raises ConfigError."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            check_secrets(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            check_secrets(value, where, key)
    elif isinstance(hidden := hide_secrets(tree, key.rpartition(".")[2]), str) and hidden != tree:
        raise ConfigError(key_is(where(key), key, HIDDEN, f"holds a key or token: {KEYS_GO}"))


def check_names(cfg: DictConfig, schema: type, where: Where) -> None:
    """Refuse keys that the schema does not know (`+key=value` slips past Hydra's own check)."""
    raw, gather = OmegaConf.to_container(cfg, resolve=False), Gather()

    def walk(tree: Any, cls: type, path: str) -> None:
        known = {field.name: nested for field, nested, _ in schema_fields(cls)}
        for name, value in tree.items():
            key = f"{path}{name}"
            if name not in known:
                gather(refuse, key, value)
            elif known[name] and isinstance(value, dict):
                walk(value, known[name], f"{key}.")

    def refuse(key: str, value: Any) -> None:
        raise ConfigError(
            key_is(where(key), key, value, f"is not a known key{nearest_key(key, legal_keys(raw, schema, where))}")
        )

    walk(raw, schema, "")
    gather.done()


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
    """Required keys, choices and lower bounds of the schema, all that are wrong at once. Imports nothing."""
    gather = Gather()
    for field, nested, _ in schema_fields(schema):
        key = f"{path}{field.name}"
        gather(_check_value, tree, field, key, where)
        if nested and field.name in tree:
            gather(check_values, tree[field.name], nested, where, f"{key}.")
    gather.done()


def _check_value(tree: dict, field: dataclasses.Field, key: str, where: Where) -> None:
    if field.name not in tree:
        raise ConfigError(f"command line: {key} is required, but was removed")
    value = tree[field.name]
    choices, least, below = (field.metadata.get(m) for m in ("choices", "least", "below"))
    if choices and value is not None and value not in choices:
        fault = f"is not one of {', '.join(choices)}{guess(str(value), choices)}"
        raise ConfigError(key_is(where(key), key, value, fault)).of(key)
    if least is not None and value is not None and value < least:
        raise ConfigError(key_is(where(key), key, value, f"is below {least}")).of(key)
    if below is not None and value >= below:
        raise ConfigError(key_is(where(key), key, value, f"is not below {below}")).of(key)


def check_nodes(tree: dict, schema: type, where: Where, typed_only: bool = False) -> None:
    """Every node with a `_target_` against the signature of its class: names, required arguments and types.

    Imports a class whose arguments are not listed (src/config/arguments.py), and with it torch: seconds. typed_only: leaves
    nodes out of which nothing was typed on the command line, for whoever has a fault to tell already and should not be kept
    waiting.
    """
    gather = Gather()
    for key, group, node in target_nodes(tree, schema):
        typed = not isinstance(node, dict) or any(where(f"{key}.{name}") == COMMAND_LINE for name in node)
        if (typed_only and not typed) or _known_by_numbers(tree, group, node):
            continue
        gather(_check_node, tree, schema, key, group, node, where)
    gather.done()


def _known_by_numbers(tree: Mapping, group: str, node: Any) -> bool:
    """Whether an estimate takes an optimizer from a table, and so has no need of its class, whose package may not be here."""
    estimated = tree.get("mode") == "estimate" and group == "optimizer.algorithm" and isinstance(node, Mapping)
    return estimated and node.get("_target_") in EIGHT_BIT


def _check_node(tree: dict, schema: type, key: str, group: str, node: Any, where: Where) -> None:
    if not isinstance(node, dict):
        fault = "is not a node with a _target_; to leave it out, write ~" + key
        raise ConfigError(key_is(where(key), key, node, fault))
    try:
        known = signature(node, group, key, where)
    except ConfigError as error:
        raise error.of(f"{key}._target_") from error.__cause__
    for name, value in node.items():
        place, full = where(f"{key}.{name}"), f"{key}.{name}"
        if name in known.injected:
            raise ConfigError(key_is(place, full, value, "is filled in by the program"))
        if not (known.open or name in known.hints or name in HYDRA_KEYS):
            near = nearest_key(full, legal_keys(tree, schema, where))
            raise ConfigError(key_is(place, full, value, f"is no argument of {node['_target_']}{near}"))
    for name in sorted(known.required - node.keys()):
        fault = f"{key}.{name} is missing, and {node['_target_']} has no default for it"
        raise ConfigError(f"{where(f'{key}._target_')}: {fault}")
    for name, value in node.items():
        if name in known.hints and not fits(value, known.hints[name]):
            choices = [str(a) for a in typing.get_args(known.hints[name])]
            near = guess(str(value), choices) if typing.get_origin(known.hints[name]) is Literal else ""
            fault = f"should be {hint_name(known.hints[name])}{near}"
            raise ConfigError(key_is(where(f"{key}.{name}"), f"{key}.{name}", value, fault))
