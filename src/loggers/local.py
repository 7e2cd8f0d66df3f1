"""The logs that every run has: plain files in the run folder."""

import csv
import io
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from src.loggers.base import RunLogger, scalar_row
from src.results import plain, read_rows, write_atomic
from src.results.files import append_whole as _append

log = logging.getLogger(__name__)


class LocalLogger(RunLogger):
    """metrics.jsonl (one object per call, handed to the system when the call returns), metrics.csv (the same rows, wide),
    media.jsonl (grids) and tables/<name>.jsonl. A run folder that has rows already is continued, never truncated.

    The JSONL is the truth; the CSV is derived from it, and made anew when a column appears. A full disk ends no run:
    rows wait in memory, with one warning, until they can be written.
    """

    def __init__(self, run_dir: Path, run_name: str) -> None:
        super().__init__(run_dir, run_name)
        self.jsonl, self.csv, self.media = (self.run_dir / name for name in ("metrics.jsonl", "metrics.csv", "media.jsonl"))
        self._waiting: list[tuple[Path, dict[str, Any]]] = []
        self._columns: list[str] | None = None  # of the CSV; None where it does not match the JSONL
        self._warned = False
        self._earlier_s, self._start = 0.0, time.monotonic()
        if rank_zero_only.rank == 0:
            self._keep(math.inf)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row of scalars. images_seen: from the metrics, else `step`; time_s: seconds of this run so far,
        earlier parts of a resumed run included. NaN and infinity are kept, as texts. Raises TypeError for no scalar."""
        row = scalar_row(metrics, step)
        seconds = round(self._earlier_s + time.monotonic() - self._start, 3)
        self._write(self.jsonl, {"images_seen": row.pop("images_seen"), "time_s": row.pop("time_s", seconds), **row})

    @rank_zero_only
    def log_grid(self, name: str, path_png: str | Path, images_seen: int) -> None:
        """Note which picture belongs to which point of the run."""
        self._write(self.media, {"images_seen": int(images_seen), "name": name, "path": self._cell(Path(path_png))})

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], images_seen: int) -> None:
        """Append the rows to tables/<name>.jsonl, pictures as paths relative to the run folder."""
        for row in rows:
            cells = {column: self._cell(cell) for column, cell in zip(columns, row, strict=True)}
            self._write(self.run_dir / "tables" / f"{name}.jsonl", {"images_seen": int(images_seen), **cells})

    @rank_zero_only
    def rewind(self, images_seen: int) -> None:
        """Drop rows with a larger images_seen everywhere; time_s goes on from the last one kept."""
        dropped = self._keep(images_seen)
        if dropped:
            log.info("dropped %d log rows after images_seen=%d: the resumed run repeats them", dropped, images_seen)

    def _cell(self, value: Any) -> Any:
        if isinstance(value, Path) and value.absolute().is_relative_to(self.run_dir):
            value = value.absolute().relative_to(self.run_dir)
        return plain(value)

    def _keep(self, last: float) -> int:
        """Rewrite every log without rows after `last`, and without the line that a killed process left torn."""
        dropped = 0
        for path in (self.jsonl, self.media, *sorted(self.run_dir.glob("tables/**/*.jsonl"))):
            rows = read_rows(path) if path.exists() else []
            kept = [row for row in rows if row.get("images_seen", 0) <= last]
            data = "".join(map(_line, kept)).encode()
            if path.exists() and path.read_bytes() != data:
                write_atomic(path, data)
            dropped += len(rows) - len(kept)
            if path == self.jsonl:
                self._earlier_s, self._start = float(kept[-1].get("time_s", 0.0)) if kept else 0.0, time.monotonic()
                self._make_csv()
        return dropped

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        self._waiting.append((path, row))
        try:
            while self._waiting:
                path, row = self._waiting[0]
                _append(path, _line(row))
                self._waiting.pop(0)
                if path == self.jsonl:
                    self._append_csv(row)
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning("cannot write %s (%s): log rows wait in memory; free some space", path, error.strerror or error)
            self._warned = True

    def _append_csv(self, row: dict[str, Any]) -> None:
        if self._columns is None or not row.keys() <= set(self._columns):
            self._make_csv()
        else:
            columns, self._columns = self._columns, None  # should the append fail, the CSV is made anew next time
            _append(self.csv, _csv(columns, [row]))
            self._columns = columns

    def _make_csv(self) -> None:
        self._columns = None
        rows = read_rows(self.jsonl) if self.jsonl.exists() else []
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows or self.csv.exists():
            write_atomic(self.csv, _csv(columns, [dict(zip(columns, columns, strict=True)), *rows]).encode())
        self._columns = columns


def _line(row: Mapping[str, Any]) -> str:
    """One line of valid JSON: "nan" and "inf" become texts, which float() reads back."""
    valid = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(valid, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
