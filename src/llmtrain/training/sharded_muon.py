"""Muon's update where matrices are cut over the ranks: each is put together on one of them, in turn.

Muon orthogonalises a matrix as a whole, which its rows alone do not allow:

    momentum   by elements, each rank on its own rows
    gather     as many matrices at a time as there are ranks; the i-th rank orthogonalises the i-th
    broadcast  from there, and every rank takes its own rows

So no rank does another's work, and none holds more than two whole matrices. What is done to one is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.distributed.sharding import by_mesh, part_of, ranks_of, rows_of, whole


@torch.no_grad()
def step_muon(optimizer: torch.optim.Muon) -> None:
    """What `optimizer.step()` does, for parameters that are cut. All ranks call it at the same point."""
    for group in optimizer.param_groups:
        for parameters in by_mesh(parameter for parameter in group["params"] if parameter.grad is not None):
            _step_together(optimizer, parameters, group)


def _step_together(optimizer: torch.optim.Muon, parameters: list[Tensor], group: dict[str, Any]) -> None:
    """For parameters that lie on the same ranks."""
    ranks = ranks_of(parameters[0])
    own_index, num_ranks = dist.get_rank(ranks), dist.get_world_size(ranks)
    for start in range(0, len(parameters), num_ranks):
        some, own = parameters[start : start + num_ranks], torch.empty(0)
        for index, parameter in enumerate(some):
            assert parameter.grad is not None
            direction = whole(_direction(optimizer.state[parameter], parameter.grad, group))
            if index == own_index:
                own = _change(direction, group)
        for index, parameter in enumerate(some):
            change = own if index == own_index else torch.empty(parameter.shape, device=parameter.device)
            dist.broadcast(change, group=ranks, group_src=index)
            part = part_of(parameter)
            part.local.mul_(1 - group["lr"] * group["weight_decay"]).add_(change[rows_of(part)])


def _direction(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The momentum after this gradient, with Nesterov's look ahead; cut as the parameter is."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    momentum: Tensor = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
    return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def _change(direction: Tensor, group: dict[str, Any]) -> Tensor:
    """What Muon adds to a matrix for a whole direction: torch's Muon, on a matrix of zeros and without momentum."""
    matrix = torch.zeros_like(direction, dtype=torch.float32)
    matrix.grad = direction.float()
    kept = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    options = {name: group[name] for name in kept}
    torch.optim.Muon([matrix], weight_decay=0.0, momentum=0.0, nesterov=False, **options).step()  # type: ignore[no-untyped-call]
    return matrix.detach()
