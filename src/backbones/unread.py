"""Which modules of a frozen network compute something that nobody reads, found by measurement."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def unread_modules(net: nn.Module, result: Callable[[], Tensor]) -> tuple[list[str], list[str]]:
    """-> (names of leaf modules that run and whose output does not matter, names of those that never run).

    result: what is wanted of the network, for example a loss; deterministic, and with weights that let everything through
    (an untrained zero layer would hide what is in front of it). Each leaf in turn has its output disturbed: if the result
    stays equal to the last bit, nobody reads it. One call of `result` per leaf.
    """
    leaves = {name: m for name, m in net.named_modules() if not any(True for _ in m.children())}
    ran: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=name: ran.add(n)) for name, m in leaves.items()]
    right = result()
    for hook in hooks:
        hook.remove()
    silent = []
    for name in ran:
        hook = leaves[name].register_forward_hook(_disturb)
        if torch.equal(result(), right):
            silent.append(name)
        hook.remove()
    return sorted(silent), sorted(leaves.keys() - ran)


def _disturb(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + 0.1 * (1 + torch.arange(output.numel(), device=output.device).remainder(7).view_as(output))
