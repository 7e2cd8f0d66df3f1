"""The switches that make a training faster, alone and together, each against the plain training in the same sitting.

    python -m src.bench.speed adapter=unicon                        all that this machine and this backbone can do
    python -m src.bench.speed int8,fused,shared_4 adapter=unicon    some of them

The other words are those of src.train. Plain and switched steps take turns, so that a machine that slows down slows both;
what is told is the ratio of neighbours. The last line printed is `run: <folder>`; speed.json is there. Weights of full-size
backbones are random: speed does not depend on them.
"""

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import cli, resolve_hardware
from src.config.messages import nearest
from src.types import UserError

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, WARM_UP = 15, 3  # pairs of steps that are timed, and steps of each before


@dataclass(frozen=True)
class Switch:
    """changes: dotted keys; shares: arguments of `measure_shared`; adapters: how many train together, the first of them timed
    per adapter. refused: why a configuration cannot have it, or None."""

    changes: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, Any] = field(default_factory=dict)
    adapters: int = 1
    refused: Callable[[DictConfig, Any], str | None] = lambda cfg, facts: None


def _gpu(cfg: DictConfig, _facts: Any) -> str | None:
    return None if cfg.hardware.accelerator == "gpu" else "needs a GPU"


def _hopper(cfg: DictConfig, facts: Any) -> str | None:
    import torch

    from src.config.rules import FP8_CAPABILITY

    fits = _gpu(cfg, facts) is None and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    return None if fits else "needs a Hopper GPU"


def _maps(_cfg: DictConfig, facts: Any) -> str | None:
    return None if facts.spatial else "is for U-Nets"


COMPILED = {"hardware.compile": "frozen"}
FUSED = {"optimizer.algorithm.fused": True}
PLAIN = Switch()
# another way to be faster is another line here
SWITCHES: dict[str, Switch] = {
    "compiled": Switch(COMPILED),
    "graphs": Switch(COMPILED | {"hardware.cuda_graphs": True}, refused=_gpu),
    "int8": Switch({"backbone.quantize": "int8"}),
    "fp8": Switch({"backbone.quantize": "fp8"}, refused=_hopper),
    "channels_last": Switch({"hardware.channels_last": True}, refused=_maps),
    "fused": Switch(FUSED),
    "shared_1": Switch(shares={"share": True}),
    "shared_2": Switch(shares={"share": True}, adapters=2),
    "shared_4": Switch(shares={"share": True}, adapters=4),
    "cached": Switch(shares={"cached": True}),
    "overlap": Switch(shares={"overlap": True}, refused=_gpu),
    "compiled_fused": Switch(COMPILED | FUSED),
    "together": Switch(COMPILED | FUSED, {"share": True}, adapters=4),
}


class Setting:
    """Adapters on a backbone of their own, as a switch wants them; `time` takes a round of steps.

    A switch may replace the backbone's layers or compile its blocks, so it is never another setting's.
    """

    def __init__(self, cfg: DictConfig, switch: Switch):
        import torch

        from src import build
        from src.construct import construct
        from src.fit import changed
        from src.profiling.memory import blank_batch
        from src.world import backbone_dtype, device_of

        self.switch, cfg = switch, changed(cfg, switch.changes)
        device = device_of(cfg)
        backbone = construct(cfg.backbone, resolution=cfg.resolution).load(device, backbone_dtype(cfg))
        self.adapters = [build.new_adapter(cfg, backbone).to(device) for _ in range(switch.adapters)]
        for adapter in self.adapters:
            build.speed_up(cfg, backbone, adapter)
        gen = torch.Generator().manual_seed(cfg.seed)
        self.batch = blank_batch(backbone.facts, self.adapters[0].condition_space, cfg.hardware.micro_batch, cfg.resolution)
        text = self.batch.text
        for tensor in (self.batch.latents_BCHW, self.batch.noise_BCHW, self.batch.condition, text.tokens_BLD, text.pooled_BP):
            if tensor is not None:
                tensor.normal_(generator=gen)

    def time(self, rounds: int = 1, warmup: int = 0) -> Any:
        """-> `SharedCost` of some rounds."""
        from src.together.measure import measure_shared

        return measure_shared(self.adapters, self.batch, rounds=rounds, warmup=warmup, **{"share": False, **self.switch.shares})


def pairs(plain: Setting, other: Setting, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Plain and switched steps in turns. -> step_ms of both per adapter, their ratio (above 1: the switch is faster), peaks.

    The order within a pair changes from pair to pair. peak_bytes holds both settings' weights, on a GPU.
    """
    from src.bench.measure import spread

    for setting in (plain, other):
        setting.time(warmup=warm_up)
    costs: dict[Setting, list] = {plain: [], other: []}
    for n in range(rounds):
        for setting in (plain, other) if n % 2 else (other, plain):
            costs[setting].append(setting.time())
    times = {setting: [cost.step_ms[0] for cost in found] for setting, found in costs.items()}
    ratios = [a / b for a, b in zip(times[plain], times[other], strict=True)]
    last = costs[other][-1]
    told = {"plain_ms": spread(times[plain]), "step_ms": spread(times[other]), "ratio": spread(ratios)}
    return told | {"adapters": len(other.adapters), "peak_bytes": last.peak_bytes, "pass_bytes": last.pass_bytes}


def main(cfg: DictConfig, chosen: list[str]) -> None:
    """The entry, with the names of switches: none for all."""
    import torch

    from src import build
    from src.bench.plan import shape_of
    from src.construct import construct
    from src.fit import changed
    from src.results import command_line, environment, git_state
    from src.support import check_cell

    build.quiet()
    cfg = resolve_hardware(cfg)
    torch.set_num_threads(cfg.hardware.threads)
    cfg = changed(cfg, {"backbone.source": shape_of(cfg.backbone, print)})
    backbone = construct(cfg.backbone, resolution=cfg.resolution)
    check_cell(cfg, backbone)
    found: dict[str, Any] = {}
    plain = Setting(cfg, PLAIN)
    if plain.adapters[0].grad_through_backbone:
        raise UserError(f"adapter={cfg.adapter.name}: its gradient crosses the backbone; these switches are for adapter=unicon")
    for name in chosen or SWITCHES:
        if reason := SWITCHES[name].refused(cfg, backbone.facts):
            found[name] = {"skipped": reason}
            print(f"{name:<16} skipped: {reason}", flush=True)
            continue
        found[name] = pairs(plain, Setting(cfg, SWITCHES[name]))
        ratio = found[name]["ratio"]
        print(f"{name:<16} {ratio['median']:.2f}x [{ratio['quartiles'][0]:.2f}, {ratio['quartiles'][1]:.2f}]", flush=True)
    sha, dirty = git_state(ROOT)
    folder = Path(cfg.output_dir) / f"speed_{cfg.adapter.name}_{cfg.backbone.name}"
    folder /= datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    told = {
        "switches": found,
        "configuration": OmegaConf.to_container(cfg, resolve=True),
        "device": torch.cuda.get_device_name() if cfg.hardware.accelerator == "gpu" else "cpu",
        "versions": environment(),
        "git_sha": sha,
        "git_dirty": dirty,
        "command": command_line(),
    }
    (folder / "speed.json").write_text(json.dumps(told, indent=1))
    print(f"run: {folder}", flush=True)


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """-> names of switches, and the words of a training. Raises UserError for a name that there is not."""
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        return [], argv
    names = argv[0].split(",")
    if wrong := [name for name in names if name not in SWITCHES]:
        raise UserError(f"{wrong[0]} is no switch{nearest(wrong[0], SWITCHES)}")
    return names, argv[1:]


if __name__ == "__main__":
    try:
        names, sys.argv[1:] = split_words(sys.argv[1:])
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        raise SystemExit(2) from None
    cli("train", lambda cfg: main(cfg, names))
