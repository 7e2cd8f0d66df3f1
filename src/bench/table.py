"""Estimates of every full-size cell, in one process: what `python -m src.bench` says of each, without starting it 300 times.

    python -m src.bench.table experiments/cost/estimates

Each cell is left as <folder>/<cell>/results.json with the command that makes it alone. Cells that are there already stay.
Of every method also what drawing one picture takes. Beside them stand the floor (the frozen backbone alone, in training and in
drawing pictures) and, of a method whose gradient crosses the backbone, a training that has forgotten to freeze it (naive).
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class

from src import build
from src.bench.cell import row
from src.bench.estimate import estimate, hollow
from src.bench.plan import plan
from src.config import load
from src.results import write_cost

# copies of half the blocks, then of all of them
U_NET = (("unicon_half",), ("controlnet",), ("unicon",), ("t2i_adapter",), ("control_lora",), ("scedit",))
TRANSFORMER = (("unicon_half",), ("dit_controlnet",), ("unicon",), ("t2i_adapter",), ("control_lora",))
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


def floors() -> Iterator[list[str]]:
    """The same of the frozen backbone alone; its adapter is named by nothing but the yaml that the configuration wants."""
    for backbone, side in PLACES:
        for what in ("training", "inference"):
            yield [f"backbone={backbone}", "adapter=unicon", f"resolution={side}", "floor=true", f"what={what}"]


def main(out: Path, places: Iterable[list[str]] = ()) -> None:
    """Write what is missing of the table into a folder. places: instead of all `cells` and `floors`."""
    torch.set_num_threads(1)
    build.quiet()
    for words in places or (*cells(), *floors()):
        floor, built = "floor=true" in words, None
        for scope in SCOPES[:1] if floor else SCOPES:
            for batch in BATCHES:
                line = [*words, "hardware=h200", f"batch={batch}", f"hardware.checkpointing={scope}"]
                built = one(out, line, built)
        if floor:
            continue
        built = one(out, [*words, "hardware=h200", "batch=1", "what=inference"], built)
        if get_class(load("bench", words).adapter._target_).grad_through_backbone:
            built = None  # what was thawed once stays so
            for batch in BATCHES:
                built = one(out, [*words, "hardware=h200", f"batch={batch}", "naive=true"], built)


def one(out: Path, line: list[str], built: Any) -> Any:
    """Write a cell, unless it is there. built: networks of another batch or scope, if there are any. -> those to go on with."""
    folder = out / folder_name(line)
    if (folder / "results.json").exists():
        return built
    began = time.process_time()
    cell = plan(load("bench", line), lambda said: None)
    built = built or hollow(cell)
    if not cell.cfg.floor:
        built.checkpointing = cell.cfg.hardware.checkpointing
    made = replace(row(cell, built, estimate(cell, built)), command="python -m src.bench " + " ".join(line))
    write_cost(folder / "results.json", made)
    print(f"{folder.name}: {made.peak_mem_gib:.1f} GiB, {time.process_time() - began:.1f} s", flush=True)
    return built


def folder_name(line: list[str]) -> str:
    """The values of a cell's words, and the name of a word that is only true; the floor has no adapter."""
    left_out = ("hardware=", "adapter=") if "floor=true" in line else ("hardware=",)
    words = [word.partition("=") for word in line if not word.startswith(left_out)]
    return "_".join(name if value == "true" else value for name, _, value in words)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: give the folder for the table: python -m src.bench.table experiments/cost/estimates")
    main(Path(sys.argv[1]))
