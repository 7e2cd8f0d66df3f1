"""The first 20 losses of every cell, as they were: `python -m tests.golden` writes golden_losses.json anew.

Random latents and conditions, captions of scenes, the cell's own optimizer settings at a fixed rate. Whoever changes a
number here on purpose writes the file anew and says why.
"""

import json
import platform
from pathlib import Path

import torch

from src import build
from src.construct import construct
from src.support import matrix
from tests.conftest import CPU
from tests.contract.registry import EMBEDDED_BACKBONES, configured, node
from tests.contract.test_adapters import make_batch

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 20
CELLS = [f"{a}-{b}" for a, row in matrix().items() for b in EMBEDDED_BACKBONES if row[b] is None]


def machine() -> str:
    """What decides the last bits of a sum: processor, instructions and torch. Several generations share a model's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {}
    for key, _, value in (line.partition(":") for line in lines):
        told.setdefault(key.strip(), value.strip())
    name = " ".join([told.get("model name", platform.processor()), *(told.get(key, "") for key in ("cpu family", "model"))])
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def losses(cell: str) -> list[float]:
    """STEPS losses of one cell, trained on one batch of two."""
    adapter_name, base = cell.split("-")
    backbone = construct(node("backbone", base)).load(CPU, torch.float32)
    text = backbone.encode_text(["a large red ball, gray floor", "a small blue cube, dark floor"], CPU)
    cfg = configured("train", f"adapter={adapter_name}", f"backbone={base}", "hardware=cpu")
    adapter = build.new_adapter(cfg, backbone, training=False)
    batch = make_batch(adapter, backbone, text)
    optimizer, found = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], 5e-4), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = adapter.losses(batch).mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {"machine": machine(), "losses": {cell: losses(cell) for cell in CELLS}}
    FILE.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{FILE}: {len(CELLS)} cells")
