"""Reads an offline W&B run from its .wandb file: a log in LevelDB's framing whose entries are protobuf records."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, ENTRY_HEADER = 32768, 7, 7


@dataclass
class OfflineRun:
    """What a server would get. history: one dict per log call; config: with values parsed."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def entries(path: Path) -> Iterator[bytes]:
    """The payloads of the log, in order; ends quietly where a killed process stopped writing."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no W&B log"
    at, whole = FILE_HEADER, b""
    while at + ENTRY_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < ENTRY_HEADER:  # the rest of a block that no header fits in
            at += left
            continue
        _crc, size, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + ENTRY_HEADER : at + ENTRY_HEADER + size]
        if len(part) < size or kind == 0:
            return
        at += ENTRY_HEADER + size
        whole = part if kind in (1, 2) else whole + part  # 1 full, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield whole


def read_run(path: Path) -> OfflineRun:
    """Everything the tests ask about."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun()
    for entry in entries(path):
        record = Record()
        record.ParseFromString(entry)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.run_id, found.project, found.group, found.name = run.run_id, run.project, run.run_group, run.display_name
            found.tags = list(run.tags)
            found.config |= _items(run.config.update)
        elif kind == "config":
            found.config |= _items(record.config.update)
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            found.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "files":
            found.files += [file.path for file in record.files.files]
        elif kind == "artifact":
            found.artifacts.append(_artifact(record.artifact))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(_artifact(record.request.log_artifact.artifact))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def finished_run(path: Path, patience_s: float = 10.0) -> OfflineRun:
    """`read_run` of a closed run; W&B's own process may write its last records a little after `finish` has returned."""
    limit = time.monotonic() + patience_s
    while (found := read_run(path)).exit_code is None and time.monotonic() < limit:
        time.sleep(0.05)
    return found


def _artifact(record: Any) -> dict[str, Any]:
    contents = {entry.path: entry.local_path for entry in record.manifest.contents}
    return {"name": record.name, "type": record.type, "contents": contents}


def _items(items: Any) -> dict[str, Any]:
    """Key-value records -> dict; a key of several parts, as of a picture's path and size, makes a dict in the dict."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found
