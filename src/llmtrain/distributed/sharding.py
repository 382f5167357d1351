"""Parameters sharded over the ranks (FSDP2), and which part of a tensor this rank holds.

    module ─ each block, then the rest ─▶ fully_shard ─▶ parameters are DTensors, sharded along their first dimension
    tensor ─▶ Part: the rows that this rank holds, and their place in the full tensor

With several replicas (HSDP: Zhao et al. 2023, arXiv:2304.11277) each is sharded over its own ranks, which gather
weights among themselves. Only gradients, already summed over a replica's ranks, go from one replica to another.

A tensor that is not sharded is a single part, so callers need not check whether a tensor is sharded. The engine calls
`shard`; checkpoints, optimizers and the initialization of models call the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtrain.distributed.tensor_parallel import split_matrices

_WAITS = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""Methods of FSDP's parameter groups that wait for the other ranks: to gather parameters, to add up gradients."""
REPLICATE = "replicate"
"""Dimension of a mesh along which the ranks hold the same shards."""


@dataclass(frozen=True)
class Part:
    """The part of a tensor that one rank holds."""

    local: Tensor
    """The tensor's own memory on this rank, not a copy; it may be empty."""
    offset: tuple[int, ...]
    """First index of the part in the full tensor, one for each dimension."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""


def shard(module: nn.Module, mesh: DeviceMesh, *, precision: str, replicate: int = 1) -> nn.Module:
    """Shard the parameters of `module` in place over the data-parallel ranks of `mesh`, or over those of a replica.

    `replicate` is the number of replicas, each on ranks that follow each other, as those of a machine do.

    If parameters are on the meta device, this rank's parts get memory, without values. A module that has `layers()` is
    sharded one layer at a time, so that no more than two layers are full at once. Gradients are summed in float32. With
    bf16-mixed, parameters are gathered in bfloat16, which halves the bytes, while the parts stay float32.
    """
    param_dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    # Inputs are not cast: autocast decides what is computed in bfloat16, and positions and masks must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    over: tuple[str, ...] = ("data_parallel",)
    if replicate > 1:
        over = (REPLICATE, "shard")
        sizes = (replicate, mesh["data_parallel"].size() // replicate, mesh["tensor_parallel"].size())
        mesh = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=(*over, "tensor_parallel"))
    if mesh["tensor_parallel"].size() > 1:
        # So that a norm is one sum over all ranks of a replica, and therefore the same on each.
        mesh[(over[-1], "tensor_parallel")]._flatten()
        split_matrices(module, mesh["tensor_parallel"])
    for part in (*layers_of(module), module):
        sharded = fully_shard(part, mesh=mesh[over], mp_policy=policy)
        if mesh.device_type == "cpu":
            sharded.set_custom_reduce_scatter(cast(Any, _ReduceScatterOverGloo()))
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no average; FSDP divides the sum instead
    # fully_shard only moves parameters and buffers that have values. This also moves tables, which are neither.
    module._apply(partial(_moved, device=mesh.device_type))  # type: ignore[no-untyped-call]
    module.register_forward_hook(_reshard_after_inference)
    if hasattr(module, "logits"):
        register_fsdp_forward_method(module, "logits")
    return module


def _moved(tensor: Tensor, *, device: str) -> Tensor:
    """Return the tensor on a device of type `device`; a meta tensor gets memory there, without values."""
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device)
    return tensor if tensor.device.type == device else tensor.to(device)


class _ReduceScatterOverGloo:
    """Sums gradients over the ranks with gloo: each rank receives its own rows from all ranks and sums them.

    gloo's own reduce-scatter first sums all rows on every rank, which takes three times as long (docs/scaling.md). The
    interface is that of FSDP's `ReduceScatter`.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate memory to send or to receive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Reduce `input_tensor` [ranks · n] → `output_tensor` [n]."""
        assert op == dist.ReduceOp.SUM, op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of `module` that are sharded one at a time; none if it has no method `layers`."""
    layers: Callable[[], list[nn.Module]] = getattr(module, "layers", list)
    return layers()


def parameter_groups(module: nn.Module) -> list[Any]:
    """Return FSDP's parameter groups, which are gathered one at a time; none if the module is not sharded."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]


@contextmanager
def waits_inside(groups: Sequence[Any], wait: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `wait()` around each call in which these parameter groups wait for other ranks, within the block.

    On a GPU it is the current stream that waits, not the host. Such calls are never nested.
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
    """Reshard the module after a forward pass without gradients, since no backward pass follows to do it.

    Otherwise the parameters outside of the layers would stay full, and be out of date after the next update.
    """
    if not torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


def without_gradients(model: object) -> AbstractContextManager[Any]:
    """Return inference mode, which is fastest; for a sharded model and under a GPU's autocast no_grad.

    Tensors that were gathered in inference mode could not be trained afterwards, and autocast would not keep the
    weights that it has rounded, but round them in each forward pass.
    """
    keeps = isinstance(model, FSDPModule) or torch.is_autocast_enabled("cuda")
    return torch.no_grad() if keeps else torch.inference_mode()


def part_of(tensor: Tensor) -> Part:
    """Return this rank's part of a tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    offset = _offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Part(tensor.to_local(), offset, tuple(tensor.shape))


@cache
def _offset(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the first index of this rank's part. torch computes it with tensors, so each is computed once."""
    return tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[1])


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor on every rank. It is a collective if the tensor is sharded.

    A number, such as a norm, that each replica has summed by itself is that of the first one: the others' may be summed
    in another order, and one bit of difference would let the replicas' weights drift apart.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    if not full.ndim and REPLICATE in (tensor.device_mesh.mesh_dim_names or ()):
        dist.broadcast(full, group=tensor.device_mesh.get_group(REPLICATE), group_src=0)
    return full


@torch.no_grad()
def fill(tensor: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Initialize `tensor` with `draw`, which fills a tensor in place. A sharded tensor gets the same values.

    For a sharded tensor the full values are drawn in float32 on the CPU, and this rank keeps its part. So no more than
    one parameter is full at a time.
    """
    if not is_sharded(tensor):
        draw(tensor)
        return
    values = torch.empty(tensor.shape)
    draw(values)
    take_part(tensor, values)


def take_part(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's part of the full `values` into `tensor`."""
    part = part_of(tensor)
    part.local.copy_(values[rows_of(part)])


def rows_of(part: Part) -> tuple[slice, ...]:
    """Return the slices of the full tensor that select the part, one for each dimension."""
    return tuple(slice(start, start + length) for start, length in zip(part.offset, part.local.shape, strict=True))


def sharded_like(values: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is sharded like `like`, with `values` as this rank's part."""
    if not isinstance(like, DTensor):
        return values
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def without_values(module: nn.Module) -> nn.Module:
    """Return a copy of an unsharded module on the meta device: same names, shapes, ties and methods, no memory."""
    memo: dict[int, Any] = {}
    tables = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    for tensor in (*module.parameters(), *module.buffers(), *tables):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by their device mesh, since an operation on many tensors at once requires a common mesh."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def ranks_of(tensor: Tensor) -> dist.ProcessGroup:
    """Return the group of ranks that hold parts of a sharded tensor, of all replicas.

    These are the data-parallel ranks, or all ranks if tensor parallelism splits the tensor as well.
    """
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    return group


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)
