"""The trained adapter of a run, for diffusers.

    python -m src.export run=runs/<name>/<stamp> out=exported

Which form it takes: `src.export.write`. Prints how to load what it wrote.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.config import cli
from src.runs import config_of
from src.vocabulary import UserError


def refuse_at_once(cfg: DictConfig, choices: Mapping[str, Any] | None = None) -> None:
    """A run that is not there, and a folder that is taken, before torch is imported. Raises UserError."""
    config_of(cfg.run)
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={cfg.out} is there already and not empty: name a new folder")


def main(cfg: DictConfig) -> None:
    """The entry. Heavy imports wait until the configuration has been found good."""
    refuse_at_once(cfg)  # again, for a cell of a multirun
    from src.export.write import main as begin

    begin(cfg)


if __name__ == "__main__":
    cli("export", main, early=refuse_at_once)
