"""Where numbers go while a run is going: always plain files in the run folder, and a copy to Weights & Biases if asked for.

The files are whole without the copy; nothing that W&B does or fails to do stops a run or holds up a step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.loggers.base import RunLogger
from src.loggers.local import LocalLogger
from src.loggers.wandb_run import WandbRun
from src.results import origin
from src.types import UserError

__all__ = ["LocalLogger", "RunLogger", "WandbRun", "build_loggers"]


def build_loggers(
    cfg_logger: Any, run_dir: Path, run_name: str, config: Mapping[str, Any], tags: list[str], facts: Mapping[str, Any]
) -> list[RunLogger]:
    """The loggers of one run: local files always, W&B where `cfg_logger.name` is "wandb".

    cfg_logger: name, project, entity, group, mode. config: the resolved config; facts: what else W&B shall know of the
    run (parameter counts, device, ...), stored as config["facts"]. The commit, versions and the command are added here.
    Raises UserError for an unknown logger or mode.
    """
    if cfg_logger.name not in ("local", "wandb"):
        raise UserError(f"logger.name is {cfg_logger.name!r}; use local or wandb")
    loggers: list[RunLogger] = [LocalLogger(run_dir, run_name)]
    if cfg_logger.name == "wandb":
        known = {**origin(Path(__file__).parent), **facts}
        loggers.append(WandbRun(cfg_logger, run_dir, run_name, {**config, "facts": known}, tags))
    return loggers
