"""What a run leaves for whoever watches it: events.jsonl, a line for everything that happened to it, and heartbeat.json, where
it is now. Neither can end a run: where they cannot be written, it goes on without them."""

import datetime
import json
import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from src.results import hide_secrets, plain, write_atomic
from src.results.files import append_whole

log = logging.getLogger(__name__)

EVENTS, HEARTBEAT = "events.jsonl", "heartbeat.json"
# started, resumed, saved, not_saved, skipped_step, validation, validation_failed, fault, waits_for_data, stopped, finished


class Events:
    """events.jsonl of a run folder. One object per line, put there whole: time (UTC), pid, event, images_seen, and the facts of
    the event. No value of a key or token gets in. arm: of a run, where it is not the run itself; writes: False for one of
    several processes that does not lead.
    """

    def __init__(self, root: Path, arm: str = "", writes: bool = True):
        self.file, self.arm, self.writes = root / EVENTS, arm, writes
        self._whole = self._warned = False

    def note(self, event: str, images_seen: int | None = None, **facts: Any) -> None:
        """Append a line. What cannot be written is left out, with one warning."""
        if not self.writes:
            return
        row = {"time": _now(), "pid": os.getpid(), "event": event, "images_seen": images_seen}
        row |= {"arm": self.arm} if self.arm else {}
        try:
            if not self._whole:
                _drop_torn_line(self.file)
                self._whole = True
            append_whole(self.file, json.dumps(row | _valid(hide_secrets(facts)), ensure_ascii=False) + "\n")
        except OSError as error:
            if not self._warned:
                log.warning("cannot write %s (%s): the run goes on without it", self.file, error.strerror or error)
            self._warned = True


class Heart:
    """heartbeat.json of a run folder: images_seen, total_images, phase, pid, host and time (UTC), anew every `every_seconds` at
    most. Another process reads from it whether the run is alive, and where."""

    def __init__(self, root: Path, every_seconds: float = 0.0, writes: bool = True):
        self.file, self.every_seconds, self.writes = root / HEARTBEAT, every_seconds, writes
        self._last = -math.inf

    def beat(self, images_seen: int | None, total_images: int | None, phase: str) -> None:
        """Write the file, if it is time."""
        if not self.writes or time.monotonic() - self._last < self.every_seconds:
            return
        self._last = time.monotonic()
        facts = {"images_seen": images_seen, "total_images": total_images, "phase": phase}
        facts |= {"pid": os.getpid(), "host": socket.gethostname(), "time": _now()}
        try:
            write_atomic(self.file, (json.dumps(facts, indent=1) + "\n").encode())
        except OSError as error:
            log.debug("no heartbeat: %s", error)


def last_beat(root: Path) -> dict[str, Any]:
    """heartbeat.json of a run folder; empty where there is none that can be read."""
    try:
        return json.loads((root / HEARTBEAT).read_text())
    except (OSError, ValueError):
        return {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _valid(value: Any) -> Any:
    """Plain values that JSON has: NaN and infinity become texts."""
    if isinstance(value, dict):
        return {str(key): _valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    value = plain(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(file: Path) -> None:
    """Cut what a killed process left behind the last end of a line."""
    if not file.exists() or not file.stat().st_size:
        return
    with open(file, "rb+") as handle:
        data = handle.read()
        if not data.endswith(b"\n"):
            handle.truncate(data.rfind(b"\n") + 1)
