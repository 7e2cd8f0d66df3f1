"""Calls that may hang, out of the way of training."""

import queue
import threading
from collections.abc import Callable


class Aside:
    """Makes calls in their order in a thread of its own. Nobody ever waits for one, except in `drain`.

    waiting: how many calls may wait; more of them mean that one hangs. The thread does not keep the process alive.
    """

    def __init__(self, name: str, waiting: int):
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue(waiting)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, call: Callable[[], None]) -> bool:
        """Whether there is room for the call; it handles its own exceptions."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def drain(self, seconds: float) -> bool:
        """Wait for all calls so far, so many seconds at most. -> whether they are done."""
        done = threading.Event()
        try:
            self._calls.put(done.set, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(seconds)

    def _work(self) -> None:
        while True:
            self._calls.get()()
