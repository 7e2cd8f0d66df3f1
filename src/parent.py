"""Processes that end when the one that started them is killed: nobody else would tell them."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor

LOOKS_EVERY_S = 1.0


def end_with(parent: int) -> None:
    """End this process, in the midst of whatever it does, once the process `parent` is not its parent any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watches-parent").start()


def worker_pool(workers: int, spawn: bool = False) -> ProcessPoolExecutor:
    """A pool of so many processes. Python's own would work on without this one, and then wait for more work forever.

    spawn: fresh interpreters, for work with torch's threads.
    """
    context = multiprocessing.get_context("spawn") if spawn else None
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with, initargs=(os.getpid(),))
