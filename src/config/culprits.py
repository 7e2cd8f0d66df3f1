"""Which file, key or word it was that made Hydra refuse a configuration.

What Hydra composes at once (search path, defaults list, files, overrides) is walked here one part at a time.
"""

import contextlib
import dataclasses
import typing
from typing import Any

from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from src.config.checks import legal_keys
from src.config.loader import Loader, Origin, place_of
from src.config.messages import COMMAND_LINE, ConfigError, flat, guess, key_is, nearest, nearest_key, quote_hint
from src.config.signatures import hint_name


def find_culprit(config_name: str, schema: type, loader: Loader, overrides: list[Override]) -> None:
    """Raise ConfigError for the first part that is wrong by itself, if one is."""
    _sweep(overrides)
    _group_choice(config_name, loader.repository, overrides)
    _yaml_file(schema, loader.parts)
    _override_value(schema, loader, overrides)


def find_null(loader: Loader, overrides: list[Override]) -> None:
    """Raise ConfigError for an override below a key that is null, if there is one: OmegaConf's error says nothing of it."""
    for item in overrides:
        group, *names = item.key_or_group.split(".")
        nodes = [".".join([group, *names[:i]]) for i in range(len(names) + isinstance(item.value(), dict))]
        if null := next((node for node in nodes if OmegaConf.select(loader.base, node) is None), None):
            fault = f"is null in the chosen file of conf/{group}; choose one that has keys there, with {group}=<name>"
            raise ConfigError(f"{COMMAND_LINE}: {item.input_line}: {null} {fault}")


# ---- each of these raises ConfigError if it finds the culprit ---------------------------------------------------------


def _sweep(overrides: list[Override]) -> None:
    for item in overrides:
        if item.is_sweep_override():
            raise ConfigError(f"{COMMAND_LINE}: {item.input_line} is a sweep: add --multirun, or {quote_hint(item.input_line)}")


def _group_choice(config_name: str, repo: IConfigRepository, overrides: list[Override]) -> None:
    """Group options that do not exist, on the command line and in the defaults lists of primary yaml and experiments."""
    if not repo.config_exists(config_name):
        known = repo.get_group_options("")
        raise ConfigError(f"{COMMAND_LINE}: --config-name {config_name} does not exist{nearest(config_name, known)}")
    in_list = _defaults_of(repo, config_name, config_name)
    for item in overrides:
        group, value = item.key_or_group, item.value()
        if item.is_hydra_override() or item.is_delete() or not repo.group_exists(group):
            continue
        for option in value if isinstance(value, list) else [value]:
            if not isinstance(option, str):
                raise ConfigError(key_is(COMMAND_LINE, group, value, f"should be the name of a file in conf/{group}"))
            _check_option(repo, COMMAND_LINE, group, option)
            _defaults_of(repo, f"{group}/{option}", config_name)
        if group not in in_list and not (item.is_add() or item.is_force_add()):
            raise ConfigError(key_is(COMMAND_LINE, group, value, f"has nothing to replace; write +{item.input_line}"))
        if group in in_list and item.is_add():
            raise ConfigError(
                key_is(COMMAND_LINE, f"+{group}", value, f"is chosen already; write {item.input_line.lstrip('+')}")
            )


def _defaults_of(repo: IConfigRepository, config_path: str, primary: str) -> set[str]:
    """Groups in the defaults list of a yaml file; ConfigError for a group or an option that does not exist."""
    loaded = repo.load_config(config_path)
    place, groups = place_of(loaded.path, config_path), set()
    for item in loaded.defaults_list or []:
        group = getattr(item, "group", None)
        if group is None or group.lstrip("/").startswith("hydra"):
            path, folder = getattr(item, "path", None) or "_self_", config_path.rpartition("/")[0]
            path = path.lstrip("/") if path.startswith("/") or not folder else f"{folder}/{path}"
            if not (path.endswith("_self_") or repo.config_exists(path)):
                raise ConfigError(f"{place}: defaults: {path} does not exist{nearest(path, repo.get_group_options(''))}")
            continue
        name = (
            group.lstrip("/")
            if group.startswith("/") or config_path == primary
            else f"{config_path.rpartition('/')[0]}/{group}"
        )
        groups.add(name)
        if not repo.group_exists(name):
            known = [g for g in repo.get_group_options("", None) if repo.group_exists(g)]
            raise ConfigError(f"{place}: defaults: {group}: {item.value}: no such group{nearest(name, known)}")
        for option in item.value if isinstance(item.value, list) else [item.value]:
            if isinstance(option, str) and option != "???" and "${" not in option:  # else other choices decide
                _check_option(repo, place, name, option)
    return groups


def _check_option(repo: IConfigRepository, place: str, group: str, option: str) -> None:
    if not repo.config_exists(f"{group}/{option}"):
        known = repo.get_group_options(group)
        raise ConfigError(key_is(place, group, option, f"is not in conf/{group}{nearest(option, known)}"))


def _yaml_file(schema: type, parts: list[tuple[str, DictConfig]]) -> None:
    """Merge every file into the schema on its own."""
    for place, tree in parts:
        try:
            OmegaConf.merge(OmegaConf.structured(schema), tree)
        except OmegaConfBaseException as exc:
            key = str(exc.full_key)
            _blame(place, key, OmegaConf.select(tree, key), exc, schema=schema, origin=Origin(parts))


def _override_value(schema: type, loader: Loader, overrides: list[Override]) -> None:
    """Put the values of the command line onto the composed files one by one."""
    if loader.base is None:
        return
    OmegaConf.set_struct(loader.base, True)
    for item in overrides:
        if item.is_hydra_override() or loader.repository.group_exists(item.key_or_group):
            continue
        try:
            loader._apply_overrides_to_config([item], loader.base)
        except (HydraException, OmegaConfBaseException) as exc:
            cause, key, value = exc.__cause__ or exc, item.key_or_group, item.value()
            if item.is_add() and OmegaConf.select(loader.base, key, throw_on_missing=False) is not None:
                raise ConfigError(
                    key_is(COMMAND_LINE, f"+{key}", value, f"is set already; write {item.input_line[1:]}")
                ) from exc
            inner = str(getattr(cause, "full_key", ""))
            if isinstance(value, dict) and inner.startswith(f"{key}."):
                value, key = OmegaConf.select(OmegaConf.create(value), inner[len(key) + 1 :]), inner
            _blame(COMMAND_LINE, key, value, cause, schema=schema, origin=Origin(loader.parts))


def _blame(place: str, key: str, value: Any, exc: BaseException, *, schema: type, origin: Origin) -> None:
    value = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
    wanted = _expected(schema, key)
    if isinstance(exc, (ConfigKeyError, ConfigAttributeError)) or wanted is None:
        legal = legal_keys({}, schema, origin)
        # keys of a class that is not listed cost its import: not for a word whose neighbour the schema knows
        if "." in key or not guess(key, (known for known in legal if "." not in known)):
            with contextlib.suppress(ConfigError):
                legal = legal_keys(origin.merged(), schema, origin)
        if key not in legal:
            raise ConfigError(key_is(place, key, value, f"is not a known key{nearest_key(key, legal)}")) from exc
        if isinstance(exc, (ConfigKeyError, ConfigAttributeError)) and place == COMMAND_LINE:
            raise ConfigError(key_is(place, key, value, f"stands in no chosen file, so has to be added: +{key}=...")) from exc
    fault = f"should be {wanted}" if wanted else flat(exc)
    raise ConfigError(key_is(place, key, value, fault)) from exc


def _expected(schema: type, key: str) -> str | None:
    """The type that the schema wants at a dotted key; None if the schema does not know the key."""
    cls: Any = schema
    for name in key.split("."):
        cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
    if cls is None:
        return None
    return "a mapping of keys" if dataclasses.is_dataclass(cls) or typing.get_origin(cls) is dict else hint_name(cls)
