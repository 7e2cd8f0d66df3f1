"""What a quantized backbone does to the loss of an adapter, on held-out images: the same weights, noise and t on both.

    python -m src.bench.quantized run=runs/<name>/<stamp> n=64
    python -m src.bench.quantized run=runs/<name>/<stamp> n=64 kind=fp8 hardware=h200

run: a finished run of `python -m src.train` on a backbone that was not quantized; n: held-out images; kind: int8 (the weights
alone, anywhere) or fp8 (weights and activations, on a Hopper GPU or newer, refused elsewhere); output_dir: where
quantized_<adapter>_<backbone>/<stamp>/quantized.json goes. The last line printed is `run: <folder>`.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import load, resolve_hardware
from src.config.messages import nearest
from src.vocabulary import UserError, refused_in_one_line

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig
    from torch import Tensor

    from src.adapters.base import ControlAdapter
    from src.backbones.base import Backbone
    from src.types import Batch

KINDS = ("int8", "fp8")
WORDS = {"run": None, "n": None, "kind": "int8", "hardware": "auto", "output_dir": "runs"}  # and their defaults


def loss_change(
    make: "Callable[[Backbone], ControlAdapter]",
    weights: "dict[str, Tensor]",
    exact: "Backbone",
    quantized: "Backbone",
    batches: "Iterable[Batch]",
) -> dict[str, Any]:
    """-> "loss" on the exact backbone, "quantized_loss", "change" (their paired difference) with 95 % intervals, "relative".

    make: an untrained adapter on a backbone; weights: its trained tensors; batches: held-out, see `ControlData`.
    relative: change over loss. The adapter was trained on one of the two: the other is what it is moved to.
    """
    import numpy as np

    from src.metrics.intervals import metric

    device = next(exact.net.parameters()).device
    adapters = [make(backbone).to(device) for backbone in (exact, quantized)]
    for adapter in adapters:
        adapter.load_state_dict(weights)
        adapter.eval()
    pairs = []
    for batch in batches:
        moved = batch.to(device)
        pairs.append([_losses(adapter, moved) for adapter in adapters])
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    change = metric(after - before, "mse", "lower")
    told = {"loss": metric(before, "mse", "lower"), "quantized_loss": metric(after, "mse", "lower"), "change": change}
    return told | {"quantize": quantized.quantize, "relative": change["value"] / told["loss"]["value"]}


def _losses(adapter: "ControlAdapter", batch: "Batch") -> "np.ndarray":
    import torch

    with torch.no_grad(), adapter.autocast():
        return adapter.losses(batch).double().cpu().numpy()


def asked(typed: list[str]) -> dict[str, str]:
    """The words of a command line, with defaults. Raises UserError for one that there is not, and for one that is missing."""
    found = dict(WORDS)
    for word in typed:
        name, equals, value = word.partition("=")
        if name not in WORDS or not equals:
            raise UserError(f"{word}: {name} is no word here{nearest(name, WORDS)}")
        found[name] = value
    if missing := [name for name, value in found.items() if not value]:
        raise UserError(f"{missing[0]}= is missing: python -m src.bench.quantized run=<run folder> n=64")
    if not found["n"].isdigit() or int(found["n"]) < 2:
        raise UserError(f"n={found['n']}: give a number of held-out images, 2 at least: an interval wants more than one")
    return found


def has_fp8(cfg: "DictConfig") -> bool:
    """Whether a resolved configuration's device multiplies in fp8."""
    import torch

    from src.config.rules import FP8_CAPABILITY

    return cfg.hardware.accelerator == "gpu" and torch.cuda.get_device_capability() >= FP8_CAPABILITY


def configured(words: dict[str, str]) -> "tuple[DictConfig, Path]":
    """-> the run's configuration on this machine, and its checkpoint. Raises UserError for what cannot be."""
    from src.runs import trained_run

    if words["kind"] not in KINDS:
        raise UserError(f"kind={words['kind']} is not one of {', '.join(KINDS)}")
    cfg, checkpoint = trained_run(words["run"])
    cfg.hardware = resolve_hardware(load("train", [f"hardware={words['hardware']}"])).hardware
    if words["kind"] == "fp8" and not has_fp8(cfg):
        raise UserError("kind=fp8 needs a Hopper GPU or newer, which is not here; write kind=int8")
    if cfg.backbone.get("quantize"):
        raise UserError(
            f"run={words['run']}: its backbone is in {cfg.backbone.quantize} already; give one that was not quantized"
        )
    if int(words["n"]) > cfg.data.val_images:
        raise UserError(f"n={words['n']}: the run holds out {cfg.data.val_images} images; write n={cfg.data.val_images}")
    return cfg, checkpoint


def change_of_run(cfg: "DictConfig", checkpoint: Path, kind: str, n: int) -> dict[str, Any]:
    """`loss_change` of a trained run on its first n held-out images, at the noise and t of its validation loss."""
    import torch

    from src import build
    from src.construct import construct
    from src.data.datamodule import ImageStream, PositionSampler
    from src.data.stores import build_stores
    from src.fit import changed

    torch.set_num_threads(cfg.hardware.threads)
    made, model, device = build.plan(cfg), build.load_sampler(cfg, checkpoint), build.device_of(cfg)
    backbone, space, workers = model.backbone, model.adapter.condition_space, cfg.hardware.workers
    (held,) = build_stores(
        [made.val_source], made.task, backbone, model.codec, space, Path(cfg.cache_dir), device, cfg.seed, workers, print
    )
    backbone.drop_text()
    stream = ImageStream(held, cfg.validation.seed, 0.0, stream="val")
    batches = (stream.__getitems__(rows) for rows in PositionSampler(0, n, cfg.hardware.micro_batch))
    node = changed(cfg, {"backbone.quantize": kind}).backbone
    small = construct(node, resolution=cfg.resolution).load(device, build.backbone_dtype(cfg))
    return loss_change(
        lambda on: build.new_adapter(cfg, on, training=False), model.adapter.state_dict(), backbone, small, batches
    )


def main(typed: list[str]) -> None:
    """Measure it, write it, say it."""
    words = asked(typed)
    cfg, checkpoint = configured(words)
    from src import build
    from src.bench.origin import leave, origin_of_times, stamped

    build.quiet()
    found = change_of_run(cfg, checkpoint, words["kind"], int(words["n"]))
    told = {
        "kind": "quantized",
        **found,
        "n": found["change"]["n"],
        "adapter": cfg.adapter.name,
        "backbone": cfg.backbone.name,
        "resolution": cfg.resolution,
        "precision": cfg.hardware.precision,
        "run": "/".join(checkpoint.parts[-4:]),  # <name>/<stamp>/checkpoints/<images>
        **origin_of_times(cfg.hardware.accelerator == "gpu"),
    }
    folder = stamped(words["output_dir"], f"quantized_{cfg.adapter.name}_{cfg.backbone.name}")
    leave(told, folder)
    low, high = found["change"]["ci95"]
    print(f"loss {found['loss']['value']:.5f} on the exact backbone, {found['quantized_loss']['value']:.5f} in {words['kind']}")
    print(f"change {found['change']['value']:+.2e} [{low:+.2e}, {high:+.2e}] of {told['n']} images, {found['relative']:+.2%}")
    print(f"run: {folder}", flush=True)


if __name__ == "__main__":
    with refused_in_one_line():
        main(sys.argv[1:])
