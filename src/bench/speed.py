"""The switches that make a training faster, alone and together, each against the plain training in the same sitting.

    python -m src.bench.speed adapter=unicon                        all that this machine and this backbone can do
    python -m src.bench.speed int8,fused,shared_4 adapter=unicon    some of them

The other words are those of src.train. Plain and switched steps take turns, so that a machine that slows down slows both;
what is told is the ratio of neighbours, and of the peaks in memory. Each side keeps its optimizer between its turns. The last
line printed is `run: <folder>`; speed.json is there, and `python -m src.bench.markdown <folder>` makes a table of it. A switch
that fails is told with its reason, and the others go on; the file is written after each. Exit code 1: a switch failed; 3: for
one there was too little memory, and nothing else failed. Weights of full-size backbones are random: speed does not depend on
them.
"""

import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.bench.markdown import WITHOUT_NUMBERS
from src.config import cli, resolve_hardware
from src.config.messages import nearest
from src.vocabulary import UserError, refused_in_one_line

ROUNDS, WARM_UP = 15, 3  # pairs of steps that are timed, and steps of each before
LONGEST_REASON = 300  # characters of what an exception says


@dataclass(frozen=True)
class Switch:
    """changes: dotted keys; shares: arguments of `SharedSteps`; adapters: how many train together, timed per adapter; rounds:
    steps of one turn, of the plain side too: more than one where a step works ahead for its next. refused: why a configuration
    cannot have it, or None."""

    changes: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, Any] = field(default_factory=dict)
    adapters: int = 1
    rounds: int = 1
    refused: Callable[[DictConfig, Any], str | None] = lambda cfg, facts: None


def _gpu(cfg: DictConfig, _facts: Any) -> str | None:
    return None if cfg.hardware.accelerator == "gpu" else "needs a GPU"


def _hopper(cfg: DictConfig, facts: Any) -> str | None:
    import torch

    from src.config.rules import FP8_CAPABILITY

    fits = _gpu(cfg, facts) is None and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    return None if fits else "needs a Hopper GPU"


def _eight_bit(cfg: DictConfig, facts: Any) -> str | None:
    missing = importlib.util.find_spec("bitsandbytes") is None
    return _gpu(cfg, facts) or ("bitsandbytes is not here: pip install bitsandbytes" if missing else None)


def _maps(_cfg: DictConfig, facts: Any) -> str | None:
    return None if facts.spatial else "is for U-Nets"


COMPILED = {"hardware.compile": "frozen"}
FUSED = {"optimizer.algorithm.fused": True}
EIGHT_BIT = {"optimizer.algorithm._target_": "bitsandbytes.optim.AdamW8bit"}
PLAIN = Switch()
# another way to be faster is another line here
SWITCHES: dict[str, Switch] = {
    "compiled": Switch(COMPILED),
    "graphs": Switch(COMPILED | {"hardware.cuda_graphs": True}, refused=_gpu),
    "int8": Switch({"backbone.quantize": "int8"}),
    "fp8": Switch({"backbone.quantize": "fp8"}, refused=_hopper),
    "channels_last": Switch({"hardware.channels_last": True}, refused=_maps),
    "fused": Switch(FUSED),
    "adamw8bit": Switch(EIGHT_BIT, refused=_eight_bit),
    "shared_1": Switch(shares={"share": True}),
    "shared_2": Switch(shares={"share": True}, adapters=2),
    "shared_4": Switch(shares={"share": True}, adapters=4),
    "cached": Switch(shares={"cached": True}),
    "reuse_2": Switch(shares={"reuse": 2}),
    "reuse_4": Switch(shares={"reuse": 4}),
    "overlap": Switch(shares={"overlap": True}, rounds=4, refused=_gpu),
    "compiled_fused": Switch(COMPILED | FUSED),
    "together": Switch(COMPILED | FUSED, {"share": True}, adapters=4),
}


class Setting:
    """Adapters on a backbone of their own, as a switch wants them, warm: their optimizers have their state.

    A switch may replace the backbone's layers or compile its blocks, so it is never another setting's. peak_bytes: of a step
    in which nothing of another setting counts; pass_bytes: of the frozen features of a batch.
    """

    def __init__(self, cfg: DictConfig, switch: Switch, warm_up: int = WARM_UP):
        import torch

        from src import build
        from src.construct import construct
        from src.fit import changed
        from src.profiling.memory import blank_batch
        from src.together.measure import SharedSteps
        from src.world import backbone_dtype, device_of

        self.switch, cfg = switch, changed(cfg, switch.changes)
        device = device_of(cfg)
        others = _allocated(device)
        backbone = construct(cfg.backbone, resolution=cfg.resolution).load(device, backbone_dtype(cfg))
        adapters = [build.new_adapter(cfg, backbone).to(device) for _ in range(switch.adapters)]
        for adapter in adapters:
            build.speed_up(cfg, backbone, adapter)
        gen = torch.Generator().manual_seed(cfg.seed)
        batch = blank_batch(backbone.facts, adapters[0].condition_space, cfg.hardware.micro_batch, cfg.resolution)
        text = batch.text
        for tensor in (batch.latents_BCHW, batch.noise_BCHW, batch.condition, text.tokens_BLD, text.pooled_BP):
            if tensor is not None:
                tensor.normal_(generator=gen)
        self.steps = SharedSteps(adapters, batch, **{"share": False, **switch.shares})
        for _ in range(max(1, warm_up)):
            self.steps.round()
        self.pass_bytes, self.peak_bytes = self.steps.pass_bytes, self.steps.peak_bytes() - others


def _allocated(device: Any) -> int:
    """Bytes of tensors on a GPU now, those that nobody can reach any more left out; 0 on a CPU, where they are counted by
    setting."""
    import torch

    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def pairs(plain: Setting, other: Setting, rounds: int = ROUNDS) -> dict[str, Any]:
    """Plain and switched steps in turns. -> step_ms of both per adapter, their ratio (above 1: the switch is faster), peaks and
    their ratio (below 1: the switch takes less).

    Who begins changes from pair to pair.
    """
    from src.spread import spread

    times: dict[Setting, list[float]] = {plain: [], other: []}
    for n in range(rounds):
        for setting in (plain, other) if n % 2 else (other, plain):
            times[setting].append(setting.steps.time(other.switch.rounds))
    ratios = [a / b for a, b in zip(times[plain], times[other], strict=True)]
    told = {"plain_ms": spread(times[plain]), "step_ms": spread(times[other]), "ratio": spread(ratios)}
    told |= {"plain_peak_bytes": plain.peak_bytes, "peak_bytes": other.peak_bytes}
    told |= {"memory_ratio": other.peak_bytes / plain.peak_bytes, "pass_bytes": other.pass_bytes}
    return told | {"adapters": other.switch.adapters, "rounds": other.switch.rounds}


def main(cfg: DictConfig, chosen: list[str]) -> None:
    """The entry, with the names of switches: none for all."""
    import torch

    from src import build
    from src.bench.origin import stamped
    from src.bench.plan import shape_of
    from src.construct import construct
    from src.fit import changed
    from src.profiling.memory import hollow_adapter
    from src.support import check_cell

    build.quiet()
    cfg = resolve_hardware(cfg)
    torch.set_num_threads(cfg.hardware.threads)
    cfg = changed(cfg, {"backbone.source": shape_of(cfg.backbone, print)})
    backbone = construct(cfg.backbone, resolution=cfg.resolution)
    check_cell(cfg, backbone)
    hollow = hollow_adapter(backbone, lambda h: build.new_adapter(cfg, h, training=False), cfg.hardware.precision)
    if hollow.grad_through_backbone:
        raise UserError(f"adapter={cfg.adapter.name}: its gradient crosses the backbone; these switches are for adapter=unicon")
    folder = stamped(cfg.output_dir, f"speed_{cfg.adapter.name}_{cfg.backbone.name}")
    found = measured(cfg, backbone.facts, chosen or list(SWITCHES), lambda found: write(cfg, found, chosen, folder))
    print(f"run: {folder}", flush=True)
    if code := exit_code(found):
        raise SystemExit(code)


def measured(
    cfg: DictConfig,
    facts: Any,
    names: list[str],
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """name -> what `pairs` finds of a switch, or the reason why not: {"skipped": ...}, {"oom": ...} or {"failed": ...}.

    Each is told in a line, and keep gets all so far. Behind a fault, which may have come in the middle of one of its steps, the
    plain side is made anew.
    """
    import torch

    from src.faults import free_memory

    found: dict[str, Any] = {}
    plain = None
    for name in names:
        switch = SWITCHES[name]
        if reason := switch.refused(cfg, facts):
            found[name] = {"skipped": reason}
        else:
            try:
                plain = plain or Setting(cfg, PLAIN, warm_up)
                found[name] = pairs(plain, Setting(cfg, switch, warm_up), rounds)
            except Exception as error:
                found[name], plain = fault(error, "the switch" if plain else "the plain training"), None
                free_memory(error)
            torch.compiler.reset()  # what it compiled would keep the switch's networks alive
        say(name, found[name])
        keep(found)
    return found


def fault(error: Exception, side: str) -> dict[str, str]:
    """What stands in the place of numbers: the reason, under "oom" or "failed". side: which was at work."""
    from src.bench.cell import first_line
    from src.sampling import is_out_of_memory

    kind, name = "oom" if is_out_of_memory(error) else "failed", type(error).__name__
    said = first_line(error)[:LONGEST_REASON]
    return {kind: f"{side}: {said}" if said == name or isinstance(error, UserError) else f"{side}: {name}: {said}"}


def say(name: str, one: dict[str, Any]) -> None:
    """A line for a switch; of a fault on stderr."""
    for kind, words in WITHOUT_NUMBERS.items():
        if kind in one:
            print(f"{name:<16} {words}: {one[kind]}", file=sys.stdout if kind == "skipped" else sys.stderr, flush=True)
            return
    low, high = one["ratio"]["quartiles"]
    speed = f"{one['ratio']['median']:.2f}x [{low:.2f}, {high:.2f}]"
    print(f"{name:<16} {speed}, memory {one['memory_ratio']:.2f}x", flush=True)


def exit_code(found: dict[str, Any]) -> int:
    """1 if a switch failed, 3 if memory ran out and that was all, 0 otherwise."""
    from src.bench.cell import OUT_OF_MEMORY

    if any("failed" in one for one in found.values()):
        return 1
    return OUT_OF_MEMORY if any("oom" in one for one in found.values()) else 0


def write(cfg: DictConfig, found: dict[str, Any], chosen: list[str], folder: Path) -> None:
    """Leave speed.json in a folder, in the place of one with fewer switches. chosen: names that were typed."""
    from src.bench.origin import leave, origin_of_times

    typed = " ".join(["src.bench.speed", *([",".join(chosen)] if chosen else [])])
    origin = origin_of_times(cfg.hardware.accelerator == "gpu")
    told = {
        "kind": "speed",
        "switches": found,
        "configuration": OmegaConf.to_container(cfg, resolve=True),
        **origin,
        "command": origin["command"].replace("src.bench.speed", typed, 1),  # the names were taken out of sys.argv
    }
    leave(told, folder)


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """-> names of switches, and the words of a training. Raises UserError for a name that there is not."""
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        return [], argv
    names = argv[0].split(",")
    if wrong := [name for name in names if name not in SWITCHES]:
        raise UserError(f"{wrong[0]} is no switch{nearest(wrong[0], SWITCHES)}")
    return names, argv[1:]


if __name__ == "__main__":
    with refused_in_one_line():
        names, sys.argv[1:] = split_words(sys.argv[1:])
    cli("train", lambda cfg: main(cfg, names))
