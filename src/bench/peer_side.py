"""One side of the comparison with diffusers' script, in a process of its own: `python -m src.bench.peer_side <spec.json>`.

The side's real program runs until it has made the wanted optimizer steps, watched from outside: torch calls back after every
step of any optimizer. What it says goes to the log; the numbers go into the file that the specification names.
"""

import gc
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from src.bench.flags import torch_flags
from src.bench.measure import Clock
from src.profiling.tracker import GIB, StorageTracker


class Measured(BaseException):
    """Everything wanted is known. Not an Exception, so that no program takes it for one of its own faults."""


class Watch:
    """Counts optimizer steps, and times those behind the warm-up or, on a CPU, finds the largest moment of one of them.

    memory: on a CPU the peak wants a step with every operation watched, which is no step to time: it is then the only one.
    encoded_ms: time in the autoencoder between the marks.
    """

    def __init__(self, device: torch.device, warm_up: int, steps: int, memory: bool):
        self.clock, self.warm_up, self.steps, self.memory = Clock(device), warm_up, steps, memory
        self.marks: list[Any] = []
        self.processor: list[float] = []
        self.encodings: list[tuple[Any, Any]] = []
        self.count = 0
        self.tracker: StorageTracker | None = None

    def after_step(self, *_: Any) -> None:
        """Called by torch behind each optimizer step."""
        self.count += 1
        if self.count < self.warm_up:
            return
        if self.memory:
            self._watch_memory()
            return
        if self.count == self.warm_up and self.clock.on_gpu:
            self.clock.wait()
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(self.clock.mark())
        self.processor.append(time.process_time())
        if self.count == self.warm_up:
            self.encodings.clear()
        if self.count == self.warm_up + self.steps:
            self.clock.wait()
            raise Measured

    def _watch_memory(self) -> None:
        if self.tracker is None:
            gc.collect()
            self.tracker = StorageTracker()
            self.tracker.hold("frozen_weights", [t for t in gc.get_objects() if isinstance(t, torch.Tensor)])
            self.tracker.__enter__()
            return
        self.tracker.__exit__(None, None, None)
        raise Measured

    def time_encoder(self) -> None:
        """Have the autoencoder's `encode` timed: one side calls it in every step, the other before the first."""
        from diffusers import AutoencoderKL

        encode = AutoencoderKL.encode

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.clock.mark()
            out = encode(*args, **kwargs)
            self.encodings.append((began, self.clock.mark()))
            return out

        AutoencoderKL.encode = timed

    def result(self) -> dict[str, Any]:
        """step_ms: each timed step; cpu_ms: the processor's time for all of them, which other programs on the machine do not
        lengthen much; encoder_ms: in the autoencoder; peak_gib: the allocator's on a GPU, live tensors' on a CPU; flags:
        torch's switches as the program has set them."""
        if self.memory:
            return {"peak_gib": sum(self.tracker.peak.values()) / GIB}
        between = self.clock.between_ms
        step_ms = [between(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        found = {"step_ms": step_ms, "encoder_ms": sum(between(*pair) for pair in self.encodings)}
        found["flags"] = torch_flags()
        found["cpu_ms"] = 1000 * (self.processor[-1] - self.processor[0])
        return found | ({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if self.clock.on_gpu else {})


def main(file: str) -> None:
    """Run the side that a specification describes. Its keys: device, threads, script or module, argv, warm_up, steps, memory,
    out. Raises RuntimeError if the program ends before it has made its steps."""
    spec = json.loads(Path(file).read_text())
    torch.set_num_threads(spec["threads"])
    watch = Watch(torch.device(spec["device"]), spec["warm_up"], spec["steps"], spec["memory"])
    watch.time_encoder()
    register_optimizer_step_post_hook(watch.after_step)
    try:
        sys.argv = [spec.get("script", spec.get("module")), *spec["argv"]]
        if "script" in spec:
            runpy.run_path(spec["script"], run_name="__main__")
        else:
            runpy.run_module(spec["module"], run_name="__main__", alter_sys=True)
    except Measured:
        Path(spec["out"]).write_text(json.dumps(watch.result()))
        return
    raise RuntimeError(
        f"{sys.argv[0]} ended after {watch.count} optimizer steps; {spec['warm_up'] + spec['steps']} were wanted"
    )


if __name__ == "__main__":
    main(sys.argv[1])
