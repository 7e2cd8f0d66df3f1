"""What becomes of a run when some of its samples are bad: each is replaced by a good one, and listed.

A truncated picture is found by reading it only, and a row's caption must be its picture's, so every sample is read once
before the first is used. What was found is kept by the source's fingerprint, and costs nothing the next time; files that the
system would not give, for want of a permission or of a connection, are asked for again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from src.data.locks import WholeFile
from src.data.source import BadSample, Probe, Source
from src.tasks.base import Task
from src.types import Sample, UserError

Why = tuple[str, str, bool]  # reason, fix, whether the next try may do


class TolerantSource(Source):
    """A source whose bad rows give another row's sample: image, signals, caption and id alike, whoever asks.

    replaced: bad row -> the next good one behind it, counted on from the start after the last. The length stays, so a
    position means the same row as without bad samples.
    """

    def __init__(self, source: Source, replaced: dict[int, int]):
        self.source, self.replaced = source, replaced
        self.name, self.resolution, self.signals, self.copies = source.name, source.resolution, source.signals, source.copies
        self.on_bad_sample, self.max_bad_share = source.on_bad_sample, source.max_bad_share
        self.are_scenes = source.are_scenes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self._good(index)]

    def describe(self, index: int) -> tuple[str, str]:
        return self.source.describe(self._good(index))

    def size_of(self, index: int) -> tuple[int, int]:
        return self.source.size_of(self._good(index))

    def probe(self, index: int) -> Probe:
        return self.source.probe(self._good(index))

    def fingerprint(self) -> str:
        """The source's own where nothing is replaced."""
        return self.source.fingerprint() + self._skips()

    def pictures_fingerprint(self) -> str:
        return self.source.pictures_fingerprint() + self._skips()

    def _skips(self) -> str:
        if not self.replaced:
            return ""
        pairs = hashlib.blake2b(f"{sorted(self.replaced.items())}".encode(), digest_size=6).hexdigest()
        return f"-skips{len(self.replaced)}-{pairs}"

    def _good(self, index: int) -> int:
        return self.replaced.get(index, index)


def tolerant(
    source: Source, folder: Path, workers: int = 0, say: Callable[[str], None] = print, tasks: Sequence[Task] = ()
) -> Source:
    """The source as its `on_bad_sample` wants it: itself, or with bad samples replaced.

    folder: where the list of bad samples is kept, `skipped-<key>.jsonl`, one object per bad row: id, reason, fix,
    replaced_by, row, by_row, passing. tasks: those that will make conditions of maps that come with the data; a map from
    which one of them can make none is bad, too. Raises UserError with the list if more than `max_bad_share` are bad.
    """
    if source.on_bad_sample == "raise":
        return source
    readers = [task for task in tasks if task.signal in source.signals]
    key = [source.fingerprint(), *sorted(f"{sorted(task.settings().items())}" for task in readers)]
    file = folder / f"skipped-{hashlib.blake2b('|'.join(key).encode(), digest_size=8).hexdigest()}.jsonl"
    if not file.is_file():
        say(f"data.on_bad_sample=skip: reading all {len(source)} samples of {source.name} once, to find the bad ones")
        _write(file, find_bad(source, workers, readers))
    skipped = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if passing := [s["row"] for s in skipped if s["passing"]]:
        still = _reasons(source, [row for row in passing if row % source.copies == 0], workers, readers)
        bad = {s["row"]: (s["reason"], s["fix"], False) for s in skipped if not s["passing"]} | still
        if len(bad) < len(skipped):
            say(f"{len(skipped) - len(bad)} of {len(skipped)} bad samples of {source.name} can be read now")
        skipped = _listed(source, bad)
        _write(file, skipped)
    if len(skipped) > source.max_bad_share * len(source):
        first = ", ".join(f"{s['id']} ({s['reason']})" for s in skipped[:10])
        raise UserError(
            f"{len(skipped)} of {len(source)} samples are bad, more than data.max_bad_share={source.max_bad_share:g}: {first}; "
            f"all stand in {file}; mend them, or allow a larger share"
        )
    if skipped:
        say(f"{len(skipped)} of {len(source)} samples of {source.name} are bad and replaced by the next good ones: {file}")
    return TolerantSource(source, {s["row"]: s["by_row"] for s in skipped})


def find_bad(source: Source, workers: int, tasks: Sequence[Task] = ()) -> list[dict[str, Any]]:
    """Read every sample, and list the bad ones in their order: see `tolerant`. Without a good one, nothing replaces them."""
    return _listed(source, _reasons(source, range(0, len(source), source.copies), workers, tasks))


def _reasons(source: Source, rows: Sequence[int], workers: int, tasks: Sequence[Task]) -> dict[int, Why]:
    """The bad ones of some rows and of their copies, with the reason, the fix, and whether it may pass by itself."""
    reasons = DataLoader(_Reasons(source, rows, tasks), batch_size=None, num_workers=workers)
    return {row + k: why for row, why in zip(rows, reasons, strict=True) if why for k in range(source.copies)}


def _listed(source: Source, bad: dict[int, Why]) -> list[dict[str, Any]]:
    found = []
    for row, (reason, fix, passing) in sorted(bad.items()):
        by = next((r % len(source) for r in range(row + 1, row + len(source)) if r % len(source) not in bad), None)
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
