"""Frozen features on disk for a training: which, how many bytes, and filling them (`feature_cache` in the configuration)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from src.adapters.base import ControlAdapter
from src.adapters.frozen import Reads
from src.data.cache import mib, store_key
from src.data.datamodule import Stores
from src.data.feature_cache import DTYPES, FeatureStore, RepeatingStream, fill_features
from src.profiling.memory import GIB
from src.types import Batch, UserError


def check_features(cfg: DictConfig, images: int, sizes: int, numbers: int | None) -> None:
    """Tell the bytes of the features to be kept, and refuse what cannot be or is above the budget. Raises UserError.

    images: of the training split; sizes: how many sizes they have; numbers: how many are kept of a draw, None for a method
    that has no frozen pass of its own.
    """
    cache = cfg.feature_cache
    asked = f"feature_cache.dtype={cache.dtype}"
    if cache.draws is None:
        raise UserError(f"{asked}: ever new noise never comes again; give feature_cache.draws=<fixed draws per image>")
    if numbers is None:
        raise UserError(f"{asked}: {cfg.adapter.name} writes into the backbone, so nothing of its pass can be kept")
    if sizes > 1:
        raise UserError(f"{asked}: images of {sizes} sizes have features of as many shapes; train without data.buckets")
    of_row = numbers * DTYPES[cache.dtype].itemsize
    total = images * cache.draws * of_row
    most = int(cache.budget_gib * GIB // (images * of_row))
    fewer = f"write feature_cache.draws={most}; " if most else ""
    print(f"frozen features: {images} images x {cache.draws} draws x {mib(of_row)} = {mib(total)} on disk", flush=True)
    if total > cache.budget_gib * GIB:
        raise UserError(
            f"{asked}: {mib(total)} of features are more than feature_cache.budget_gib={cache.budget_gib:g}; "
            f"{fewer}feature_cache.dtype=bf16 or adapter=unicon_half take less"
        )


def features_on_disk(
    cfg: DictConfig, stores: Stores, adapters: Sequence[ControlAdapter], reads: Reads, say: Callable[[str], None]
) -> FeatureStore:
    """The features of every draw of the training images, computed as far as they are missing.

    adapters: those that will read them; of the first the noise levels and the backbone count, which are those of all.
    """
    first, cache = adapters[0], cfg.feature_cache
    weights = next(first.backbone.net.parameters())
    stream = RepeatingStream(stores, cfg.seed, cfg.caption_dropout, draws=cache.draws)

    @torch.no_grad()
    def compute(batch: Batch) -> dict[str, Tensor]:
        # the adapter itself is on its way to the device, and no part of it is asked
        with nullcontext() if weights.dtype == torch.float32 else torch.autocast(weights.device.type, weights.dtype):
            return first.frozen_pass(batch.to(weights.device), reads).tensors()

    content = {
        "latents": stores.latents.folder.name,
        "text": stores.text.folder.name,
        "backbone": first.backbone.weight_hash(),
        "reads": [sorted(places) for places in (reads.x, reads.text, reads.skips)],
        "drawn": [cfg.seed, cache.draws, cfg.caption_dropout, cfg.time_law],
        "precision": [cfg.hardware.precision, cache.dtype],
    }
    of_row = sum(t.numel() for t in compute(stream.of([0])).values()) * DTYPES[cache.dtype].itemsize
    folder = Path(cfg.cache_dir) / f"features-{store_key(**content)}"
    store = FeatureStore(folder, stores.latents.count * cache.draws, of_row)
    if store.missing():
        store.describe(**content)
        fill_features(store, stream, compute, DTYPES[cache.dtype], cfg.hardware.micro_batch, say)
    return store
