"""`python -m src.train`, with what every micro-batch held written to SPY_FOLDER, and with a fault where FAULT asks for one.

FAULT="<rank>:<images seen>:<what>": raise, hang, or kill when this rank has learned from so many images; nowhere: it cannot
write checkpoints from the beginning. THAW=1: parameters that cannot matter are trained, too.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import src.train.flow
from src.adapters.base import ControlAdapter
from src.checkpoint import AdapterCheckpointIO
from src.config import cli

RANK = os.environ.get("RANK", "0")


def spy(self, batch, number, original=ControlAdapter.training_step):
    parts = zip(batch.index, batch.ids, batch.noise_BCHW, batch.uniform_B.tolist(), strict=True)
    with (Path(os.environ["SPY_FOLDER"]) / f"seen-{RANK}.jsonl").open("a") as file:
        for index, name, noise, t in parts:
            digest = hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest()
            file.write(json.dumps([index, name, digest, t]) + "\n")
    rank, _, rest = os.environ.get("FAULT", "").partition(":")
    images, _, what = rest.partition(":")
    if rank == RANK and what != "nowhere" and self.trainer.global_step * self.recipe.effective_batch >= int(images):
        fail(what)
    return original(self, batch, number)


def nowhere(*_args, **_more) -> None:
    raise OSError("nowhere to write")


def fail(what: str) -> None:
    if what == "raise":
        raise ValueError("this rank has had enough")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10_000)


if __name__ == "__main__":
    ControlAdapter.training_step = spy
    if os.environ.get("THAW"):
        ControlAdapter.freeze_unreached = lambda self, names: None
    if os.environ.get("FAULT", "").endswith(":nowhere"):
        AdapterCheckpointIO.save_checkpoint = nowhere
    cli("train", src.train.flow.main)
