"""One condition and one prompt to one picture, with a trained adapter.

    python -m src.sample run=runs/<name>/<stamp> prompt="'a large red ball, gray floor'" condition=edges.png

What goes which way: `src.sample.draw`. The last line printed is `image: <file>`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.config import cli
from src.runs import config_of
from src.vocabulary import UserError


def refuse_at_once(cfg: DictConfig, choices: Mapping[str, Any] | None = None) -> None:
    """What is named and is not there, before torch is imported. Raises UserError."""
    config_of(cfg.run)
    if not Path(cfg.condition).is_file():
        raise UserError(f"condition={cfg.condition}: no such file")


def main(cfg: DictConfig) -> None:
    """The entry. Heavy imports wait until the configuration has been found good."""
    refuse_at_once(cfg)  # again, for a cell of a multirun
    from src.sample.draw import main as begin

    begin(cfg)


if __name__ == "__main__":
    cli("sample", main, early=refuse_at_once)
