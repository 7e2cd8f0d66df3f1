"""Any source as WebDataset tar shards, which `data=shards` reads back with the same ids, captions, pictures and signals.

Here several processes, on one machine or on a cluster, share the work. Whoever writes a shard writes the same bytes (see
`src.data.shard_plan`), so a killed or second process goes on where shards are missing. `index.json` comes last, when all are
there.
"""

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from src.data.cache import mib
from src.data.locks import RowLocks, WholeFile
from src.data.shard_plan import SHARDS_VERSION, ShardPlan, plan_shards, suffix_of, write_shard
from src.data.source import Source
from src.parent import worker_pool
from src.types import UserError

SAY_EVERY_S = 30.0
Engine = Literal["local", "ray"]


def write_shards(
    sources: Sequence[Source],
    out: Path,
    shard_mib: float,
    picture: str,
    engine: Engine,
    workers: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write what is missing of all shards -> the content of index.json.

    shard_mib: size of a shard on average; picture: png or jpg; engine: `local` processes, or `ray` tasks on a cluster that
    shares the folder; workers: how many. Raises UserError if the folder holds other shards, or the disk is too small.
    """
    if engine == "ray":
        import_ray()
    plan = plan_shards(sources, out, shard_mib, picture, say)
    began, before = time.monotonic(), len(plan.missing())
    if before:
        {"local": _run_local, "ray": _run_ray}[engine](plan, workers, say)
    index = _index(plan)
    with WholeFile(out / "index.json") as part:
        part.write_text(json.dumps(index, indent=1) + "\n")
    rate = f" in {time.monotonic() - began:.0f} s" if before else ", all there before"
    say(f"{index['rows']} samples in {len(index['shards'])} shards, {mib(index['bytes'])}{rate}")
    return index


# ---- what one process does --------------------------------------------------------------------------------------------


def write_missing(plan: ShardPlan, say: Callable[[str], None]) -> None:
    """Write shards until none is missing, together with any other process that does so."""
    locks, said = RowLocks(plan.out), time.monotonic()
    try:
        while left := plan.missing():
            idle = True
            for shard in left:
                if _write_claimed(plan, shard, locks):
                    idle = False
                    if time.monotonic() - said > SAY_EVERY_S:
                        said = time.monotonic()
                        say(f"  {len(plan.missing())} of {plan.count} shards to do")
            if idle:
                locks.wait(range(left[0], left[0] + 1))  # another process is writing it
    finally:
        locks.close()


def _write_claimed(plan: ShardPlan, shard: int, locks: RowLocks) -> bool:
    """Write a shard unless it is there or another process is writing it -> whether it was written."""
    mine = range(shard, shard + 1)
    if not locks.take(mine):
        return False
    try:
        if plan.path(shard).exists():
            return False
        if locks.work:  # what a killed process left
            for part in plan.out.glob(f".{plan.path(shard).name}.*"):
                part.unlink(missing_ok=True)
        write_shard(plan, shard)
        return True
    finally:
        locks.release(mine)


# ---- all of them ------------------------------------------------------------------------------------------------------


def _silent(line: str) -> None:
    return None


def _run_local(plan: ShardPlan, workers: int, say: Callable[[str], None]) -> None:
    if workers < 2:
        return write_missing(plan, say)
    with worker_pool(workers, spawn=True) as pool:
        jobs = [pool.submit(write_missing, plan, _silent) for _ in range(workers)]
        for job in jobs:
            job.result()


def import_ray() -> Any:
    """The package, which is optional. Raises UserError where it is missing."""
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError("engine=ray needs the package ray: pip install 'controlbench[ray]', or write engine=local") from error
    return ray


def started_ray(workers: int) -> Any:
    """The package, connected to the cluster of RAY_ADDRESS, or with one on this machine of so many CPUs (0: all)."""
    ray = import_ray()
    if not ray.is_initialized():
        own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers or None, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _run_ray(plan: ShardPlan, workers: int, say: Callable[[str], None]) -> None:
    """One Ray Data task per shard; every node must see the folder and the data. Ray starts a task again that dies, and its
    lock died with it."""
    ray = started_ray(workers)
    left, shared = plan.missing(), ray.put(plan)
    jobs = ray.data.range(len(left), override_num_blocks=len(left))
    at_once = ray.data.TaskPoolStrategy(workers or None)
    jobs.map_batches(functools.partial(_ray_task, shared, left), batch_size=1, compute=at_once).materialize()
    write_missing(plan, say)  # nothing is left, unless another process was killed while it held a shard


def _ray_task(shared: Any, left: list[int], batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import ray

    plan = ray.get(shared)
    locks = RowLocks(plan.out)
    try:
        return {"written": np.array([_write_claimed(plan, left[int(i)], locks) for i in batch["id"]])}
    finally:
        locks.close()


def _index(plan: ShardPlan) -> dict[str, Any]:
    """Counts and hashes of all shards, read back from the disk."""
    shards = []
    for shard in range(plan.count):
        with plan.path(shard).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = plan.path(shard).stat().st_size
        shards.append({"name": plan.path(shard).name, "rows": len(plan.rows_of(shard)), "bytes": size, "sha256": digest})
    return {
        "version": SHARDS_VERSION,
        "rows": plan.rows,
        "rows_of_sources": [len(source) for source in plan.sources],
        "bytes": sum(shard["bytes"] for shard in shards),
        "resolution": plan.sources[0].resolution,
        "picture": plan.picture,
        "signals": {name: suffix_of(name) for name in plan.sources[0].signals},
        "sources": [source.fingerprint() for source in plan.sources],
        "are_scenes": all(source.are_scenes for source in plan.sources),
        "shards": shards,
    }


def reading_words(index: dict[str, Any], out: Path, val_images: int) -> str:
    """The words with which `data=shards` reads them back."""
    maps = ",".join(f"{name}: {suffix}" for name, suffix in sorted(index["signals"].items()))
    signals = f' "data.signals={{{maps}}}"' if maps else ""
    scenes = " data.are_scenes=true" if index.get("are_scenes") else ""
    return f"data=shards data.path={out} data.val_images={val_images}{signals}{scenes}"
