"""How fast samples come: from each format, from the caches, and to a training step that waits for them."""

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from src.data.datamodule import ImageStream
from src.data.folder import FolderSource
from src.data.shard_plan import PICTURES
from src.data.shards import ShardSource
from src.data.source import Source
from src.data.write_shards import write_shards
from src.spread import spread
from src.tasks.base import Task
from src.types import Sample

PARTS = 5  # of every measurement, which its quartiles are taken of
HELD_OUT = 1  # the least that a source of files holds out


def as_formats(samples: list[Sample], resolution: int, folder: Path) -> dict[str, Source]:
    """The same pictures and captions in every format that this machine can read, written below `folder`.

    Signals are left out, so that all read the same. hub is there where the package `datasets` is.
    """
    common = {"val_images": HELD_OUT, "split": "train", "resolution": resolution}
    made: dict[str, Source] = {}
    for form, options in PICTURES.items():
        place = folder / f"folder_{form}"
        place.mkdir(parents=True)
        for i, sample in enumerate(samples):
            Image.fromarray(sample.image).save(place / f"{i:06d}.{form}", **options)
            (place / f"{i:06d}.txt").write_text(sample.caption or "a picture", encoding="utf-8")
        made[f"folder, {form}"] = FolderSource(name="folder", path=str(place), **common)
    files, table = folder / "folder_png", folder / "table.jsonl"
    rows = [{"file_name": f"{i:06d}.png", "text": sample.caption or "a picture"} for i, sample in enumerate(samples)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["folder with a table, png"] = FolderSource(name="folder", path=str(files), table=str(table.absolute()), **common)
    for form in PICTURES:
        place, source = folder / f"shards_{form}", made["folder, png"]
        write_shards([source], place, 64, form, "local", 0, lambda _: None)
        made[f"shards, {form}"] = ShardSource(name="shards", path=str(place), **common)
    if importlib.util.find_spec("datasets"):
        made["hub, parquet of png"] = _parquet(files, rows, folder / "data.parquet", common)
    return made


def _parquet(files: Path, rows: list[dict[str, str]], file: Path, common: dict[str, Any]) -> Source:
    import datasets

    from src.data.hub import HubSource

    pictures = [{"path": None, "bytes": (files / row["file_name"]).read_bytes()} for row in rows]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": pictures, "text": [row["text"] for row in rows]}, features=features)
    table.to_parquet(str(file))
    return HubSource(name="hub", path=str(file), **common)


def rates(fetch: Callable[[int], Any], count: int, per_call: int, seconds: float) -> list[float]:
    """Images per second of this process in each of PARTS stretches: fetch(0), fetch(1), ... for at least `seconds` in all,
    after one call that warms up.

    count: calls after which it starts again; per_call: images of each.
    """
    fetch(0)
    found, call = [], 0
    for _ in range(PARTS):
        done, began, spent = 0, time.perf_counter(), 0.0
        while done == 0 or spent < seconds / PARTS:
            fetch(call % count)
            call, done = call + 1, done + 1
            spent = time.perf_counter() - began
        found.append(done * per_call / spent)
    return found


def named(name: str, values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """{name: their median, <name>_quartiles: [first, third]}."""
    found = spread(values)
    return {name: round(found["median"], digits), f"{name}_quartiles": [round(q, digits) for q in found["quartiles"]]}


def source_rates(source: Source, task: Task, seed: int, seconds: float) -> dict[str, Any]:
    """Images per second and core of a source: decoded and framed alone, and with their conditions."""
    alone = rates(lambda i: source[i], len(source), 1, seconds)
    whole = rates(lambda i: task.condition_of(source[i], seed), len(source), 1, seconds)
    return {**named("img_per_s", alone), **named("img_per_s_with_condition", whole)}


def cached_rate(stream: ImageStream, batch: int, seconds: float) -> dict[str, Any]:
    """Images per second and core from the caches, as batches that are ready for a training step."""
    count = max(1, len(stream.stores.ids) // batch)
    found = rates(lambda i: stream.__getitems__(list(range(i * batch, (i + 1) * batch))), count, batch, seconds)
    return named("cached_img_per_s", found)


class Timed:
    """A loader that notes when each batch was asked for, and when it came."""

    def __init__(self, loader: Iterable):
        self.loader = loader
        self.asked: list[float] = []
        self.came: list[float] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            self.asked.append(time.perf_counter())
            try:
                batch = next(batches)
            except StopIteration:
                self.asked.pop()
                return
            self.came.append(time.perf_counter())
            yield batch

    def waiting(self, warm_up: int) -> dict[str, Any]:
        """Share of the time in which steps waited, from the batch number `warm_up` to where the last one was asked for."""
        waits = [came - asked for asked, came in zip(self.asked, self.came, strict=True)][warm_up:-1]
        whole = self.asked[-1] - self.asked[warm_up]
        rounds = [later - asked for asked, later in zip(self.asked[warm_up:-1], self.asked[warm_up + 1 :], strict=True)]
        return {
            "batches": len(waits),
            "seconds": round(whole, 3),
            "wait_share": round(sum(waits) / whole, 5),  # of the whole time; the others are of single steps
            **named("wait_ms", [1000 * wait for wait in waits], 3),
            **named("step_ms", [1000 * (both - wait) for both, wait in zip(rounds, waits, strict=True)], 3),
        }


def one_core() -> None:
    """Measure one core: no library takes more."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The measurements for reading."""
    yield f"images per second and core, {found['resolution']} px: alone, and with a {found['task']} condition"
    for name, rates in found["formats"].items():
        yield f"  {name:<28}{rates['img_per_s']:>10,.1f}{rates['img_per_s_with_condition']:>10,.1f}"
    yield f"  {'from the caches, as batches':<28}{found['cached_img_per_s']:>20,.1f}"
    step = found["training"]
    yield (
        f"a training step of {step['micro_batch']} images takes {step['step_ms']:.1f} ms and waits {step['wait_ms']:.2f} ms "
        f"for them, {step['wait_share']:.2%} of the time ({step['workers']} workers, {step['batches']} batches)"
    )
