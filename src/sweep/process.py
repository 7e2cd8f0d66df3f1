"""A cell as a process of its own: started in a group of its own, watched, stopped, and judged by how it ended."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.results import scrub

WARNING = signal.SIGUSR2  # how submitit has Slurm warn a job before its time is over
REFUSAL = "error: "  # how an entry begins the line that says what it refuses
TAIL_BYTES = 64 * 1024  # of a log: what is read back of it
_OF_A_LIST = re.compile(r"  \d+\. ")  # a line of the list of problems that an entry refuses at once
_OUT_OF_MEMORY = re.compile(r"^[\w.]*(OutOfMemoryError|MemoryError)\b|out of memory|can't allocate memory|not enough memory")


@dataclass(frozen=True)
class Ending:
    """code: as `subprocess` gives it, -n for signal n; timed_out: whether it was ended because its time was over."""

    code: int
    seconds: float
    timed_out: bool


@dataclass(frozen=True)
class Verdict:
    """An ending in the words of a row."""

    status: str
    exit_code: int
    signal: str | None
    error: str | None
    run: str | None


class CellProcess:
    """One started cell. Raises OSError where the machine cannot start one.

    inherit: file descriptors that the process keeps open, and with them a lock, should the parent die before it.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: dict[str, str],
        timeout_s: float | None,
        grace_s: float,
        inherit: Sequence[int] = (),
    ):
        # a killed process loses what it had not flushed, and a crashed one says where only if it is asked to
        env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **env}
        self.log, self._grace_s, self._told = log, grace_s, None
        self._began, self._limit_s, self._timed_out = time.monotonic(), timeout_s, False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("xb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=tuple(inherit),
                preexec_fn=_leave_to_the_launcher,  # noqa: PLW1509 (one call, and no lock is taken in it)
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> Ending | None:
        """How it ended, or None while it runs. Enforces the time limit, so call it often."""
        code, now = self._process.poll(), time.monotonic()
        if code is not None:
            if self._told is not None:
                self._kill_group()  # its workers, if it left any
            scrub(self.log)
            return Ending(code, now - self._began, self._timed_out)
        if self._told is None and self._limit_s is not None and now - self._began > self._limit_s:
            self._timed_out = True
            self.stop()
        elif self._told is not None and now - self._told > self._grace_s:
            self._kill_group()
        return None

    def wait(self, every_s: float = 0.1) -> Ending:
        """Block until it ended. Whatever interrupts the waiting ends the process, too."""
        try:
            while (ending := self.poll()) is None:
                time.sleep(every_s)
            return ending
        except BaseException:
            self.stop()
            while self.poll() is None:
                time.sleep(every_s)
            raise

    @contextlib.contextmanager
    def ending_first(self, number: int) -> Iterator[None]:
        """Inside, a signal that a launcher has a handler for ends this process first, and waits until it has saved: the handler
        may give the machine back. number: of the signal."""
        before = signal.getsignal(number)
        if not callable(before) or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ended(found: int, frame: object) -> None:
            self.stop()
            while self.poll() is None:
                time.sleep(0.1)
            before(found, frame)

        signal.signal(number, ended)
        try:
            yield
        finally:
            signal.signal(number, before)

    def stop(self) -> None:
        """Ask it to end; `poll` kills its whole group when the grace is over. A second call does not wait for that."""
        if self._told is None:
            self._told = time.monotonic()
            self._process.send_signal(signal.SIGTERM)  # not to its workers: it may need them to finish a step
        else:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _leave_to_the_launcher() -> None:
    """A scheduler warns all processes of a job at once: what follows from it, its launcher tells this one."""
    signal.signal(WARNING, signal.SIG_IGN)


def judge(ending: Ending, log: Path, limit_s: float | None) -> Verdict:
    """Status, signal, error line and run folder of an ended cell, from its exit code and the end of its log.

    The exit code is told as a shell does: 128 + n after signal n.
    """
    lines = tail(log)
    run = next((line.removeprefix("run: ").strip() for line in reversed(lines) if line.startswith("run: ")), None)
    named, culprit = _signal_of(ending.code), error_line(lines) or ""
    says = culprit.removeprefix(REFUSAL)
    aborted_in_c = named == "SIGABRT" and any("bad_alloc" in line for line in lines)
    code = ending.code if ending.code >= 0 else 128 - ending.code
    if ending.timed_out:
        status, error = "timeout", f"not finished after {limit_s:g} s"
    elif ending.code == 0:
        status, error = "done", None
    elif named == "SIGKILL":
        status, error = "killed", "killed (SIGKILL): most often the kernel's out-of-memory killer"
    elif code == 2 and culprit.startswith(REFUSAL):
        status, error = "refused", says
    elif aborted_in_c or _OUT_OF_MEMORY.search(says):
        status, error = "oom", says or "std::bad_alloc"
    elif named:
        status, error = "killed", f"killed ({named})"
    else:
        last = says or (f"its last line was {lines[-1]!r}" if lines else "it printed nothing")
        status, error = "failed", f"exit code {code}: {last}"
    return Verdict(status, code, named, error, run)


def _signal_of(code: int) -> str | None:
    """The signal behind an exit code: of `subprocess` (-15), or as a shell and `src.train` tell it (143)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in {s.value for s in signal.Signals} else None


def tail(log: Path) -> list[str]:
    """The last lines of a log, without the blank ones."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def error_line(lines: Sequence[str]) -> str | None:
    """What went wrong, in one line: the last refusal, or the exception of the last traceback; None without either."""
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(REFUSAL):  # with the list that may belong to it
            parts = itertools.takewhile(_OF_A_LIST.match, lines[number + 1 :])
            return " ".join([lines[number], *(part.strip() for part in parts)])
        if lines[number].startswith("Traceback (most recent call last)"):
            return next((line for line in lines[number + 1 :] if not line[0].isspace()), lines[-1])
    return None
