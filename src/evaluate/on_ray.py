"""The parts of an evaluation (`part=0/4`) as tasks of Ray Data, on a cluster or on this machine."""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, open_dict

from src.evaluate.pictures import Say
from src.types import UserError

if TYPE_CHECKING:
    from src.evaluate.subjects import Subject


def draw_parts(cfg: DictConfig, subjects: Sequence["Subject"], pictures: int, said: Say) -> None:
    """Draw every picture of every adapter in the folders of parts; whoever evaluates then takes them over and measures.

    Each node must see the runs, the data, output_dir and cache_dir under the same paths. Ray starts a task again that dies; it
    goes on behind what was drawn. pictures: of one arm. Raises UserError without Ray, or for a job that is a part itself.
    """
    from src.data.write_shards import started_ray

    if cfg.part is not None:
        raise UserError(f"part={cfg.part}: engine=ray makes parts itself; leave part= out, or write engine=local")
    on_gpu = cfg.hardware.accelerator == "gpu"
    ray = started_ray(0)
    has = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
    if not has:
        raise UserError(f"engine=ray: the cluster has no {'GPU' if on_gpu else 'CPU'}; write hardware=cpu, or engine=local")
    count = max(1, min(cfg.parts or has, -(-pictures // cfg.batch)))
    said(f"engine=ray: {count} parts on {has} {'GPU' if on_gpu else 'CPU'}(s)")
    shared = ray.put((cfg, list(subjects), os.getcwd()))
    jobs = ray.data.range(count, override_num_blocks=count)
    room = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    at_once = ray.data.TaskPoolStrategy(min(count, has))
    jobs.map_batches(functools.partial(_draw, shared, count), batch_size=1, compute=at_once, **room).materialize()


def _draw(shared: Any, count: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import ray

    from src.evaluate.flow import evaluate

    cfg, subjects, place = ray.get(shared)
    os.chdir(place)  # paths are those of the command
    for number in batch["id"]:
        own = cfg.copy()
        with open_dict(own):
            own.engine, own.part = "local", f"{number}/{count}"
        evaluate(own, subjects)
    return {"drawn": batch["id"]}
