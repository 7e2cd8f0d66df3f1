"""Train a control adapter: compose, check, build, fit, and prove that control was learned.

    python -m src.train +experiment=unicon_sd3_canny
    python -m src.train --list                          which adapter works on which backbone for which task

The last line printed is `run: <folder>`; what is in it: README.md. Exit code 2: refused or failed, in one line on stderr;
143: ended by a signal, with everything saved.
"""

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from src.config import cli
from src.config.known import refuse_listed


def refuse_at_once(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """What is refused before torch is imported. A resumed run is judged by its own configuration. Raises ConfigError."""
    if cfg.resume is None:
        refuse_listed(cfg, choices)


def main(cfg: DictConfig) -> None:
    """The entry. Heavy imports wait until the configuration has been found good."""
    from src.train.flow import main as begin

    begin(cfg)


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        from src import support

        print(support.table(), support.reasons(), sep="\n\n")
    else:
        cli("train", main, early=refuse_at_once)
