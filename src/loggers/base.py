"""What the loggers of a run have in common. The x axis of everything is `images_seen`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger

from src.results import plain


class RunLogger(Logger):
    """Lightning's logger with grids, tables, a rewind and an end.

    `close` is the end, on success and on failure. Lightning's `finalize("success")` is not: it comes after every fit and
    every validate, and the final scores of a run come later.
    """

    def __init__(self, run_dir: Path, run_name: str) -> None:
        super().__init__()
        self.run_dir, self._run_name = Path(run_dir).absolute(), run_name

    @property
    def name(self) -> str:
        """The run's name."""
        return self._run_name

    @property
    def version(self) -> str:
        """The run folder's own name."""
        return self.run_dir.name

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.run_dir)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the resolved config is in config.yaml and went to W&B at the start."""

    def log_grid(self, name: str, path_png: str | Path, images_seen: int) -> None:
        """One picture made of many; the PNG is already in the run folder."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], images_seen: int) -> None:
        """A table of samples; a cell is a text, a number, None, or a `Path` to a PNG, which is shown as a picture."""

    def rewind(self, images_seen: int) -> None:
        """Forget rows after `images_seen`: the part of a killed run that a resumed one repeats."""

    def close(self, status: str = "success") -> None:
        """End the run; any status but "success" and "finished" is a failure."""


def scalar_row(metrics: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Plain numbers, with images_seen from the metrics, else from `step`. Raises TypeError naming what is no number."""
    row = {"images_seen": step} | {key: plain(value) for key, value in metrics.items()}
    for key, value in row.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{key} is {value!r}, wanted a number; texts and pictures go through log_table and log_grid")
    return row | {"images_seen": int(row["images_seen"])}
