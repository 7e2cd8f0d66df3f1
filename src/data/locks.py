"""Several processes may fill one folder: none does what another is doing, and no file is seen before it is whole.

The kernel drops a lock with the process that holds it, so nothing goes stale: what a killed process had begun is free at
once. Locks are POSIX record locks (`fcntl`), which network file systems carry between machines.
"""

import errno
import fcntl
import os
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class RowLocks:
    """Locks on ranges of rows, as bytes of the file `.locks` in a folder; one object per folder and process.

    work: False on a file system without locks. Every range is granted there: two processes may then compute the same rows,
    and put equal files in place one after the other.
    """

    def __init__(self, folder: Path):
        self.path, self.work = folder / ".locks", True
        self._file: int | None = None

    def take(self, rows: range) -> bool:
        """Whether the rows are now this process's. Never waits."""
        return self._call(fcntl.LOCK_EX | fcntl.LOCK_NB, rows)

    def wait(self, rows: range) -> None:
        """Return when no other process holds the rows; they are not taken. Hold no rows meanwhile: the other may want them."""
        self._call(fcntl.LOCK_EX, rows)
        self.release(rows)

    def release(self, rows: range) -> None:
        """Let others have the rows."""
        self._call(fcntl.LOCK_UN, rows)

    def close(self) -> None:
        """Release every row."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _call(self, operation: int, rows: range) -> bool:
        """False where another process holds one of the rows."""
        try:
            fcntl.lockf(self._open(), operation, len(rows), rows.start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
            self.work = False
        return True

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self._file


class WholeFile:
    """A temporary path that becomes `target` when the block ends well, and vanishes when it does not."""

    def __init__(self, target: Path):
        self.target = target
        self.part = target.with_name(f".{target.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                os.replace(self.part, self.target)
        finally:
            self.part.unlink(missing_ok=True)
