"""What becomes of a run when some of its samples are bad: each is replaced by a good one, or left out, and listed.

Replaced where a training reads, so that a position means the same row as without bad samples. Left out where samples are
counted or written, for a second copy of one would count twice.

A truncated picture is found by reading it only, and a row's caption must be its picture's, so every sample is read once
before the first is used. What was found is kept by the source's fingerprint, and costs nothing the next time; files that the
system would not give, for want of a permission or of a connection, are asked for again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from src.data.locks import WholeFile
from src.data.source import BadSample, Probe, Source
from src.tasks.base import Task
from src.types import Sample, UserError

Why = tuple[str, str, bool]  # reason, fix, whether the next try may do


class _Chosen(Source):
    """Some rows of a source: image, signals, caption and id alike, whoever asks. rows: of the source; mark: part of the
    fingerprint, empty where the rows are the source's own."""

    def __init__(self, source: Source, rows: np.ndarray, mark: str):
        self.source, self.rows, self.mark = source, rows, mark
        self.name, self.resolution, self.signals, self.copies = source.name, source.resolution, source.signals, source.copies
        self.on_bad_sample, self.max_bad_share = source.on_bad_sample, source.max_bad_share
        self.are_scenes = source.are_scenes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._row(index)]

    def describe(self, index: int) -> tuple[str, str]:
        return self.source.describe(self._row(index))

    def size_of(self, index: int) -> tuple[int, int]:
        return self.source.size_of(self._row(index))

    def probe(self, index: int) -> Probe:
        return self.source.probe(self._row(index))

    def fingerprint(self) -> str:
        """The source's own where no sample is bad."""
        return self.source.fingerprint() + self.mark

    def pictures_fingerprint(self) -> str:
        return self.source.pictures_fingerprint() + self.mark

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        return int(self.rows[index])


class TolerantSource(_Chosen):
    """A source whose bad rows give another row's sample.

    replaced: bad row -> the next good one behind it, counted on from the start after the last. The length stays, so a
    position means the same row as without bad samples.
    """

    def __init__(self, source: Source, replaced: dict[int, int]):
        rows = np.arange(len(source))
        rows[list(replaced.keys())] = list(replaced.values())
        super().__init__(source, rows, _mark("skips", sorted(replaced.items())))
        self.replaced = replaced


class GoodSource(_Chosen):
    """A source without its bad rows: those behind one move up. left_out: the bad rows."""

    def __init__(self, source: Source, left_out: Sequence[int]):
        super().__init__(source, np.delete(np.arange(len(source)), list(left_out)), _mark("without", sorted(left_out)))
        self.left_out = tuple(left_out)


def _mark(word: str, rows: Sequence[Any]) -> str:
    return f"-{word}{len(rows)}-{hashlib.blake2b(f'{rows}'.encode(), digest_size=6).hexdigest()}" if rows else ""


def tolerant(
    source: Source,
    folder: Path,
    workers: int = 0,
    say: Callable[[str], None] = print,
    tasks: Sequence[Task] = (),
    leave_out: bool = False,
) -> Source:
    """The source as its `on_bad_sample` wants it: itself, or with bad samples replaced, or left out where `leave_out`.

    folder: where the list of bad samples is kept, `skipped-<key>.jsonl`, one object per bad row: id, reason, fix,
    replaced_by, row, by_row, passing. tasks: those that will make conditions of maps that come with the data; a map from
    which one of them can make none is bad, too. Raises UserError with the list if more than `max_bad_share` are bad.
    """
    return without(source, bad_rows(source, folder, workers, say, tasks, leave_out), leave_out)


def without(source: Source, skipped: Sequence[dict[str, Any]], leave_out: bool) -> Source:
    """A source without what `bad_rows` found in it; itself where it is to raise."""
    if source.on_bad_sample == "raise":
        return source
    if leave_out:
        return GoodSource(source, [s["row"] for s in skipped])
    return TolerantSource(source, {s["row"]: s["by_row"] for s in skipped})


def bad_rows(
    source: Source,
    folder: Path,
    workers: int,
    say: Callable[[str], None],
    tasks: Sequence[Task],
    leave_out: bool,
    beat: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The list of bad samples, read or made; see `tolerant`. Nothing is bad where the source is to raise. beat: is called
    after each sample that was read."""
    if source.on_bad_sample == "raise":
        return []
    readers = [task for task in tasks if task.signal in source.signals]
    key = [source.fingerprint(), *sorted(f"{sorted(task.settings().items())}" for task in readers)]
    key += ["left out"] if leave_out else []
    file = folder / f"skipped-{hashlib.blake2b('|'.join(key).encode(), digest_size=8).hexdigest()}.jsonl"
    if not file.is_file():
        say(f"data.on_bad_sample=skip: reading all {len(source)} samples of {source.name} once, to find the bad ones")
        _write(file, _listed(source, _reasons(source, range(0, len(source), source.copies), workers, readers, beat), leave_out))
    skipped = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if passing := [s["row"] for s in skipped if s["passing"]]:
        still = _reasons(source, [row for row in passing if row % source.copies == 0], workers, readers, beat)
        bad = {s["row"]: (s["reason"], s["fix"], False) for s in skipped if not s["passing"]} | still
        if len(bad) < len(skipped):
            say(f"{len(skipped) - len(bad)} of {len(skipped)} bad samples of {source.name} can be read now")
        skipped = _listed(source, bad, leave_out)
        _write(file, skipped)
    count = len(source)
    if len(skipped) > source.max_bad_share * count:
        first = ", ".join(f"{s['id']} ({s['reason']})" for s in skipped[:10])
        raise UserError(
            f"{len(skipped)} of {count} samples are bad, more than data.max_bad_share={source.max_bad_share:g}: {first}; "
            f"all stand in {file}; mend them, or allow a larger share"
        )
    if skipped:
        what = f"left out, and {count - len(skipped)} stay" if leave_out else "replaced by the next good ones"
        say(f"{len(skipped)} of {count} samples of {source.name} are bad and {what}: {file}")
    return skipped


def _reasons(
    source: Source, rows: Sequence[int], workers: int, tasks: Sequence[Task], beat: Callable[[], None]
) -> dict[int, Why]:
    """The bad ones of some rows and of their copies, with the reason, the fix, and whether it may pass by itself."""
    found = {}
    for row, why in zip(rows, DataLoader(_Reasons(source, rows, tasks), batch_size=None, num_workers=workers), strict=True):
        found |= {row + k: why for k in range(source.copies)} if why else {}
        beat()
    return found


def _listed(source: Source, bad: dict[int, Why], leave_out: bool) -> list[dict[str, Any]]:
    """The bad ones in their order; nothing replaces one that is left out, or where none is good."""
    found = []
    for row, (reason, fix, passing) in sorted(bad.items()):
        behind = () if leave_out else range(row + 1, row + len(source))
        by = next((r % len(source) for r in behind if r % len(source) not in bad), None)
        other = None if by is None else source.describe(by)[0]
        why = {"id": source.describe(row)[0], "reason": reason, "fix": fix}
        found.append({**why, "replaced_by": other, "row": row, "by_row": by, "passing": passing})
    return found


class _Reasons(Dataset):
    """Why a row cannot be used, None where it can. A class of its own, so that workers can do the reading."""

    def __init__(self, source: Source, rows: Sequence[int], tasks: Sequence[Task]):
        self.source, self.rows, self.tasks = source, rows, tasks

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Why | None:
        try:
            sample = self.source[self.rows[i]]
            for task in self.tasks:
                task.condition_of(sample, 0)  # a given map leaves nothing to draw
        except BadSample as bad:
            return f"{bad.id}: {bad.reason}", bad.fix, _may_pass(bad)
        except UserError as bad:
            return str(bad), "give a map that the task can read", False
        return None


def _may_pass(bad: BadSample) -> bool:
    """Whether the system would not give the file, and may do so another time: it says so by a number."""
    error: BaseException | None = bad
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__ or error.__context__
    return bad.reason.startswith("cannot be opened")  # a worker's copy of the error knows no cause


def _write(file: Path, found: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with WholeFile(file) as part:
        part.write_text("".join(json.dumps(f, ensure_ascii=False) + "\n" for f in found), encoding="utf-8")
