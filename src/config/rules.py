"""What the keys of a configuration mean together: the machine they run on, what cannot go together, what is science.

Every refusal names the value that would do.
"""

import functools
import hashlib
import json
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from src.config.compose import COMMAND_LINE
from src.config.devices import check_devices
from src.config.messages import ConfigError, Gather, Incompatible, Where
from src.config.profiles import profile, profile_of

GIB = 2**30
FP8_CAPABILITY = (9, 0)  # CUDA compute capability of Hopper: fp8 products with a scale per row
# pixels: autoencoder factor 8 x patch 2; a U-Net's depends on its levels, and is asked when its configuration is read
MULTIPLES = {"src.backbones.mmdit.": 16, "src.backbones.dit.": 16}
# keys of hardware/ that came later: a stored run gets what they stand at in the CPU's profile
ADDED = ("compile", "cuda_graphs", "channels_last", "fit", "overlap", "nodes", "shard", "timeout_s", "oom")
# Not science: where things go and how fast they get there. Dotted keys; a prefix covers what is below it.
NOT_SCIENCE = ("hardware", "logger", "output_dir", "cache_dir", "out", "workers", "resume", "sweep", "tags", "name")
NOT_SCIENCE += ("data.index_dir", "data.allow_outside", "together", "together_tasks", "feature_cache.budget_gib")
# Keys that came later, and the value at which nothing changed: a run from before them keeps its identity.
LATER = {"backbone.quantize": None, "reuse": 1, "feature_cache.draws": None, "feature_cache.dtype": None}
LATER |= {"adapter.encoder_steps": None}
NOT_SCIENCE += ("budget.stop_at_images", "callbacks.control.max_failures")
NOT_SCIENCE += tuple(f"callbacks.{name}" for name in ("stopper", "checkpoints", "meter", "progress", "guard", "vitals"))


# ---- hardware ---------------------------------------------------------------------------------------------------------


def resolve_hardware(cfg: DictConfig, speaks: bool = True) -> DictConfig:
    """A copy of cfg whose hardware is concrete and fits this machine; says in one line each what it decided, if it speaks.

    `auto` takes the profile of conf/hardware/ that fits what torch finds, without its rates if they are another GPU's; keys set
    by hand stay. A micro batch above the effective batch is lowered to it. Raises Incompatible for a GPU profile where there is
    no such GPU.
    """
    import torch  # here and below, where it is asked: whoever is refused before need not wait for it

    cfg = cfg.copy()
    hardware, lines = _concrete(OmegaConf.to_container(cfg.hardware, resolve=True))
    if hardware["accelerator"] == "gpu" and torch.cuda.device_count() < hardware["devices"]:
        fault = f"wants {hardware['devices']} GPU(s), torch finds {torch.cuda.device_count()}"
        raise Incompatible(f"hardware={hardware['name']} {fault}; write hardware=cpu or hardware=auto")
    if (effective := OmegaConf.select(cfg, "budget.effective_batch")) is not None:
        micro = _micro_batch(hardware, effective)
        if micro < hardware["micro_batch"]:
            lines.append(f"hardware.micro_batch lowered from {hardware['micro_batch']} to {micro}: a whole optimizer step")
            hardware["micro_batch"] = micro
    for line in lines if speaks else ():
        print(line, flush=True)
    with open_dict(cfg):
        cfg.hardware = OmegaConf.merge(cfg.hardware, hardware)
    return cfg


def accumulation(cfg: DictConfig) -> int:
    """Micro batches per optimizer step on each device: effective_batch / (micro_batch * devices of all nodes)."""
    hardware, _ = _concrete(OmegaConf.to_container(cfg.hardware, resolve=True))
    return cfg.budget.effective_batch // (_micro_batch(hardware, cfg.budget.effective_batch) * _devices(hardware))


def _devices(hardware: dict[str, Any]) -> int:
    """On all nodes together."""
    return hardware["devices"] * hardware["nodes"]


def _micro_batch(hardware: dict[str, Any], effective: int) -> int:
    return min(hardware["micro_batch"], max(1, effective // _devices(hardware)))


def _concrete(hardware: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A hardware node without `auto` and its nulls, and the line that says what was chosen."""
    if hardware["accelerator"] != "auto":
        return of_today(hardware), []
    import torch

    chosen, found = profile("cpu"), "no GPU"
    set_by_hand = {k: v for k, v in hardware.items() if v is not None and k not in ("name", "accelerator")}
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        memory = facts.total_memory / GIB
        chosen, found = profile_of(facts.name, memory), f"{facts.name}, {memory:.0f} GiB"
        if not chosen["rates"] and "rates" not in set_by_hand:
            found += "; its rates are not known: no bound on time, no MFU"
    return {**chosen, **set_by_hand}, [f"hardware=auto is {chosen['name']} here ({found})"]


def of_today(hardware: dict[str, Any]) -> dict[str, Any]:
    """The node of a stored run, which may be from before some keys: those get what they stand at in the CPU's profile."""
    today = profile("cpu")
    added = {k: v for k, v in today.items() if k in ADDED}
    old = {}
    if isinstance(hardware.get("checkpointing"), bool):
        old["checkpointing"] = "both" if hardware["checkpointing"] else "none"
    if isinstance(hardware.get("compile"), bool) and isinstance(today["compile"], str):
        old["compile"] = "all" if hardware["compile"] else "none"
    return {**added, **hardware, **old}


# ---- between keys -----------------------------------------------------------------------------------------------------


def check_together(tree: dict, where: Where, gather: Gather | None = None) -> list[str]:
    """Refuse resolved values that are legal alone but not together, all of them at once; returns notes that are worth one line
    each. gather: of whoever collects faults, and raises them itself."""
    own, notes = gather or Gather(), []
    if "hardware" in tree:
        notes += own(_check_hardware, tree["hardware"], where) or []
        hardware = own(lambda: _concrete(tree["hardware"])[0])
        own(_check_switches, hardware, tree.get("reuse", 1), where)
        own(check_devices, tree, hardware, functools.partial(_clash, where))
        own(_check_quantize, tree.get("backbone", {}), hardware, where)
        own(_check_optimizer, tree.get("optimizer", {}), hardware, where)
    if "budget" in tree:
        own(_check_budget, tree["budget"], where)
        own(lambda: _check_batches(tree["budget"]["effective_batch"], hardware, where))
        own(lambda: _check_resolution(tree["resolution"], tree["backbone"], where))
        own(lambda: _check_validation(tree["validation"], tree["data"], where))
        notes += own(_warmup_note, tree) or []
    if gather is None:
        own.done()
    return notes


def _warmup_note(tree: dict) -> list[str]:
    warmup, images = tree["optimizer"]["warmup_images"], tree["budget"]["images"]
    if warmup < images:
        return []
    return [f"optimizer.warmup_images={warmup} outlasts budget.images={images}: the learning rate never reaches its peak"]


def _clash(where: Where, keys: tuple[str, ...], fault: str) -> Incompatible:
    """Names the command line if any of the keys was set there, else the file of the first."""
    places = [where(key) for key in keys]
    return Incompatible(f"{COMMAND_LINE if COMMAND_LINE in places else places[0]}: {fault}").of(between=keys)


def _check_hardware(hardware: dict[str, Any], where: Where) -> list[str]:
    empty = [k for k, v in hardware.items() if v is None and k != "memory_gib"]
    if hardware["accelerator"] != "auto" and empty:
        key = f"hardware.{empty[0]}"
        raise ConfigError(f"{where(key)}: {key}=null: give a value, or write hardware=auto")
    hardware, _ = _concrete(hardware)
    if hardware["accelerator"] != "cpu" or hardware["precision"] == "32-true":
        return []
    if hardware["precision"] == "16-mixed":
        keys = ("hardware.precision", "hardware.accelerator")
        raise _clash(where, keys, "hardware.precision=16-mixed needs a GPU, not a CPU; write hardware.precision=32-true")
    return ["hardware.precision=bf16-mixed on a CPU is slower than 32-true, and its numbers differ"]


def _check_switches(hardware: dict[str, Any], reuse: int, where: Where) -> None:
    if not hardware["cuda_graphs"]:
        return
    keys = ("hardware.cuda_graphs", "hardware.accelerator", "hardware.compile")
    if hardware["accelerator"] == "cpu":
        raise _clash(where, keys, "hardware.cuda_graphs=true needs a GPU, not a CPU; write hardware.cuda_graphs=false")
    if hardware["compile"] not in ("frozen", "all"):
        fault = f"hardware.cuda_graphs=true replays compiled blocks, and hardware.compile={hardware['compile']}"
        raise _clash(where, keys, f"{fault}; write hardware.compile=frozen")
    # a replayed graph writes its outputs where the last one did, while these two still read them
    for key, waits, value in (("hardware.overlap", hardware["overlap"], "true"), ("reuse", reuse > 1, reuse)):
        if waits:
            fault = f"hardware.cuda_graphs=true overwrites the features that {key}={value} still reads"
            raise _clash(where, ("hardware.cuda_graphs", key), f"{fault}; write hardware.cuda_graphs=false")


def _check_quantize(backbone: dict[str, Any], hardware: dict[str, Any], where: Where) -> None:
    if backbone.get("quantize") != "fp8":
        return
    import torch

    on_cpu = hardware["accelerator"] == "cpu"
    # a GPU profile on a machine without GPUs serves to estimate; whoever wants to train there is refused for that
    if on_cpu or (torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY):
        here = "a CPU" if on_cpu else torch.cuda.get_device_name()
        fault = f"backbone.quantize=fp8 needs a Hopper GPU or newer, not {here}; write backbone.quantize=int8"
        raise _clash(where, ("backbone.quantize", "hardware.accelerator"), fault)


def _check_optimizer(optimizer: dict[str, Any], hardware: dict[str, Any], where: Where) -> None:
    algorithm = optimizer.get("algorithm", {})
    keys = ("optimizer.algorithm._target_", "hardware.accelerator", "hardware.precision")
    if hardware["accelerator"] == "cpu" and str(algorithm.get("_target_")).startswith("bitsandbytes."):
        fault = f"optimizer.algorithm._target_={algorithm['_target_']} needs a GPU, not a CPU; write optimizer=adamw"
        raise _clash(where, keys, fault)
    if hardware["precision"] == "16-mixed" and algorithm.get("fused"):
        fault = "a fused optimizer takes the loss's scale out of the gradients itself, after they would have been clipped"
        raise _clash(where, keys, f"{fault}; write hardware.precision=bf16-mixed or optimizer=adamw")


def _check_budget(budget: dict[str, Any], where: Where) -> None:
    images, effective, stop = budget["images"], budget["effective_batch"], budget["stop_at_images"]
    if images < effective:
        fault = f"budget.images={images} is less than one optimizer step of budget.effective_batch={effective}"
        fix = f"write budget.images={effective} or budget.effective_batch={images}"
        raise _clash(where, ("budget.images", "budget.effective_batch"), f"{fault}; {fix}")
    if stop is not None and stop > images:
        fault = f"budget.stop_at_images={stop} lies behind the end, budget.images={images}"
        raise _clash(where, ("budget.stop_at_images", "budget.images"), f"{fault}; write budget.stop_at_images=null")


def _check_batches(effective: int, hardware: dict[str, Any], where: Where) -> None:
    micro, devices = _micro_batch(hardware, effective), _devices(hardware)
    keys = ("budget.effective_batch", "hardware.micro_batch", "hardware.devices")
    if effective % devices:
        fewer = next(d for d in range(devices, 0, -1) if effective % d == 0)
        fault = f"budget.effective_batch={effective} cannot be shared by hardware.devices={devices}"
        fix = f"write hardware.devices={fewer} or budget.effective_batch={_up(effective, devices)}"
        raise _clash(where, keys, f"{fault}; {fix}")
    if effective % (micro * devices):
        smaller = next(m for m in range(micro, 0, -1) if effective % (m * devices) == 0)
        fault = (
            f"budget.effective_batch={effective} is not a multiple of hardware.micro_batch={micro} x hardware.devices={devices}"
        )
        fix = f"write hardware.micro_batch={smaller} or budget.effective_batch={_up(effective, micro * devices)}"
        raise _clash(where, keys, f"{fault}; {fix}")


def _check_resolution(size: int, backbone: dict[str, Any], where: Where) -> None:
    multiple = next((m for prefix, m in MULTIPLES.items() if str(backbone["_target_"]).startswith(prefix)), 1)
    if size % multiple:
        legal = [s for s in (size // multiple * multiple, _up(size, multiple)) if s]
        fault = f"resolution={size} is not a multiple of {multiple}, as backbone {backbone.get('name')} wants"
        raise _clash(where, ("resolution",), f"{fault}; write {' or '.join(f'resolution={s}' for s in legal)}")


def _check_validation(validation: dict[str, Any], data: dict[str, Any], where: Where) -> None:
    held_out = data.get("val_images")
    for key in ("images", "final_images"):
        if held_out is not None and validation[key] > held_out:
            fault = f"validation.{key}={validation[key]} is more than the {held_out} held-out images"
            fix = f"write validation.{key}={held_out} or data.val_images={validation[key]}"
            raise _clash(where, (f"validation.{key}", "data.val_images"), f"{fault}; {fix}")


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ---- identity ---------------------------------------------------------------------------------------------------------


def _science(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what decides a result; whole floats become integers, so that 1 and 1.0 are one value."""
    tree = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    flat: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if any(key == k or key.startswith(f"{k}.") for k in NOT_SCIENCE):
            return
        if isinstance(node, dict) and node:
            for name, child in node.items():
                walk(child, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = json.loads(json.dumps(node), parse_float=lambda x: int(float(x)) if float(x).is_integer() else float(x))

    walk(tree, "")
    return {key: value for key, value in flat.items() if key not in LATER or value != LATER[key]}


def config_sha(cfg: DictConfig | dict[str, Any]) -> str:
    """16 hex digits over the science part: equal for runs that should give equal results, on any machine."""
    text = json.dumps(_science(cfg), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def science_diff(old: DictConfig | dict[str, Any], new: DictConfig | dict[str, Any]) -> list[str]:
    """Dotted science keys whose values differ between two configurations, sorted; a resumed run must have none."""
    a, b = _science(old), _science(new)
    return sorted(key for key in a.keys() | b.keys() if a.get(key, MISSING) != b.get(key, MISSING))
