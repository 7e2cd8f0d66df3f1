"""A sweep's folder: `sweep.json` says what the sweep is, `cells.jsonl` has a row per cell that ended, `logs/` its words."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.data.locks import NO_LOCKS
from src.results import read_rows, write_atomic
from src.sweep.rows import Row, identity
from src.types import UserError

RECORD, CELLS = "sweep.json", "cells.jsonl"


class SweepFolder:
    """The files of one sweep. lock: the descriptor that keeps other sweeps out; cells inherit it, for as long as they live."""

    def __init__(self, path: Path, resumed: bool):
        self.path, self.resumed, self.lock = path, resumed, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None}  # a descriptor means nothing in the process of another job

    def check_same(self, program: str, overrides: Iterable[str]) -> None:
        """Refuse to go on in a folder that is no sweep's, or another one's."""
        there = self._read()
        known = f"{there['program']} {' '.join(identity(there['overrides']))}"
        given = f"{program} {' '.join(identity(overrides))}"
        if known != given:
            raise UserError(f"sweep.resume={self.path}: another sweep is there: {known}; repeat its words, not: {given}")

    def begin(self, record: Mapping[str, Any]) -> None:
        """Take the folder and say in it what runs: a new one, with a number behind its name where that is taken, or the one
        to go on in. Raises UserError while another process works there."""
        if not self.resumed:
            self._take_new()
            self._write({**record})
            return
        if not self._take():
            raise UserError(f"sweep.resume={self.path}: this sweep, or a cell of it, is still running; wait for it or stop it")
        there = self._read()
        if there["commit"] != record["commit"]:
            print(f"note: {self.path} began at commit {there['commit'][:10]}, what is missing runs at {record['commit'][:10]}")
        news = {key: record[key] for key in ("date", "command", "commit", "dirty")}
        self._write({**there, "resumed": [*there.get("resumed", []), news]})
        self._mend()

    def release(self) -> None:
        """Let another sweep have the folder, when the last cell has ended, too."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def append(self, row: Row) -> None:
        """Add a row in one write under a lock, on the disk before this returns: several machines may share the folder."""
        line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
        with (self.path / CELLS).open("ab", buffering=0) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)  # dropped when the file is closed
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            file.write(line.encode())
            os.fsync(file.fileno())

    def latest(self) -> dict[tuple[str, ...], Row]:
        """The last row of each cell, by its identity."""
        file = self.path / CELLS
        rows = [Row(**{**row, "overrides": tuple(row["overrides"])}) for row in read_rows(file)] if file.exists() else []
        return {identity(row.overrides): row for row in rows}

    def new_log(self, number: int) -> Path:
        """A path for what a cell prints; a cell that runs again has a second one."""
        names = (f"{number}{f'-{again}' if again > 1 else ''}.log" for again in range(1, 10_000))
        return next(path for name in names if not (path := self.path / "logs" / name).exists())

    def _take_new(self) -> None:
        wanted = self.path
        for again in range(1, 100):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._take() and not (self.path / RECORD).exists():
                return
            self.path = wanted.with_name(f"{wanted.name}-{again}")
        raise UserError(f"{wanted} exists a hundred times over; give another output_dir")

    def _take(self) -> bool:
        self.release()
        self.lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def _read(self) -> dict[str, Any]:
        file = self.path / RECORD
        if not file.is_file():
            fault = f"no {RECORD} there; give the folder that a sweep printed as `sweep: ...`"
            raise UserError(f"sweep.resume={self.path}: {fault}")
        return json.loads(file.read_text())

    def _write(self, record: Mapping[str, Any]) -> None:
        write_atomic(self.path / RECORD, (json.dumps(record, indent=1) + "\n").encode())

    def _mend(self) -> None:
        """Cut off a last row that a full disk or a lost machine left without its end."""
        file = self.path / CELLS
        if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
            os.truncate(file, text.rfind(b"\n") + 1)
