"""Composes the yaml files under conf/ through Hydra, and turns its refusals into one line that names file, key and value.

Hydra 1.3.8 composes before the program's own main function runs, and reports over several lines without saying which
file was wrong: `src.config.culprits` looks for it.
"""

import dataclasses
from pathlib import Path

import yaml
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.culprits import find_culprit, find_null
from src.config.loader import ROOT, Loader, Origin, relative
from src.config.messages import COMMAND_LINE, ConfigError, flat, quote_hint

CONF = ROOT / "conf"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: the primary yaml, its schema, overrides without sweeps, where to look."""

    config_name: str
    schema: type
    overrides: tuple[str, ...] = ()
    config_dir: str = str(CONF)
    extra_dir: str | None = None

    def loader(self) -> Loader:
        """Hydra's loader over the same search path that its main function would build."""
        setup_globals()
        path = create_config_search_path(self.config_dir)
        if self.extra_dir is not None:
            if not Path(self.extra_dir).is_dir():
                raise ConfigError(f"{COMMAND_LINE}: --config-dir {self.extra_dir} is not a folder")
            folder = Path(self.extra_dir).resolve()
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        return Loader(path)

    def parse(self, loader: Loader) -> list[Override]:
        """Overrides as Hydra reads them; ConfigError for one that it cannot read."""
        parser, parsed = OverridesParser.create(loader), []
        for text in self.overrides:
            try:
                parsed += parser.parse_overrides([text])
            except HydraException as exc:
                raise ConfigError(f"{COMMAND_LINE}: cannot read {text!r}: {quote_hint(text)}") from exc
        return parsed


def compose(request: Request) -> tuple[DictConfig, Origin]:
    """The configuration (with Hydra's own node) and where its keys come from; ConfigError with the place and the fix."""
    loader = request.loader()
    overrides = request.parse(loader)
    try:
        cfg = loader.load_configuration(request.config_name, list(request.overrides), RunMode.RUN)
        return cfg, Origin([*loader.parts, *_command_line(overrides)])
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        place = f"{relative(Path(mark.name))}: line {mark.line + 1}" if mark else f"conf of {request.config_name}"
        raise ConfigError(f"{place}: not valid yaml: {exc.problem}") from exc
    except (HydraException, OmegaConfBaseException, ValueError) as exc:
        find_culprit(request.config_name, request.schema, loader, overrides)
        raise ConfigError(flat(exc)) from exc
    except (AttributeError, AssertionError):  # how OmegaConf fails at keys in the place of a null
        find_null(loader, overrides)
        raise


def _command_line(overrides: list[Override]) -> list[tuple[str, DictConfig]]:
    parts = []
    for item in overrides:
        if not (item.is_delete() or item.is_hydra_override() or item.is_sweep_override() or "/" in item.key_or_group):
            tree = OmegaConf.create()
            OmegaConf.update(tree, item.key_or_group, item.value(), force_add=True)
            parts.append((COMMAND_LINE, tree))
    return parts
