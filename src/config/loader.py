"""Hydra's loader with a memory: which yaml file set which key, and how messages call that file."""

import copy
import typing
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from src.config.messages import COMMAND_LINE

ROOT = Path(__file__).resolve().parents[2]


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
            self.parts.append((place_of(loaded.path, str(default.config_path)), OmegaConf.masked_copy(loaded.config, keys)))
        return loaded

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        cfg = super()._compose_config_from_defaults_list(defaults, repo)
        self.base = copy.deepcopy(cfg)
        return cfg


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


def place_of(source: str, config_path: str) -> str:
    """How messages call a yaml file. source: one of Hydra's, `file://<folder>`; config_path: below it."""
    file = Path(source.removeprefix("file://")) / f"{config_path.removesuffix('.yaml')}.yaml"
    return relative(file)


def relative(file: Path) -> str:
    """A path as it is below the project; as it stands where it lies elsewhere."""
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
