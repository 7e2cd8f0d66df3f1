"""Matched step compute: how many images each method may learn from for the same number of FLOPs.

    python -m src.bench.matched unicon,dit_controlnet images=16000 backbone=sd3_tiny task=canny
    python -m src.bench.matched "unicon_half,dit_controlnet blocks=4" images=16000

The first words are the methods, each with keys that differ from its yaml; images: the budget of the first one. The others are
those of src.train. One line is printed for each method, a command that trains it: whole optimizer steps, so that the totals
agree to half a step. What counts is forward, backward and optimizer of a training without recomputed blocks, whatever the
profile, for hardware/ may not change what is compared. No weight is read, nothing is trained.
"""

import shlex
import sys
from collections.abc import Mapping

from src.vocabulary import UserError, refused_in_one_line

PROFILE = "h200"  # of the estimates: any one does, as long as it is the same


def images_for(flops: Mapping[str, float], images: int, step: int) -> dict[str, int]:
    """Method -> images in whole steps of `step`, so that images x FLOPs per image is that of the first method.

    Raises UserError where the first one's budget is less than one step of another.
    """
    total = images * next(iter(flops.values()))
    found = {name: step * round(total / each / step) for name, each in flops.items()}
    if none := [name for name, count in found.items() if not count]:
        raise UserError(f"images={images}: for as many FLOPs {none[0]} makes not one step of {step} images; give more")
    return found


def flops_per_image(adapter: list[str], words: list[str], step: int) -> float:
    """Of a training in which an optimizer step takes `step` images. adapter: its words; words: of src.train."""
    from src.bench.estimate import estimate
    from src.bench.plan import plan
    from src.config import load

    groups = ("backbone", "resolution", "optimizer")
    schedule = ("optimizer.warmup_images", "optimizer.decay")  # costs nothing, and bench has no budget to compare with
    keys = {word: word.partition("=")[0] for word in words}
    kept = [w for w, key in keys.items() if key.partition(".")[0] in groups and key not in schedule]
    cell = plan(load("bench", [*kept, *adapter, f"hardware={PROFILE}", "batch=1"]), lambda line: None)
    flops = estimate(cell)["flops"]
    return flops["frozen_forward"] + flops["adapter_forward"] + flops["backward"] + flops["optimizer"] / step


def split_words(typed: list[str]) -> tuple[dict[str, list[str]], int, list[str]]:
    """-> method -> its words, images, and the words of src.train. Raises UserError."""
    if not typed or "=" in typed[0].split(",")[0].split(" ")[0]:
        raise UserError("name the methods first: python -m src.bench.matched unicon,dit_controlnet images=16000 backbone=...")
    entries = [entry.split() for entry in typed[0].split(",")]
    methods = {" ".join(e): [f"adapter={e[0]}", *(f"adapter.{word}" for word in e[1:])] for e in entries if e}
    if len(methods) < 2:
        raise UserError(f"{typed[0]}: one method has nothing to be matched with; name two or more, with a comma between")
    given = [word for word in typed[1:] if word.startswith("images=")]
    if len(given) != 1 or not given[0].removeprefix("images=").isdigit():
        raise UserError("images= is missing: how many images the first method learns from, such as images=16000")
    rest = [word for word in typed[1:] if word != given[0]]
    if own := [word for word in rest if word.partition("=")[0] in ("adapter", "budget.images")]:
        raise UserError(f"{own[0]}: methods come first, and their images are what is asked for; leave it out")
    return methods, int(given[0].removeprefix("images=")), rest


def main(typed: list[str]) -> None:
    """Print a command for each method, and what it costs."""
    from src import build
    from src.config import load

    methods, images, words = split_words(typed)
    step = load("train", words).budget.effective_batch
    build.quiet()
    flops = {name: flops_per_image(adapter, words, step) for name, adapter in methods.items()}
    found = images_for(flops, images, step)
    for name, count in found.items():
        print(f"# {name}: {flops[name] / 1e9:.4g} GFLOP per image, {count * flops[name] / 1e15:.5g} PFLOP in all")
        print(shlex.join(["python", "-m", "src.train", *methods[name], *words, f"budget.images={count}"]), flush=True)


if __name__ == "__main__":
    with refused_in_one_line():
        main(sys.argv[1:])
