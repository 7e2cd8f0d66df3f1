"""Markdown of what `src.bench.speed`, `src.bench.peer` and `src.bench.quantized` have left, so that no table is typed.

    python -m src.bench.markdown runs/bench_gpu

Reads every speed.json, peer.json and quantized.json below the folders, prints a section for each, the oldest first. Cells of
`python -m src.bench` are drawn by `python -m src.report`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src.vocabulary import UserError, refused_in_one_line

MIB = 2**20
WITHOUT_NUMBERS = {"skipped": "skipped", "oom": "out of memory", "failed": "failed"}  # of a switch: its reason stands there


def spread(entry: dict[str, Any], unit: str = "", digits: int = 2) -> str:
    """Median with quartiles; without those where there is one value."""
    middle = f"{entry['median']:.{digits}f}{unit}"
    if entry["n"] == 1:
        return middle
    low, high = entry["quartiles"]
    return f"{middle} [{low:.{digits}f}, {high:.{digits}f}]"


def rows(titles: list[str], cells: list[list[str]]) -> Iterator[str]:
    """A table: words to the left, numbers to the right."""
    yield f"| {' | '.join(titles)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(titles) - 1)])} |"
    for row in cells:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def provenance(told: dict[str, Any]) -> Iterator[str]:
    """Where the numbers come from."""
    dirty = " with changes" if told["git_dirty"] else ""
    torch = told["versions"].get("torch", "unknown")
    yield ""
    yield f"{told['device']}; torch {torch}; commit {told['git_sha'][:12]}{dirty}; {told['date']}; `{told['command']}`"


def of_speed(told: dict[str, Any]) -> Iterator[str]:
    """Each switch against the plain training, in the order of the file; what has no numbers, with its reason below."""
    cfg, switches = told["configuration"], told["switches"]
    size = f"{cfg['resolution']} px, {cfg['hardware']['micro_batch']} images at once, {cfg['hardware']['precision']}"
    yield f"### Switches: {cfg['adapter']['name']} on {cfg['backbone']['name']}, {size}"
    yield ""
    why = {name: kind for name, one in switches.items() for kind in WITHOUT_NUMBERS if kind in one}
    cells = [
        [name, "-", WITHOUT_NUMBERS[why[name]], *["-"] * 3]
        if name in why
        else [
            name,
            spread(one["plain_ms"], digits=1),
            spread(one["step_ms"], digits=1),
            spread(one["ratio"], "x"),
            f"{one['peak_bytes'] / MIB:.0f}",
            f"{one['memory_ratio']:.2f}x",
        ]
        for name, one in switches.items()
        if why.get(name) != "skipped"
    ]
    yield from rows(["switch", "plain, ms", "switched, ms per adapter", "speed", "peak, MiB", "memory"], cells)
    yield ""
    yield "Median [quartiles] of turns; speed above 1x is faster; memory below 1x is less, of all adapters together."
    for name, kind in why.items():
        reason = str(switches[name][kind]).removesuffix(".")
        yield f"{name} {'was skipped' if kind == 'skipped' else WITHOUT_NUMBERS[kind]}: {reason}."
    yield from provenance(told)


def of_peer(told: dict[str, Any]) -> Iterator[str]:
    """Both sides, and ours over the peer's."""
    settings = told["settings"]
    cfg = settings["configuration"]
    size = (
        f"{cfg['resolution']} px, batch {cfg['batch']}, {cfg['hardware']['precision']}, {settings['text_tokens']} text tokens"
    )
    yield f"### Against diffusers' train_controlnet_sd3.py: {cfg['shape']}, {settings['copied_blocks']} copied blocks, {size}"
    yield ""
    cells = []
    for name, side in told["sides"].items():
        ratio = told["ratios"].get(name)
        keys = ("speed", "speed_without_encoder", "speed_by_processor_time")
        compared = ["-"] * 4 if ratio is None else [*(spread(ratio[key], "x") for key in keys), spread(ratio["memory"], "x")]
        cells.append([name, spread(side["images_per_s"]), spread(side["peak_mem_gib"], digits=3), *compared])
    titles = ["side", "images/s", "peak, GiB", "speed", "without its encoder's time", "by processor time", "memory"]
    yield from rows(titles, cells)
    yield ""
    turns = f"{cfg['repetitions']} runs of each side in turns, {cfg['steps']} steps each"
    yield f"Median [quartiles] of {turns}. Memory: {settings['memory']}."
    yield f"Latents: ours {settings['latents']['ours']}; {settings['latents']['diffusers']} by diffusers' script."
    yield from provenance(settings)


def of_quantized(told: dict[str, Any]) -> Iterator[str]:
    """The loss on both backbones and its change."""
    size = f"{told['resolution']} px, {told['precision']}, {told['n']} held-out images"
    yield f"### A backbone in {told['quantize']}: {told['adapter']} on {told['backbone']}, {size}"
    yield ""
    losses = [f"{told[key]['value']:.5f}" for key in ("loss", "quantized_loss")]
    low, high = told["change"]["ci95"]
    change = f"{told['change']['value']:+.2e} [{low:+.2e}, {high:+.2e}]"
    yield from rows(
        ["", "loss, exact", f"loss, {told['quantize']}", "change [95 %], paired", "relative"],
        [[told["run"], *losses, change, f"{told['relative']:+.2%}"]],
    )
    yield from provenance(told)


KINDS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "speed.json": of_speed,
    "peer.json": of_peer,
    "quantized.json": of_quantized,
}


def markdown(folders: list[Path]) -> str:
    """Sections of all files below some folders. Raises UserError for a folder without any, and for a file from before now."""
    found = [file for folder in folders for file in folder.rglob("*.json") if file.name in KINDS]
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: none of {', '.join(KINDS)} is there")
    sections = []
    for file in sorted(found, key=lambda file: (file.parent.name, file.name)):  # folders are named by the time
        try:
            sections.append("\n".join(KINDS[file.name](json.loads(file.read_text()))))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not whole: {error!r}; measure it again") from None
    return "\n\n".join(sections)


if __name__ == "__main__":
    with refused_in_one_line():
        if len(sys.argv) < 2:
            raise UserError("give folders: python -m src.bench.markdown runs/bench_gpu")
        print(markdown([Path(word) for word in sys.argv[1:]]))
