"""This project's training against diffusers' `train_controlnet_sd3.py`: same shapes, pictures, batch, precision, optimizer.

    python -m src.bench.peer script=<diffusers>/examples/controlnet/train_controlnet_sd3.py

The script is the reader's own copy, of the diffusers version that is installed: `git clone --depth 1 --branch v<version>` of
its public repository. It is run as it is. Both sides are real programs, each repetition in a process of its own, in turns;
torch calls back behind every optimizer step, and that is all that is timed. The last line printed is `run: <folder>`, where
peer.json has settings, all times, and the ratios with their spread.

What differs and is stated: the script encodes picture and condition in every step, ours are cached before the first one; the
time that it spends there is measured, and ratios are given with and without it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import cli, resolve_hardware
from src.types import UserError

ROOT = Path(__file__).resolve().parents[2]
RATE, BETAS, DECAY = 1e-5, (0.9, 0.999), 1e-2  # of AdamW, on both sides
PRECISION = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}
PEER = "diffusers"
SPEEDS = {  # ratios of speed, and how they are called
    "speed": "speed",
    "speed_without_encoder": "without its autoencoder's time",
    "speed_by_processor_time": "by processor time",
}


def main(cfg: DictConfig) -> None:
    """The entry: prepare, run the sides in turns, compare, write."""
    script = Path(cfg.script).expanduser()
    if not script.is_file():
        raise UserError(f"script={cfg.script} is not a file; it is examples/controlnet/train_controlnet_sd3.py of diffusers")
    from src.bench.origin import leave, stamped
    from src.bench.peer_world import model_folder, pictures, smaller_copy

    cfg = resolve_hardware(cfg)
    folder = stamped(cfg.output_dir, cfg.name)
    with tempfile.TemporaryDirectory() as kept:
        world = Path(kept)
        transformer = model_folder(cfg.shape, world / "model", cfg.seed)
        blocks = cfg.blocks or transformer["num_layers"] // 2
        smaller_copy(world / "model", blocks, world / "copy")
        pictures(world / "data", cfg.images, cfg.resolution, cfg.seed)
        sides = {PEER: theirs(cfg, world, script)}
        sides |= {adapter: ours(cfg, world, adapter, blocks) for adapter in cfg.adapters}
        runs = run_in_turns(cfg, sides, folder, world)
    result = {"kind": "peer", "settings": settings(cfg, script, transformer, blocks), "runs": runs, **compare(runs, cfg.batch)}
    leave(result, folder)
    say(result)
    print(f"run: {folder}", flush=True)


def theirs(cfg: DictConfig, world: Path, script: Path) -> dict[str, Any]:
    """The peer's command line."""
    flags = {
        "pretrained_model_name_or_path": world / "model",
        "controlnet_model_name_or_path": world / "copy",
        "dataset_name": world / "data" / "theirs",
        "cache_dir": world / "datasets",
        "output_dir": world / "theirs",
        "resolution": cfg.resolution,
        "train_batch_size": cfg.batch,
        "max_train_steps": cfg.warm_up + cfg.steps + 1,
        "checkpointing_steps": 10**9,
        "learning_rate": RATE,
        "lr_warmup_steps": 0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_weight_decay": DECAY,
        "max_grad_norm": 1.0,
        "max_sequence_length": cfg.t5_tokens,
        "mixed_precision": PRECISION[cfg.hardware.precision],
        "dataloader_num_workers": cfg.hardware.workers,
        "seed": cfg.seed,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    scopes = {"none": [], "adapter": ["--gradient_checkpointing"]}
    if cfg.hardware.checkpointing not in scopes:
        raise UserError("hardware.checkpointing=both: the peer's script recomputes the ControlNet alone; write adapter or none")
    return {"script": str(script), "argv": words + scopes[cfg.hardware.checkpointing]}


def ours(cfg: DictConfig, world: Path, adapter: str, blocks: int) -> dict[str, Any]:
    """Our training's command line. The same number of blocks where the method is the peer's."""
    images = cfg.batch * (cfg.warm_up + cfg.steps + 1)
    hardware = {k: v for k, v in cfg.hardware.items() if k not in ("name", "micro_batch", "rates") and v is not None}
    words = {
        "adapter": adapter,
        "backbone": "sd3_medium",
        "backbone.source": world / "model",
        "backbone.t5_tokens": cfg.t5_tokens,
        "resolution": cfg.resolution,
        "data": "folder",
        "data.path": world / "data" / "ours",
        "data.val_images": 4,
        "validation.images": 1,
        "validation.final_images": 1,
        "validation.every_images": images,
        "budget.images": images,
        "budget.effective_batch": cfg.batch,
        "optimizer.algorithm.lr": RATE,
        "optimizer.algorithm.betas": f"[{BETAS[0]},{BETAS[1]}]",
        "optimizer.algorithm.weight_decay": DECAY,
        "optimizer.warmup_images": 0,
        "optimizer.decay": "constant",
        "optimizer.clip_norm": 1.0,
        "ema_decay": 0,
        "logger": "local",
        "hardware": cfg.hardware.name,
        "hardware.micro_batch": cfg.batch,
        "output_dir": world / "runs",
        "cache_dir": world / "cache",
        "seed": cfg.seed,
        **{f"hardware.{k}": v for k, v in hardware.items()},
    }
    if adapter == "dit_controlnet":
        words["adapter.blocks"] = blocks
    given = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in words.items()]
    return {"module": "src.train", "argv": given + list(cfg.overrides)}


def run_in_turns(cfg: DictConfig, sides: dict[str, dict], folder: Path, world: Path) -> dict[str, list[dict]]:
    """Every side once per repetition, one after the other. On a CPU once more, for the memory alone: it stands in the first of
    a side's runs, and in no other."""
    on_gpu = cfg.hardware.accelerator == "gpu"
    common = {"device": "cuda" if on_gpu else "cpu", "threads": cfg.hardware.threads, "warm_up": cfg.warm_up}
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for turn in range(cfg.repetitions):
        for name, side in sides.items():
            spec = common | side | {"steps": cfg.steps, "memory": False}
            runs[name].append(run_side(spec, folder / f"{name}-{turn}", world, cfg.timeout_s))
    if not on_gpu:
        for name, side in sides.items():
            peak = run_side(common | side | {"steps": 1, "memory": True}, folder / f"{name}-memory", world, cfg.timeout_s)
            runs[name][0] |= peak
    return runs


def run_side(spec: dict[str, Any], base: Path, world: Path, timeout_s: float) -> dict[str, Any]:
    """One process. Its log stays beside the result. Raises UserError with the log's last line if it fails."""
    file, out, log = (base.with_suffix(s) for s in (".spec.json", ".json", ".log"))
    file.write_text(json.dumps(spec | {"out": str(out.resolve())}, indent=1))
    env = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env["HF_HOME"] = str(world / "hf")
    print(f"running {base.name}", flush=True)
    command = [sys.executable, "-m", "src.bench.peer_side", str(file.resolve())]
    with log.open("w") as stream:
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=stream, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"{base.name} took more than timeout_s={timeout_s:g}; its log: {log}") from None
    if done.returncode or not out.exists():
        said = [line for line in log.read_text().splitlines() if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
        why = said[-1][:200] if said else "no error was named"
        raise UserError(f"{base.name} ended with code {done.returncode}: {why}; its log: {log}")
    return json.loads(out.read_text())


def compare(runs: dict[str, list[dict]], batch: int) -> dict[str, Any]:
    """Images/s and memory of each side, and ours over the peer's, pair by pair of neighbouring runs. `n` of the memory: how
    many runs have told theirs."""
    from src.spread import spread

    def told(run: dict) -> bool:
        return "peak_gib" in run

    def rate(run: dict, encoder: bool = True) -> float:
        spent = sum(run["step_ms"]) - (0 if encoder else run["encoder_ms"])
        return 1000 * batch * len(run["step_ms"]) / spent

    sides = {
        name: {
            "images_per_s": spread([rate(run) for run in found]),
            "images_per_s_without_encoder": spread([rate(run, encoder=False) for run in found]),
            "peak_mem_gib": spread([run["peak_gib"] for run in found if told(run)]),
        }
        for name, found in runs.items()
    }
    ratios = {}
    for name in runs.keys() - {PEER}:
        pairs = list(zip(runs[name], runs[PEER], strict=True))
        ratios[name] = {
            "speed": spread([rate(a) / rate(b) for a, b in pairs]),
            "speed_without_encoder": spread([rate(a, encoder=False) / rate(b, encoder=False) for a, b in pairs]),
            "speed_by_processor_time": spread([b["cpu_ms"] / a["cpu_ms"] for a, b in pairs]),
            "memory": spread([a["peak_gib"] / b["peak_gib"] for a, b in pairs if told(a) and told(b)]),
        }
    return {"sides": sides, "ratios": ratios}


def settings(cfg: DictConfig, script: Path, transformer: dict, blocks: int) -> dict[str, Any]:
    """Everything that a reader needs to judge the comparison or to repeat it. Torch's switches stand in each run, as its
    program has left them."""
    from src.bench.origin import origin
    from src.results import without_places

    on_gpu, tree = cfg.hardware.accelerator == "gpu", OmegaConf.to_container(cfg, resolve=True)
    return {
        "configuration": {k: without_places(v) if isinstance(v, str) else v for k, v in tree.items()},
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "transformer": transformer,
        "copied_blocks": blocks,
        "text_tokens": 77 + cfg.t5_tokens,
        "latents": {"ours": "cached before the first step", PEER: "picture and condition encoded in every step"},
        "captions": "encoded before the first step on both sides",
        "optimizer": {"class": "AdamW", "lr": RATE, "betas": BETAS, "weight_decay": DECAY, "clip_norm": 1.0},
        "ema": False,
        "memory": "largest allocation of a run" if on_gpu else "live tensors in the largest moment of a step",
        **origin(on_gpu),
    }


def say(result: dict[str, Any]) -> None:
    """A line per side and per ratio."""
    for name, side in result["sides"].items():
        rate = side["images_per_s"]
        low, high = rate["quartiles"]
        print(f"{name:<16} {rate['median']:8.2f} images/s [{low:.2f}, {high:.2f}]  {side['peak_mem_gib']['median']:.3f} GiB")
    for name, ratio in result["ratios"].items():
        told = ", ".join(
            f"{words} {ratio[key]['median']:.2f}x [{ratio[key]['quartiles'][0]:.2f}, {ratio[key]['quartiles'][1]:.2f}]"
            for key, words in SPEEDS.items()
        )
        print(f"{name} / {PEER}: {told}, memory {ratio['memory']['median']:.2f}x")


if __name__ == "__main__":
    cli("bench_peer", main)
