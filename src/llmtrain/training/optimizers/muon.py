"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) for full and for sharded matrices.

    gradient ─▶ momentum with Nesterov's look-ahead ─▶ orthogonalize ─▶ decay and update the weight

Matrices of one shape are orthogonalized in one batch. The matrix products run in bfloat16 where the device multiplies
it natively, and in float32 elsewhere: `torch.optim.Muon` always takes bfloat16, which a processor without it emulates
at about a hundredth of the speed of float32.

A sharded matrix has to be orthogonalized as a whole, which its rows alone do not allow. So each rank gathers its share
of the matrices, orthogonalizes these, and broadcasts the results: no rank repeats another rank's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.distributed.sharding import by_mesh, full_tensor, is_sharded, part_of, ranks_of, rows_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of quintic Newton-Schulz iteration, steepest at 0 (kellerjordan.github.io/posts/muon)."""
NUM_ITERATIONS = 5
EPS = 1e-7
MAX_BATCH_ELEMENTS = 2**24
"""Elements of the matrices that are orthogonalized at a time: bounds the temporary memory to about 4 × 64 MiB."""


class Muon(torch.optim.Optimizer):
    """Update matrices by their orthogonalized momentum, scaled so that AdamW's learning rates fit.

    `lr`, `weight_decay` and `momentum` mean what they mean in `torch.optim.Muon` with `match_rms_adamw`, and so does
    the state: one `momentum_buffer` a matrix. `dtype` is the type of the matrix products. `compiled`: compile them.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.found_inf: Tensor | None = None
        """A scalar as torch's fused optimizers take it: where it is 1, a step changes nothing. None: it is 0."""
        self._dtype = dtype
        self._orthogonalize: Callable[[Tensor], Tensor] = (
            torch.compile(orthogonalize, dynamic=True) if compiled else orthogonalize
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. With sharded matrices all ranks call it at the same point."""
        assert closure is None, "the training loop computes the gradients before the step"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for on_one_mesh in by_mesh(parameters):
                for batch in _batches(on_one_mesh):
                    if is_sharded(batch[0]):
                        self._step_sharded(batch, group)
                    else:
                        self._step_full(batch, group)

    def _step_full(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        directions = torch.stack([self._direction(parameter, group) for parameter in parameters])
        for parameter, update in zip(parameters, self._orthogonalize(directions), strict=True):
            self._apply(parameter, update, parameter.shape, group)

    def _step_sharded(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """The matrix at index i is orthogonalized on rank i modulo the number of ranks."""
        ranks = ranks_of(parameters[0])
        own_rank, num_ranks = dist.get_rank(ranks), dist.get_world_size(ranks)
        own: list[Tensor] = []
        for index, parameter in enumerate(parameters):
            direction = full_tensor(self._direction(parameter, group))
            if index % num_ranks == own_rank:
                own.append(direction)
        updates = iter(self._orthogonalize(torch.stack(own)) if own else ())
        for index, parameter in enumerate(parameters):
            owner = index % num_ranks
            update = (
                next(updates).contiguous()
                if owner == own_rank
                else torch.empty(parameter.shape, dtype=self._dtype, device=parameter.device)
            )
            dist.broadcast(update, group=ranks, group_src=owner)
            part = part_of(parameter)
            self._apply(part.local, update[rows_of(part)], parameter.shape, group)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Add the gradient to the momentum, and return what the update follows; sharded as the parameter is."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, state["momentum_buffer"], grad)
        momentum: Tensor = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]).to(self._dtype)

    def _apply(self, weight: Tensor, update: Tensor, shape: Sequence[int], group: dict[str, Any]) -> None:
        """Decay a full matrix, or this rank's rows of one of `shape`, and add its orthogonalized update.

        0.2 · √(longer side) gives the update the root mean square of AdamW's (Liu et al. 2025, section 2.2).
        """
        decay = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            decay, update = torch.where(self.found_inf > 0, 1.0, decay), torch.where(self.found_inf > 0, 0.0, update)
        weight.mul_(decay)
        weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of `matrices` [n, rows, columns] close to 1 (0.7 to 1.2), in their dtype.

    Newton-Schulz: each iteration applies an odd polynomial to the singular values and leaves the singular vectors.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # the products of the shorter side are the smaller ones
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norms.clamp(min=EPS)  # the Frobenius norm bounds the largest singular value
    for _ in range(NUM_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield matrices of one shape together, in their order, as many as fit into a batch."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    for shape, matrices in by_shape.items():
        size = max(1, MAX_BATCH_ELEMENTS // math.prod(shape))
        for start in range(0, len(matrices), size):
            yield matrices[start : start + size]
