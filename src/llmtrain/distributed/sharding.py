"""Parameters sharded over the ranks (FSDP2), and which part of a tensor this rank holds.

    module ─ each block, then the rest ─▶ fully_shard ─▶ parameters are DTensors, sharded along their first dimension
    tensor ─▶ Part: the rows that this rank holds, and their place in the full tensor

A full tensor is its own only part, so callers do not ask whether a tensor is sharded. The engine calls `shard`.
Checkpoints, optimizers and the code that gives a model its first values call the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtrain.distributed.tensor_parallel import split_matrices

_WAITS = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Methods of FSDP's parameter groups that wait for the other ranks: to gather parameters, to add up gradients."""


@dataclass(frozen=True)
class Part:
    """The part of a tensor that one rank holds."""

    local: Tensor
    """The tensor's own memory on this rank, not a copy; it may be empty."""
    offset: tuple[int, ...]
    """First index of the part in the full tensor, one for each dimension."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""

    @property
    def is_whole(self) -> bool:
        """True if this rank holds the full tensor."""
        return tuple(self.local.shape) == self.shape


def shard(module: nn.Module, mesh: DeviceMesh, *, precision: str) -> nn.Module:
    """Shard the parameters of `module` in place over the data-parallel ranks of `mesh`.

    Of parameters on the meta device this rank's part gets memory, without values. A module that has `layers()` is
    sharded one layer at a time, so that no more than two layers are full at once. Gradients are summed in float32. With
    bf16-mixed, parameters are gathered in bfloat16, half the bytes, and the parts stay float32.
    """
    param_dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    # Inputs are not cast: autocast decides what is computed in bfloat16, and positions and masks have to stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    data_parallel = mesh["data_parallel"]
    if mesh["tensor_parallel"].size() > 1:
        mesh._flatten("all")  # so that a norm is one sum over all ranks, and therefore the same on each
        split_matrices(module, mesh["tensor_parallel"])
    for part in (*layers_of(module), module):
        sharded = fully_shard(part, mesh=data_parallel, mp_policy=policy)
        if mesh.device_type == "cpu":
            sharded.set_custom_reduce_scatter(cast(Any, _ReduceScatterOverGloo()))
    # fully_shard moves parameters and buffers that have values. Tables that are neither follow here as well.
    module._apply(partial(_moved, device=mesh.device_type))  # type: ignore[no-untyped-call]
    module.register_forward_hook(_reshard_after_inference)
    if hasattr(module, "logits"):
        register_fsdp_forward_method(module, "logits")
    return module


def _moved(tensor: Tensor, *, device: str) -> Tensor:
    """Move a tensor to a type of device; one on the meta device gets memory there, without values."""
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device)
    return tensor if tensor.device.type == device else tensor.to(device)


class _ReduceScatterOverGloo:
    """Sums gradients over the ranks with gloo: each rank receives its own rows from all ranks and sums them.

    gloo's own reduce-scatter sums all rows on every rank first, which takes three times as long (docs/scaling.md). The
    methods are those of FSDP's `ReduceScatter`.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate memory to send or to receive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Reduce `input_tensor` [ranks · n] → `output_tensor` [n]."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of `module` that are sharded one at a time; none if it has no method `layers`."""
    layers: Callable[[], list[nn.Module]] = getattr(module, "layers", list)
    return layers()


def parameter_groups(module: nn.Module) -> list[Any]:
    """Return FSDP's groups of parameters, each gathered at a time; none if the module is not sharded."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]


@contextmanager
def waits_inside(groups: Sequence[Any], wait: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `wait()` around each wait of these parameter groups for other ranks, while the block runs.

    On a GPU the current stream waits, not the host. Waits are never nested.
    """
    for group in groups:
        for name in _WAITS:
            setattr(group, name, _wrapped(getattr(group, name), wait))
    try:
        yield
    finally:
        for group in groups:
            for name in _WAITS:
                delattr(group, name)  # uncovers the class's own method


def _wrapped(method: Callable[..., Any], wait: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    def waiting(*arguments: Any, **options: Any) -> Any:
        with wait():
            return method(*arguments, **options)

    return waiting


def _reshard_after_inference(module: nn.Module, arguments: Any, output: Any) -> None:
    """Reshard after a forward pass without gradients, since no backward pass follows that would.

    The root's parameters would stay full, and be stale after the next update.
    """
    if not torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


def without_gradients(model: object) -> AbstractContextManager[Any]:
    """Return inference mode, the fastest; for a sharded model no_grad, since tensors gathered in inference mode could
    never be trained.
    """
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()


def part_of(tensor: Tensor) -> Part:
    """Return this rank's part of a tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Part(tensor.to_local(), tuple(offset), tuple(tensor.shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank. It is a collective if the tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


@torch.no_grad()
def fill(tensor: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Let `draw` give `tensor` its first values, the same ones whether it is sharded or not, on any device.

    For a sharded tensor the full values are drawn in float32 on the CPU, and this rank keeps its part. So no more than
    one parameter is ever full.
    """
    if not is_sharded(tensor):
        draw(tensor)
        return
    values = torch.empty(tensor.shape)
    draw(values)
    take_part(tensor, values)


def take_part(tensor: Tensor, values: Tensor) -> None:
    """Fill this rank's part of `tensor` from the full `values`, and read only that part of them."""
    part = part_of(tensor)
    part.local.copy_(values[rows_of(part)])


def rows_of(part: Part) -> tuple[slice, ...]:
    """Return the index of a part in the full tensor."""
    return tuple(slice(start, start + length) for start, length in zip(part.offset, part.local.shape, strict=True))


def sharded_like(values: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is sharded as `like` is, with `values` as this rank's part."""
    if not isinstance(like, DTensor):
        return values
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def without_values(module: nn.Module) -> nn.Module:
    """Copy a module that is not sharded yet to the meta device: names, shapes, ties and methods, without memory."""
    memo: dict[int, Any] = {}
    tables = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    for tensor in (*module.parameters(), *module.buffers(), *tables):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors that are sharded alike, as operations on many tensors at once require."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def ranks_of(tensor: Tensor) -> dist.ProcessGroup:
    """Return the ranks that hold parts of a sharded tensor: the data-parallel ones, or all if it is split as well."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh._flatten("all").get_group()
    return group


def is_sharded(tensor: Tensor) -> bool:
    """Return whether other ranks hold other parts of the tensor."""
    return isinstance(tensor, DTensor)
