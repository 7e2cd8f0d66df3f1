"""What of this machine would stop a command hours later: everything that can be known in seconds, told at once, before anything
heavy. Each check yields lines that name the key, the value, the fault and the fix; `refuse` makes one list of them.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from src.backbones.source import ModelSource, SourceError
from src.config import Incompatible, resolve_hardware
from src.config.messages import listed
from src.data.cache import mib
from src.faults import SHARED_MEMORY
from src.room import Need, cache_needs, checkpoint_needs, loader_bytes, picture_needs
from src.types import UserError

GIB = 2**30
BF16_CAPABILITY = (8, 0)  # CUDA compute capability of Ampere
MEMORY_SHARE = 0.85  # of hardware.memory_gib that a device must have: what is sold as 80 GB has 79.1 GiB
T = TypeVar("T")


def planned(
    cfg: DictConfig,
    plan: Callable[[DictConfig], Sequence[T]],
    fit: Callable[[Sequence[T]], Any] | None,
    resumed: bool = False,
) -> Sequence[T]:
    """Check a training's machine and make its plan. -> the members.

    plan: makes the members of a configuration without reading a weight; fit: refuses those that do not fit the device, None
    where room is asked for later. What these two refuse are problems like the others. Raises UserError with all of them.
    """
    found, away = machine(cfg), list(hub(cfg.backbone))
    group: Sequence[Any] = ()
    try:
        group = plan(shape_of(cfg) if away else cfg)
        if fit is not None:
            found += [*shared_memory(cfg, group), *disks(training_needs(group, resumed))]
            fit(group)
    except UserError as error:
        found.append(str(error))
    refuse([*found, *away])
    return group


def resolved(cfg: DictConfig) -> DictConfig:
    """`resolve_hardware`; a device that is not here is told together with whatever else is wrong."""
    try:
        return resolve_hardware(cfg, speaks=False)
    except Incompatible as error:
        refuse([str(error), *machine(cfg, devices=False), *hub(cfg.backbone)], Incompatible)
        raise


def machine(cfg: DictConfig, devices: bool = True) -> list[str]:
    """The problems of a training that need no plan."""
    found = list(device(cfg.hardware)) if devices else []
    return [*found, *folders(cfg), *wandb_server(cfg.get("logger"))]


def evaluation(cfg: DictConfig, node: DictConfig, pictures: int, side: int) -> None:
    """The same for `src.evaluate`. node: the backbone's; pictures: of all adapters and arms; side: pixels.

    Raises UserError with all problems in one list."""
    found = [*device(cfg.hardware), *folders(cfg), *hub(node), *metric_weights(cfg.metrics, cfg.data, cfg.hardware)]
    refuse([*found, *disks(picture_needs(Path(cfg.output_dir), pictures, side))])


def refuse(problems: Sequence[str], kind: type[UserError] = UserError) -> None:
    """Raise what was found, without what is said twice."""
    if problems:
        raise kind(listed(list(dict.fromkeys(problems))))


# ---- one thing each ---------------------------------------------------------------------------------------------------


def device(hardware: DictConfig) -> Iterator[str]:
    """GPUs that compute otherwise, or hold less, than the configuration counts on. hardware: concrete."""
    if hardware.accelerator != "gpu":
        return
    for index in range(min(hardware.devices, torch.cuda.device_count())):
        facts = torch.cuda.get_device_properties(index)
        if hardware.precision == "bf16-mixed" and (facts.major, facts.minor) < BF16_CAPABILITY:
            fault = f"{facts.name} has no bf16 (compute capability {facts.major}.{facts.minor}, bf16 came with 8.0)"
            yield f"hardware.precision=bf16-mixed: {fault}; write hardware.precision=16-mixed"
            return
        has, wants = facts.total_memory / GIB, hardware.memory_gib
        if wants is not None and has < MEMORY_SHARE * wants:
            fault = f"hardware={hardware.name} counts on {wants:g} GiB, {facts.name} has {has:.0f}"
            yield f"{fault}; write hardware=auto, or hardware.memory_gib={int(has)}"
            return


def folders(cfg: DictConfig) -> Iterator[str]:
    """Folders that will be written to: of runs, caches and temporary files."""
    for key in ("output_dir", "cache_dir"):
        if fault := no_folder(Path(cfg[key])):
            yield f"{key}={cfg[key]}: {fault}; name another with {key}=<folder>"
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield f"there is no folder for temporary files ({error.strerror or error}); set TMPDIR to one that can be written to"
        return
    if fault := no_folder(temporary):
        yield f"the folder for temporary files, {temporary}: {fault}; set TMPDIR to another"


def no_folder(path: Path) -> str | None:
    """Why nothing can be written to a folder, whether it is there or not; None where it can."""
    there = nearest(path)
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def hub(node: DictConfig) -> Iterator[str]:
    """A gated model of the hub that is neither here nor may be fetched. node: the backbone's."""
    try:
        source = ModelSource(node.source, node.get("revision"), node.get("licence_url"))
        if source.random or source.local_folder is not None or source.licence_url is None:
            return
    except SourceError:
        return  # the plan refuses it
    if has_token() or in_hub_cache(source):
        return
    yield (
        f"backbone.source={source.source}: the model is gated, and no token is here: accept its licence at "
        f"{source.licence_url}, then run `hf auth login` or set HF_TOKEN; or name a folder in backbone.source"
    )


def has_token() -> bool:
    """Whether the hub's library would find a token."""
    from huggingface_hub import get_token

    return bool(get_token())


def in_hub_cache(source: ModelSource) -> bool:
    """Whether a hub model was fetched before, as far as its first file tells."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source.source, "model_index.json", revision=source.revision), str)


def wandb_server(logger: Any) -> Iterator[str]:
    """W&B that was asked to be online and cannot be, within seconds; `auto` goes offline by itself."""
    if logger is None or logger.name != "wandb" or importlib.util.find_spec("wandb") is None:
        return
    from src.loggers.wandb_run import asked_mode, reachable, server

    try:
        mode, where = asked_mode(logger.mode)
    except UserError as error:
        yield str(error)
        return
    if mode == "online":
        state, why = reachable(server())
        if state != "online":
            yield f"{where}: W&B cannot be online: {why}; write logger.mode=auto, which goes offline by itself, or logger=local"


def metric_weights(metrics: DictConfig, data: DictConfig, hardware: DictConfig) -> Iterator[str]:
    """Weights and packages of metrics that are asked for."""
    from src.metrics.extractors import find_inception, need_cleanfid
    from src.metrics.quality import picture_metrics

    place = "cuda" if hardware.accelerator == "gpu" else "cpu"
    for key in ("clip", "musiq_weights", "maniqa_weights", "lpips_weights"):
        if metrics[key] is not None:
            yield from _refusal(lambda key=key: picture_metrics(**{key: metrics[key]}, device=place))
    fid = {"fid", "fid_inf", "kid"} & set(metrics.names or ())
    if metrics.inception_weights is not None or fid:
        yield from _refusal(lambda: need_cleanfid("inception"))
        if importlib.util.find_spec("cleanfid") is not None:
            yield from _refusal(lambda: find_inception(metrics.inception_weights))


def _refusal(act: Callable[[], Any]) -> Iterator[str]:
    try:
        act()
    except UserError as error:
        yield str(error)


# ---- room -------------------------------------------------------------------------------------------------------------


def shared_memory(cfg: DictConfig, group: Sequence[Any]) -> Iterator[str]:
    """Batches that loader workers put ready have to fit into shared memory, which is small in containers."""
    workers = cfg.hardware.workers * cfg.hardware.devices
    if not workers or not SHARED_MEMORY.is_dir():
        return
    need, free = workers * loader_bytes(cfg, group[0].plan.backbone.facts), shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        fewer = max(0, int(workers * free / need) // cfg.hardware.devices)
        yield (
            f"hardware.workers={cfg.hardware.workers}: what they put ready takes {mib(need)} of shared memory and "
            f"{SHARED_MEMORY} has {mib(free)} free; write hardware.workers={fewer}, or in Docker: --shm-size=8g"
        )


def training_needs(group: Sequence[Any], resumed: bool) -> list[Need]:
    """What a training is going to write: checkpoints of every member, and its caches."""
    needs = [need for member in group for need in checkpoint_needs(member.cfg, member.plan.backbone, resumed)]
    return [*needs, *cache_needs([member.cfg for member in group], [member.plan for member in group])]


def disks(needs: Sequence[Need]) -> Iterator[str]:
    """Disks with less room than what goes there, counted together."""
    of_disk: dict[int, list[Need]] = {}
    for need in needs:
        of_disk.setdefault(nearest(need.folder).stat().st_dev, []).append(need)
    for together in of_disk.values():
        wanted = [need for need in together if need.bytes]
        total, free = sum(need.bytes for need in wanted), shutil.disk_usage(nearest(together[0].folder)).free
        if total > free:
            told = " and ".join(f"{need.what} in {need.key}={need.folder} ({mib(need.bytes)})" for need in wanted)
            keys = " or ".join(f"{key}=<folder>" for key in dict.fromkeys(need.key for need in wanted))
            yield f"{told}: {mib(total)} are to be written and the disk has {mib(free)} free; free some space, or give {keys}"


def shape_of(cfg: DictConfig) -> DictConfig:
    """The configuration with the shipped shape of its backbone in the place of a model that cannot be had, to judge the rest
    by; itself where none ships."""
    other = cfg.copy()
    with open_dict(other):
        other.backbone = OmegaConf.merge(cfg.backbone, {"source": f"random:{cfg.backbone.name}"})
    try:
        ModelSource(other.backbone.source).config("")
    except SourceError:
        return cfg
    return other
