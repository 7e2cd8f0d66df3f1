"""Switches of `hardware/` that act on modules: compiled blocks, CUDA graphs, memory layout. They change speed, and results
by no more than the rounding of another order of sums. All of them work in place: names in state dictionaries stay.
"""

from collections.abc import Iterable

import torch
from torch import nn

from src.backbones.base import Backbone
from src.types import Compile, UserError

# a U-Net's blocks share their code and differ in shape: with torch's own limit most of them would run uncompiled
RECOMPILE_LIMIT = 64


def speed_up(
    backbone: Backbone,
    trained: Iterable[nn.Module],
    *,
    compile: Compile,
    cuda_graphs: bool,
    channels_last: bool,
    grad_through_backbone: bool,
) -> list[str]:
    """Set a loaded backbone and the parts of an adapter to these switches. -> lines that are worth saying.

    trained: the adapter's parts. compile: the blocks of the frozen network, or also the children of the trained parts;
    cuda_graphs: replay the compiled frozen blocks as CUDA graphs; grad_through_backbone: whether the method's backward
    pass enters the backbone. Raises UserError for CUDA graphs of a network that a gradient crosses.
    """
    lines, trained = [], list(trained)
    if channels_last and backbone.facts.spatial:
        for module in (backbone.net, *trained):
            nn.Module.to(module, memory_format=torch.channels_last)  # diffusers' own warns
    elif channels_last:
        lines.append(f"hardware.channels_last does nothing on {backbone.facts.source}: a transformer has no maps")
    if cuda_graphs and grad_through_backbone:
        raise UserError(
            "hardware.cuda_graphs=true: they replay a frozen half that runs forward only, and this method's gradient crosses "
            "the backbone; write hardware.cuda_graphs=false, or adapter=unicon"
        )
    if compile in ("frozen", "all"):
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        _compile(backbone.steps(), "reduce-overhead" if cuda_graphs else None)
        backbone.graphs = cuda_graphs
    if compile == "all":
        _compile([block for part in trained for block in part.children()], None)
    return lines


def _compile(blocks: Iterable[nn.Module], mode: str | None) -> None:
    for block in blocks:
        if block._compiled_call_impl is None:  # a second adapter of the same run finds the backbone compiled
            block.compile(mode=mode)
