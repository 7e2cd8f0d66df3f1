"""`python -m src.train`, with what every micro-batch held written to SPY_FOLDER, and with a fault where FAULT asks for one.

FAULT="<rank>:<images seen>:<what>": raise, hang, or kill when this rank has learned from so many images.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import src.train
from src.adapters.base import ControlAdapter
from src.config import cli

RANK = os.environ.get("RANK", "0")


def spy(self, batch, number, original=ControlAdapter.training_step):
    parts = zip(batch.index, batch.ids, batch.noise_BCHW, batch.uniform_B.tolist(), strict=True)
    with (Path(os.environ["SPY_FOLDER"]) / f"seen-{RANK}.jsonl").open("a") as file:
        for index, name, noise, t in parts:
            digest = hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest()
            file.write(json.dumps([index, name, digest, t]) + "\n")
    rank, _, rest = os.environ.get("FAULT", "").partition(":")
    if rank == RANK and self.trainer.global_step * self.recipe.effective_batch >= int(rest.partition(":")[0]):
        fail(rest.partition(":")[2])
    return original(self, batch, number)


def fail(what: str) -> None:
    if what == "raise":
        raise ValueError("this rank has had enough")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10_000)


if __name__ == "__main__":
    ControlAdapter.training_step = spy
    cli("train", src.train.main)
