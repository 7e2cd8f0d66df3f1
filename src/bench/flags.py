"""What a cost depends on besides the cell: switches of torch, of the optimizer and of the profile. Every row carries them."""

from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig

from src.profiling.optimizer import in_groups


def tf32() -> tuple[bool, bool]:
    """Whether float32 products, and float32 convolutions, run in TF32 on a GPU."""
    found = []
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn):
        try:
            found.append(bool(switch.allow_tf32))
        except RuntimeError:  # torch's newer switches were used, and the old one refuses to speak for them
            found.append("tf32" in str(getattr(switch, "fp32_precision", "")))
    return found[0], found[1]


def attention_enabled() -> list[str]:
    """Kernels that `scaled_dot_product_attention` may choose from on a GPU."""
    cuda = torch.backends.cuda
    switches = {
        "flash": cuda.flash_sdp_enabled,
        "efficient": cuda.mem_efficient_sdp_enabled,
        "cudnn": getattr(cuda, "cudnn_sdp_enabled", lambda: False),
        "math": cuda.math_sdp_enabled,
    }
    return [name for name, enabled in switches.items() if enabled()]


def optimizer_kernel(algorithm: Any, on_gpu: bool) -> str:
    """fused, foreach or for_loop; the library's name for an optimizer that is not torch's."""
    if not algorithm.func.__module__.startswith("torch."):
        return algorithm.func.__module__.partition(".")[0]
    chosen = {**getattr(algorithm, "keywords", {}), **in_groups(algorithm, on_gpu)}
    return "fused" if chosen.get("fused") else "foreach" if chosen.get("foreach") else "for_loop"


def torch_flags() -> dict[str, Any]:
    """Torch's own switches that times depend on, as they are in this process."""
    tf32_matmul, tf32_conv = tf32()
    return {
        "attention_enabled": attention_enabled(),
        "tf32_matmul": tf32_matmul,
        "tf32_conv": tf32_conv,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "threads": torch.get_num_threads(),
    }


def flags(cfg: DictConfig, kernel: str | None, attention: Iterable[str]) -> dict[str, Any]:
    """The flags of a row. kernel: of the optimizer, None where nothing trains; attention: kernels that ran."""
    hardware = cfg.hardware
    return torch_flags() | {
        "precision": hardware.precision,
        "attention": "+".join(sorted(attention)) or "none",
        "compile": hardware.compile,
        "cuda_graphs": hardware.cuda_graphs,
        "checkpointing": hardware.checkpointing,
        "optimizer": cfg.optimizer.algorithm["_target_"] if kernel else "none",
        "optimizer_kernel": kernel or "none",
        "channels_last": hardware.channels_last,
        "overlap": hardware.overlap,
        "micro_batch": cfg.batch,
        "naive": cfg.naive,
        "quantize": cfg.backbone.get("quantize"),
        "clip_norm": cfg.optimizer.clip_norm if kernel else None,
        "ema": cfg.ema and bool(kernel),
        "gradients_cleared": "behind the update",
        "codec_and_text_encoders": "not included",
    }
