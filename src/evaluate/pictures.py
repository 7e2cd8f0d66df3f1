"""PNG files that stay: written whole, known by their hashes, and not drawn again as long as they are what was drawn.

A folder has a log, `files.jsonl`, one line per picture that is whole on the disk. Whoever opens the folder reads every file
against it: after a kill the work goes on where it was, and a damaged picture is made again.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.locks import RowLocks
from src.results import read_rows, write_atomic
from src.types import UserError

LOG = "files.jsonl"
SAY_EVERY_S = 10.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Stored:
    """file: path in the folder; sha256: of the file; pixels: hash of what it shows, whatever wrote the PNG."""

    file: str
    sha256: str
    pixels: str


class PictureFolder:
    """The pictures of one folder by name, such as "right/00012.png". files: those that are whole.

    wait: wait for another process that has the folder, else raise UserError. `close` lets others have it.
    """

    def __init__(self, folder: Path, said: Say, wait: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._locks = folder, RowLocks(folder)
        while not self._locks.take(range(1)):
            if not wait:
                raise UserError(f"{folder}: another process is drawing there; wait for it, or give another output_dir")
            said(f"{folder}: another process is working there; waiting for it")
            self._locks.wait(range(1))
        self.files: dict[str, Stored] = {}
        logged, lost = read_rows(folder / LOG) if (folder / LOG).is_file() else [], []
        for stored in (Stored(**row) for row in logged):
            if _sha256(folder / stored.file) == stored.sha256:
                self.files[stored.file] = stored
            else:
                lost.append(stored.file)
        if lost:
            said(f"{folder}: {len(lost)} of {len(logged)} pictures are damaged or gone and made again, such as {lost[0]}")
        lines = "".join(json.dumps(asdict(s)) + "\n" for s in self.files.values())
        write_atomic(folder / LOG, lines.encode())  # without a line that was torn by a kill

    def write(self, name: str, picture: np.ndarray) -> None:
        """Put (H, W, 3) uint8 in place whole, then log it."""
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "png")
        self.put(name, encoded.getvalue(), pixels_hash(picture))

    def put(self, name: str, data: bytes, pixels: str) -> None:
        """`write` of a PNG that is encoded already."""
        write_atomic(self.folder / name, data)
        self.files[name] = Stored(name, hashlib.sha256(data).hexdigest(), pixels)
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(asdict(self.files[name])) + "\n")

    def adopt(self, file: Path, name: str, sha256: str) -> None:
        """Take over a picture from another folder, if it is whole."""
        if _sha256(file) == sha256:
            data = file.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                self.put(name, data, pixels_hash(np.asarray(image.convert("RGB"))))

    def read(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        with Image.open(self.folder / name) as image:
            return np.asarray(image.convert("RGB"))

    def many(self, names: Sequence[str]) -> "Pictures":
        """Some of them as a sequence that reads each when it is asked for."""
        return Pictures(self, names)

    def hashes(self, names: Iterable[str]) -> list[dict[str, str]]:
        """For a manifest: [{file, sha256}], in the order of the names."""
        return [{"file": name, "sha256": self.files[name].sha256} for name in names]

    def close(self) -> None:
        self._locks.close()


class Pictures(Sequence):
    """Pictures (H, W, 3) uint8 on the disk: sets are larger than memories."""

    def __init__(self, folder: PictureFolder, names: Sequence[str]):
        self.folder, self.names = folder, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.folder.read(self.names[row])


class Progress:
    """A line every few seconds: how many of `total`, how fast, how much longer."""

    def __init__(self, what: str, total: int, done: int, said: Say):
        self.what, self.total, self.done, self.said, self.made = what, total, done, said, 0
        self.speeds: list[float] = []  # images per second of each `add` that had any
        self.began = self._last = self._added = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, count: int) -> None:
        self.done, self.made, now = self.done + count, self.made + count, time.monotonic()
        self.speeds += [count / max(1e-9, now - self._added)] if count else []
        self._added = now
        if now - self._last >= SAY_EVERY_S:
            self._last, speed = now, self.made / max(1e-9, now - self.began)
            left = (self.total - self.done) / speed / 60
            self.said(f"{self.what} {self.done}/{self.total} | {speed:.1f} img/s | {left:.1f} min left")


def pixels_hash(picture: np.ndarray) -> str:
    """32 hex digits over shape and values."""
    digest = hashlib.blake2b(repr(picture.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(picture))
    return digest.hexdigest()


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
