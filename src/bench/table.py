"""Estimates of every full-size cell, in one process: what `python -m src.bench` says of each, without starting it 207 times.

    python -m src.bench.table experiments/cost/estimates

Each cell is left as <folder>/<cell>/results.json with the command that makes it alone. Cells that are there already stay.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from src import build
from src.bench.cell import row
from src.bench.estimate import estimate, hollow
from src.bench.plan import plan
from src.config import load
from src.results import write_cost

# copies of half the blocks, then of all of them
U_NET = (("unicon_half",), ("controlnet",), ("unicon",), ("t2i_adapter",))
TRANSFORMER = (("unicon_half",), ("dit_controlnet",), ("unicon",), ("t2i_adapter",))
ALL_BLOCKS = {"pixart_alpha": 27, "sd3_medium": 23}  # DiT-ControlNet copies so many at most: the last one has no successor
PLACES = (("pixart_alpha", 512), ("sd3_medium", 512), ("sd3_medium", 1024), ("sd21", 512), ("sdxl", 1024))
BATCHES, SCOPES = (1, 4, 8), ("none", "adapter", "both")


def cells() -> Iterator[list[str]]:
    """The overrides of each cell but batch and checkpointing: backbone, resolution and adapter."""
    for backbone, side in PLACES:
        last = ALL_BLOCKS.get(backbone)
        adapters = U_NET if last is None else (*TRANSFORMER, ("dit_controlnet", f"blocks={last}", "index_rule=one_to_one"))
        for name, *options in adapters:
            yield [f"backbone={backbone}", f"adapter={name}", *(f"adapter.{o}" for o in options), f"resolution={side}"]


def main(out: Path) -> None:
    """Write what is missing of the table into a folder."""
    torch.set_num_threads(1)
    build.quiet()
    for words in cells():
        built = None
        for batch in BATCHES:
            for scope in SCOPES:
                line = [*words, "hardware=h200", f"batch={batch}", f"hardware.checkpointing={scope}"]
                folder = out / "_".join(word.partition("=")[2] for word in line if not word.startswith("hardware="))
                if (folder / "results.json").exists():
                    continue
                began = time.process_time()
                cell = plan(load("bench", line), lambda said: None)
                built = built or hollow(cell)  # the same networks for every batch and scope
                built.checkpointing = scope
                made = replace(row(cell, built, estimate(cell, built)), command="python -m src.bench " + " ".join(line))
                write_cost(folder / "results.json", made)
                print(f"{folder.name}: {made.peak_mem_gib:.1f} GiB, {time.process_time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: give the folder for the table: python -m src.bench.table experiments/cost/estimates")
    main(Path(sys.argv[1]))
