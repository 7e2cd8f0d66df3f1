"""What several devices cannot do together with the other keys."""

from collections.abc import Callable
from typing import Any

Clash = Callable[[tuple[str, ...], str], Exception]


def check_devices(tree: dict[str, Any], hardware: dict[str, Any], clash: Clash) -> None:
    """Refuse what does not work on several devices, or needs them. hardware: concrete; clash: keys and fault -> the error."""
    several, strategy = hardware["devices"] * hardware["nodes"] > 1, hardware["strategy"]
    keys = ("hardware.strategy", "hardware.devices", "hardware.nodes")
    if strategy != "auto" and not several:
        fix = "write hardware.strategy=auto or hardware.devices=2"
        raise clash(keys, f"hardware.strategy={strategy} is for several devices; {fix}")
    if hardware["shard"] == "both" and strategy != "fsdp":
        fault = f"hardware.shard=both cuts the backbone as hardware.strategy=fsdp does, not {strategy}"
        raise clash(("hardware.shard", *keys), f"{fault}; write hardware.strategy=fsdp or hardware.shard=adapter")
    if several and (tree.get("together") or tree.get("together_tasks")):
        fault = "together: those who train together take turns on one device"
        raise clash(("together", "together_tasks", *keys), f"{fault}; write hardware.devices=1 hardware.nodes=1")
    if strategy == "fsdp":
        _check_fsdp(tree, hardware, clash)


def _check_fsdp(tree: dict[str, Any], hardware: dict[str, Any], clash: Clash) -> None:
    algorithm, backbone = tree.get("optimizer", {}).get("algorithm", {}), tree.get("backbone", {})
    quantize = backbone.get("quantize")
    for key, value, wrong, fix in (
        ("hardware.compile", hardware["compile"], hardware["compile"] != "none", "hardware.compile=none"),
        ("hardware.precision", hardware["precision"], hardware["precision"] == "16-mixed", "hardware.precision=bf16-mixed"),
        ("optimizer.algorithm", "8 bits", "8bit" in str(algorithm.get("_target_")), "optimizer=adamw or hardware.strategy=ddp"),
        ("control_arm", "true", hardware["shard"] == "both" and tree.get("control_arm"), "hardware.shard=adapter"),
        ("backbone.quantize", quantize, hardware["shard"] == "both" and quantize, "hardware.shard=adapter"),
    ):
        if wrong:
            fault = f"{key}={value} does not go with hardware.strategy=fsdp hardware.shard={hardware['shard']}"
            raise clash((key, "hardware.strategy", "hardware.shard"), f"{fault}; write {fix}")
