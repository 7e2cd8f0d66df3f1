"""Composes the yaml files under conf/ through Hydra, and turns its refusals into one line that names file, key and value.

Hydra 1.3.8 composes before the program's own main function runs, and reports over several lines without saying which
file was wrong. Here the same parts (search path, defaults list, overrides) are walked one at a time to find the culprit.
"""

import contextlib
import copy
import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from src.config.checks import legal_keys
from src.config.messages import COMMAND_LINE, ConfigError, guess, key_is, nearest, nearest_key
from src.config.signatures import hint_name

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: the primary yaml, its schema, overrides without sweeps, where to look."""

    config_name: str
    schema: type
    overrides: tuple[str, ...] = ()
    config_dir: str = str(CONF)
    extra_dir: str | None = None

    def loader(self) -> "Loader":
        """Hydra's loader over the same search path that its main function would build."""
        setup_globals()
        path = create_config_search_path(self.config_dir)
        if self.extra_dir is not None:
            if not Path(self.extra_dir).is_dir():
                raise ConfigError(f"{COMMAND_LINE}: --config-dir {self.extra_dir} is not a folder")
            folder = Path(self.extra_dir).resolve()
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        return Loader(path)

    def parse(self, loader: "Loader") -> list[Override]:
        """Overrides as Hydra reads them; ConfigError for one that it cannot read."""
        parser, parsed = OverridesParser.create(loader), []
        for text in self.overrides:
            try:
                parsed += parser.parse_overrides([text])
            except HydraException as exc:
                raise ConfigError(f"{COMMAND_LINE}: cannot read {text!r}: {_quote_hint(text)}") from exc
        return parsed


class Origin:
    """Names the place that set a dotted key last: a yaml file relative to the project, or the command line."""

    def __init__(self, parts: list[tuple[str, DictConfig]]):
        self.parts = parts

    def __call__(self, key: str) -> str:
        for place, tree in reversed(self.parts):
            if _has(tree, key):
                return place
        return COMMAND_LINE

    def merged(self) -> dict:
        """All parts on top of each other, without schema: enough to know the legal keys of a configuration that failed."""
        tree = OmegaConf.merge({}, *(t for _, t in self.parts))
        return typing.cast(dict, OmegaConf.to_container(tree, resolve=False))


class Loader(ConfigLoaderImpl):
    """Hydra's loader that remembers what it merged. parts: (place, tree at the root) of each yaml file, in that order;
    base: all of them together, before the values of the command line."""

    def __init__(self, search_path: ConfigSearchPath):
        super().__init__(search_path)
        self.parts: list[tuple[str, DictConfig]] = []
        self.base: DictConfig | None = None

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if loaded.path.startswith("file://") and OmegaConf.is_dict(loaded.config):
            keys = [k for k in loaded.config if k not in ("hydra", "defaults")]
            self.parts.append((_place(loaded.path, str(default.config_path)), OmegaConf.masked_copy(loaded.config, keys)))
        return loaded

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        cfg = super()._compose_config_from_defaults_list(defaults, repo)
        self.base = copy.deepcopy(cfg)
        return cfg


def compose(request: Request) -> tuple[DictConfig, Origin]:
    """The configuration (with Hydra's own node) and where its keys come from; ConfigError with the place and the fix."""
    loader = request.loader()
    overrides = request.parse(loader)
    try:
        cfg = loader.load_configuration(request.config_name, list(request.overrides), RunMode.RUN)
        return cfg, Origin([*loader.parts, *_command_line(overrides)])
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        place = f"{_relative(Path(mark.name))}: line {mark.line + 1}" if mark else f"conf of {request.config_name}"
        raise ConfigError(f"{place}: not valid yaml: {exc.problem}") from exc
    except (HydraException, OmegaConfBaseException, ValueError) as exc:
        for look in (_sweep, _group_choice, _yaml_file, _override_value):
            look(request, loader, overrides)
        raise ConfigError(_flat(exc)) from exc
    except (AttributeError, AssertionError):  # how OmegaConf fails at keys in the place of a null
        _null_node(loader, overrides)
        raise


# ---- the parts --------------------------------------------------------------------------------------------------------


def _command_line(overrides: list[Override]) -> list[tuple[str, DictConfig]]:
    parts = []
    for item in overrides:
        if not (item.is_delete() or item.is_hydra_override() or item.is_sweep_override() or "/" in item.key_or_group):
            tree = OmegaConf.create()
            OmegaConf.update(tree, item.key_or_group, item.value(), force_add=True)
            parts.append((COMMAND_LINE, tree))
    return parts


def _place(source: str, config_path: str) -> str:
    file = Path(source.removeprefix("file://")) / f"{config_path.removesuffix('.yaml')}.yaml"
    return _relative(file)


def _relative(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if OmegaConf.is_list(tree):
            return True
        if not OmegaConf.is_dict(tree) or tree._is_none() or tree._is_missing() or tree._is_interpolation():
            return False
        if (tree := tree._get_node(name)) is None:
            return False
    return True


# ---- the culprit: each of these raises ConfigError if it finds it ------------------------------------------------------


def _sweep(request: Request, loader: Loader, overrides: list[Override]) -> None:
    for item in overrides:
        if item.is_sweep_override():
            raise ConfigError(
                f"{COMMAND_LINE}: {item.input_line} is a sweep: add --multirun, or {_quote_hint(item.input_line)}"
            )


def _null_node(loader: Loader, overrides: list[Override]) -> None:
    for item in overrides:
        group, *names = item.key_or_group.split(".")
        nodes = [".".join([group, *names[:i]]) for i in range(len(names) + isinstance(item.value(), dict))]
        if null := next((node for node in nodes if OmegaConf.select(loader.base, node) is None), None):
            fault = f"is null in the chosen file of conf/{group}; choose one that has keys there, with {group}=<name>"
            raise ConfigError(f"{COMMAND_LINE}: {item.input_line}: {null} {fault}")


def _group_choice(request: Request, loader: Loader, overrides: list[Override]) -> None:
    """Group options that do not exist, on the command line and in the defaults lists of primary yaml and experiments."""
    repo = loader.repository
    if not repo.config_exists(request.config_name):
        known = repo.get_group_options("")
        raise ConfigError(
            f"{COMMAND_LINE}: --config-name {request.config_name} does not exist{nearest(request.config_name, known)}"
        )
    in_list = _defaults_of(repo, request.config_name, request.config_name)
    for item in overrides:
        group, value = item.key_or_group, item.value()
        if item.is_hydra_override() or item.is_delete() or not repo.group_exists(group):
            continue
        for option in value if isinstance(value, list) else [value]:
            if not isinstance(option, str):
                raise ConfigError(key_is(COMMAND_LINE, group, value, f"should be the name of a file in conf/{group}"))
            _check_option(repo, COMMAND_LINE, group, option)
            _defaults_of(repo, f"{group}/{option}", request.config_name)
        if group not in in_list and not (item.is_add() or item.is_force_add()):
            raise ConfigError(key_is(COMMAND_LINE, group, value, f"has nothing to replace; write +{item.input_line}"))
        if group in in_list and item.is_add():
            raise ConfigError(
                key_is(COMMAND_LINE, f"+{group}", value, f"is chosen already; write {item.input_line.lstrip('+')}")
            )


def _defaults_of(repo: Any, config_path: str, primary: str) -> set[str]:
    """Groups in the defaults list of a yaml file; ConfigError for a group or an option that does not exist."""
    loaded = repo.load_config(config_path)
    place, groups = _place(loaded.path, config_path), set()
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


def _check_option(repo: Any, place: str, group: str, option: str) -> None:
    if not repo.config_exists(f"{group}/{option}"):
        known = repo.get_group_options(group)
        raise ConfigError(key_is(place, group, option, f"is not in conf/{group}{nearest(option, known)}"))


def _yaml_file(request: Request, loader: Loader, overrides: list[Override]) -> None:
    """Merge every file into the schema on its own."""
    for place, tree in loader.parts:
        try:
            OmegaConf.merge(OmegaConf.structured(request.schema), tree)
        except OmegaConfBaseException as exc:
            key = str(exc.full_key)
            _blame(place, key, OmegaConf.select(tree, key), exc, schema=request.schema, origin=Origin(loader.parts))


def _override_value(request: Request, loader: Loader, overrides: list[Override]) -> None:
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
            _blame(COMMAND_LINE, key, value, cause, schema=request.schema, origin=Origin(loader.parts))


def _blame(place: str, key: str, value: Any, exc: BaseException, *, schema: type, origin: Origin) -> None:
    value = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
    wanted = _expected(schema, key)
    if isinstance(exc, (ConfigKeyError, ConfigAttributeError)) or wanted is None:
        legal = legal_keys({}, schema, origin)
        # keys of classes cost their import: not for a word whose neighbour the schema knows
        if "." in key or not guess(key, (known for known in legal if "." not in known)):
            with contextlib.suppress(ConfigError):
                legal = legal_keys(origin.merged(), schema, origin)
        if key not in legal:
            raise ConfigError(key_is(place, key, value, f"is not a known key{nearest_key(key, legal)}")) from exc
    fault = f"should be {wanted}" if wanted else _flat(exc)
    raise ConfigError(key_is(place, key, value, fault)) from exc


def _expected(schema: type, key: str) -> str | None:
    """The type that the schema wants at a dotted key; None if the schema does not know the key."""
    cls: Any = schema
    for name in key.split("."):
        cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
    if cls is None:
        return None
    return "a mapping of keys" if dataclasses.is_dataclass(cls) or typing.get_origin(cls) is dict else hint_name(cls)


def _quote_hint(text: str) -> str:
    key, _, value = text.partition("=")
    return f"quote a value with special characters twice: '{key}=\"{value}\"'" if value else f"write {key}=value"


def _flat(exc: BaseException) -> str:
    """Hydra's own words on one line, for what none of the above has found."""
    words = [str(e) for e in (exc, exc.__cause__) if e is not None]
    return " ".join(" ".join(words).split())
