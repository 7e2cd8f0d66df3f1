"""What comes before a training: `python -m src.prepare <verb> ...`.

Without a verb an embedded backbone is trained from nothing: `python -m src.prepare backbone=sd3_tiny`. Whatever is refused
is refused in one line with exit code 2; `check` ends with 1 where it found problems.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import ConfigError, cli, resolve_hardware
from src.config.messages import nearest
from src.construct import construct
from src.data.source import faults_kept
from src.data.tolerant import tolerant
from src.profiling.device import device_name, processor
from src.vocabulary import refused_in_one_line

VERBS = {  # verb -> the configuration that it composes, and what it is for
    "check": ("prepare_check", "counts, sizes, captions and the worst problems of a data set, in seconds"),
    "cache": ("train", "latents, texts and conditions of a training, computed before it: the same words as src.train"),
    "shards": ("prepare_shards", "any source as WebDataset tar shards"),
    "probe": ("prepare_probe", "the detector of depth and joints on scenes, trained from nothing"),
    "speed": ("train", "images per second of the loader, and how long a training step waits for them"),
}
HELP_FLAGS = ("--help", "-h")
# what `check` counts instead of refusing or leaving it out
COUNTED = {"on_bad_sample": "skip", "missing_caption": "empty", "small_images": "upscale", "aspect": "crop"}
SPEED_IMAGES, SPEED_SECONDS, SPEED_STEPS = 256, 3.0, 50  # `speed`: pictures of each format, time of each rate, steps


def main(argv: list[str]) -> None:
    """Run the verb that `argv`, the words behind the module's name, begins with."""
    with refused_in_one_line():
        verb, words = split_verb(argv)
    if any(flag in words for flag in HELP_FLAGS):
        if verb is None:
            print(verbs_help())
        else:
            words = [*words, f"hydra.help.app_name='python -m src.prepare {verb}'"]
    sys.argv[1:] = words
    if verb is not None:
        cli(VERBS[verb][0], globals()[verb])
        return
    from src.embedded.stages import main as make_backbone

    cli("prepare", make_backbone)


def split_verb(argv: list[str]) -> tuple[str | None, list[str]]:
    """-> verb or None, and the other words. Raises UserError for a word that is no verb, or a verb in another place."""
    if argv and argv[0] in VERBS:
        return argv[0], argv[1:]
    if misplaced := [word for word in argv if word in VERBS]:
        raise ConfigError(f"command line: the verb comes first: python -m src.prepare {misplaced[0]} ...")
    if argv and argv[0].replace("_", "").replace("-", "").isalpha() and not argv[0].startswith("-"):
        raise ConfigError(f"command line: {argv[0]} is no verb of src.prepare{nearest(argv[0], VERBS)}")
    return None, argv


def verbs_help() -> str:
    """The verbs, one per line."""
    listed = "\n".join(f"  {verb:<8}{says}" for verb, (_, says) in VERBS.items())
    none = "  (none)  an embedded backbone, trained from nothing; its groups and keys are below"
    hint = "`python -m src.prepare <verb> --help` lists the groups and keys of a verb."
    return f"python -m src.prepare [verb] [group=option] [key=value]\n\n{listed}\n{none}\n\n{hint}\n"


def say(line: str) -> None:
    print(line, flush=True)


def check(cfg: DictConfig) -> None:
    """What is wrong with a data set: lines, and report.json in a run folder. Exit code 1 where there are problems.

    Samples that a training would refuse or replace are counted here, whatever the configuration says of them, and so is what
    would make it refuse the whole: files that belong to none or to several others, and too few images to hold some out.
    """
    from src.data.check import check_sources
    from src.data.check_words import lines
    from src.data.seen import check_seen

    began = time.perf_counter()
    data = OmegaConf.merge(cfg.data, {key: value for key, value in COUNTED.items() if key in cfg.data})
    with faults_kept() as faults:
        sources = {split: construct(data, split=split, resolution=cfg.resolution) for split in ("train", "val")}
    task = construct(cfg.task) if cfg.task else None
    if task is not None:
        check_seen(task, sources["train"])
    report = check_sources(
        sources,
        sample=None if cfg.full else cfg.sample,
        seed=cfg.seed,
        workers=cfg.workers,
        tokenizer=cfg.tokenizer,
        depth_is=cfg.depth_is,
        faults=faults,
        task=task,
    )
    report["seconds"] = round(time.perf_counter() - began, 2)
    report["data"] = OmegaConf.to_container(cfg.data, resolve=True)
    _leave("check", cfg, "report.json", report, lines(report, cfg.worst))
    if report["problems"]:
        raise SystemExit(1)


def cache(cfg: DictConfig) -> None:
    """Fill the caches of a training. A second process shares the work; what a killed one left is completed."""
    import torch

    from src import build

    cfg = resolve_hardware(cfg)
    torch.set_num_threads(cfg.hardware.threads)
    build.quiet()
    made, began = build.plan(cfg), time.perf_counter()
    stores = build.cached(cfg, made, made.backbone.load_codec(build.device_of(cfg)))
    counts = " and ".join(str(len(s.ids)) for s in stores)
    say(f"{counts} samples are cached ({time.perf_counter() - began:.0f} s): src.train with these words encodes nothing more")


def shards(cfg: DictConfig) -> None:
    """A source as WebDataset shards: of both splits, the held-out samples last, or of one. With `data.on_bad_sample=skip` bad
    samples are left out."""
    from src.data.write_shards import reading_words, write_shards

    splits = ("train", "val") if cfg.split == "all" else (cfg.split,)
    made, out = [construct(cfg.data, split=split, resolution=cfg.resolution) for split in splits], Path(cfg.out)
    sources = [tolerant(source, out, cfg.workers, say, leave_out=True) for source in made]
    index = write_shards(sources, out, cfg.shard_mib, cfg.picture, cfg.engine, cfg.workers, say)
    say(f"to read them: {reading_words(index, out, len(sources[-1]))}")


def probe(cfg: DictConfig) -> None:
    """Train the scene probe, and write its weights, recipe and measured quality."""
    from src.embedded.probe import train_probe
    from src.tasks.scene_probe import FOLDER

    folder = train_probe(Path(cfg.cache_dir), cfg.steps, cfg.workers, say, cfg.seed, Path(cfg.out) if cfg.out else FOLDER)
    say(f"{folder}/README.md says how good it is")


def speed(cfg: DictConfig) -> None:
    """Images per second and core of every format and of the caches, and how long a real training step waits for data."""
    import torch

    from src import build
    from src.data.speed import Timed, as_formats, cached_rate, lines, one_core, source_rates

    cfg = resolve_hardware(OmegaConf.merge(cfg, {"budget": {"images": SPEED_STEPS * cfg.budget.effective_batch}}))
    build.quiet()
    one_core()
    made = build.plan(cfg)
    samples = [made.train_source[i] for i in range(min(SPEED_IMAGES, len(made.train_source)))]
    with tempfile.TemporaryDirectory() as folder:
        sources = {f"as it is ({cfg.data.name})": made.train_source, **as_formats(samples, cfg.resolution, Path(folder))}
        formats = {name: source_rates(source, made.task, cfg.seed, SPEED_SECONDS) for name, source in sources.items()}
    world = build.load_world(cfg, made)
    context = build.run_context(cfg, world, Path(cfg.output_dir), Path(cfg.output_dir), [], with_condition=True)
    cached = cached_rate(context.data.train_stream, cfg.hardware.micro_batch, SPEED_SECONDS)
    torch.set_num_threads(cfg.hardware.threads)
    batches = Timed(context.data.train_dataloader())
    build.trainer(cfg, context, []).fit(build.new_adapter(cfg, world.backbone), train_dataloaders=batches)
    found = {
        "resolution": cfg.resolution,
        "task": cfg.task.name,
        "formats": formats,
        **cached,
        "training": {
            **batches.waiting(len(batches.came) // 5),
            "micro_batch": cfg.hardware.micro_batch,
            "workers": cfg.hardware.workers,
            "adapter": cfg.adapter.name,
            "backbone": cfg.backbone.name,
            "accelerator": cfg.hardware.accelerator,
            "torch_threads": torch.get_num_threads(),
        },
    }
    _leave("speed", OmegaConf.merge(cfg, {"name": f"speed_{cfg.name}"}), "speed.json", found, lines(found))


def _leave(verb: str, cfg: DictConfig, name: str, content: dict[str, Any], lines: Iterable[str]) -> None:
    """Print what was found, and leave it as JSON in a new run folder, whose name is the last line."""
    from src.results import origin, write_atomic
    from src.runs import new_run

    folder = new_run(cfg).folder
    told = {**content, **origin(Path(__file__).parent)}
    told["command"] = told["command"].replace("src.prepare", f"src.prepare {verb}", 1)  # `main` has taken it out of sys.argv
    told["machine"] = {"cores": os.cpu_count(), "processor": processor(), "device": _device()}
    write_atomic(folder / name, (json.dumps(told, indent=1) + "\n").encode())
    for line in [*lines, f"numbers: {folder}/{name}", f"run: {folder}"]:
        say(line)


def _device() -> str:
    """What computed: a GPU where this process has used one, else the processor."""
    torch = sys.modules.get("torch")
    return device_name(torch is not None and torch.cuda.is_initialized())


if __name__ == "__main__":
    main(sys.argv[1:])
