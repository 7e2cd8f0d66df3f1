"""Files of results: replaced in one step, and read back with the fault named."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from src.results.checks import ResultError

Row = TypeVar("Row")


def write_row(path: str | Path, row: Any, check: Callable[[Mapping[str, Any]], Any]) -> None:
    """Check a row (a dataclass or a mapping) and put it at `path` in one step: the old file stays whole until the new one is
    on the disk. Raises ResultError naming the field that is missing, unknown, of the wrong kind or not finite."""
    checked = check(asdict(row) if is_dataclass(row) else row)
    write_atomic(Path(path), (json.dumps(asdict(checked), indent=2, allow_nan=False) + "\n").encode())


def read_row(path: str | Path, check: Callable[[Mapping[str, Any]], Row]) -> Row:
    """Read and check one results.json. Raises ResultError naming the file and the field."""
    try:
        return check(_parsed(path))
    except ResultError as error:
        raise error if str(path) in str(error) else ResultError(f"{path}: {error}") from None


def kind_of(path: str | Path) -> str:
    """The kind of a results.json: "train" where it says none. Raises ResultError for a file that cannot be read."""
    raw = _parsed(path)
    return str(raw.get("kind", "train")) if isinstance(raw, dict) else "train"


def _parsed(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}; give the path of a results.json") from None
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}); it was cut off or edited: run the evaluation again") from None


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename: a reader or a crash sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_whole(path: Path, text: str) -> None:
    """All of the text or nothing of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(data) == len(data):
                return
            raise OSError(28, "no space left on device")
        except OSError:
            file.truncate(start)
            raise


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log. A torn last line, left by a killed process, is left out; any other is a ResultError."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line and number < len(lines):
                raise ResultError(f"{path}, line {number} is not JSON: {line[:60]!r}; mend or delete the line") from None
    return rows
