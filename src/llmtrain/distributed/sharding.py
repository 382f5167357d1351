"""Parameters cut over the ranks (FSDP2), and what everybody else must know of it: which part of a tensor lies here.

    module ─ each block, then what is left ─▶ fully_shard ─▶ parameters are DTensors, cut along their first dimension
    tensor ─▶ Part: the rows that this rank holds, and where they stand in the whole

A tensor that is not cut is one part by itself, so nobody else asks which of the two it has. The engine calls `shard`;
checkpoints, the optimizer and the start of a model call the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
    """What one rank holds of a tensor."""

    local: Tensor
    """The tensor's own memory here, not a copy; it may be empty."""
    offset: tuple[int, ...]
    """Where it begins in the whole, in each dimension."""
    shape: tuple[int, ...]
    """Of the whole."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of it."""
        return tuple(self.local.shape) == self.shape


def shard(module: nn.Module, mesh: DeviceMesh, *, precision: str) -> nn.Module:
    """Cut the parameters of `module`, in place, over the data-parallel ranks of `mesh`; of those on the meta device
    this rank's part gets memory, without values.

    A module that has `layers()` is cut one of these at a time, so that no more than two are whole at once. Gradients
    are added up in float32; with bf16-mixed what is gathered is bfloat16, half the bytes, and the parts stay float32.
    """
    param_dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    # Inputs are not cast: autocast sees to what is computed, and positions and masks have to stay float32.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    data_parallel = mesh["data_parallel"]
    if mesh["tensor_parallel"].size() > 1:
        mesh._flatten("all")  # so that a norm is one sum over all ranks, and so the same on each
        split_matrices(module, mesh["tensor_parallel"])
    for part in (*layers_of(module), module):
        cut = fully_shard(part, mesh=data_parallel, mp_policy=policy)
        if mesh.device_type == "cpu":
            cut.set_custom_reduce_scatter(cast(Any, _Exchange()))
    if any(parameter.is_meta for parameter in module.parameters()):
        device = mesh.device_type
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]
    module.register_forward_hook(_cut_again)
    if hasattr(module, "logits"):
        register_fsdp_forward_method(module, "logits")
    return module


class _Exchange:
    """Gradients added up over the ranks where gloo carries them: each rank gets its rows from all, and adds those.

    gloo's own way adds up all rows on every rank first, which takes three times as long (docs/scaling.md). The methods
    are those of FSDP's `ReduceScatter`.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent, and for what is received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """`input_tensor` [ranks · n] → `output_tensor` [n]."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """What `module` is cut into before the rest is; nothing if it does not say."""
    layers: Callable[[], list[nn.Module]] = getattr(module, "layers", list)
    return layers()


def parameter_groups(module: nn.Module) -> list[Any]:
    """FSDP's own objects, each for the parameters that it gathers at a time; nothing where none are cut."""
    states = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]


@contextmanager
def waits_inside(groups: Sequence[Any], wait: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While the block runs, each wait of these parameter groups for other ranks takes place inside of a `wait()`.

    On a GPU it is the current stream that waits, not the host. No such two are inside of each other.
    """
    for group in groups:
        for name in _WAITS:
            setattr(group, name, _inside(wait, getattr(group, name)))
    try:
        yield
    finally:
        for group in groups:
            for name in _WAITS:
                delattr(group, name)  # the class's own is there again


def _inside(wait: Callable[[], AbstractContextManager[None]], method: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*arguments: Any, **options: Any) -> Any:
        with wait():
            return method(*arguments, **options)

    return waiting


def _cut_again(module: nn.Module, arguments: Any, output: Any) -> None:
    """After a forward pass without gradients, which no backward pass follows that would do it.

    The root's parameters would stay whole, and be stale after the next update.
    """
    if not torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


def without_gradients(model: object) -> AbstractContextManager[Any]:
    """Inference mode, the fastest; but not for a model that is cut: what it gathers there could never be trained."""
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()


def part_of(tensor: Tensor) -> Part:
    """This rank's part of a tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Part(tensor.to_local(), tuple(offset), tuple(tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; a collective where it is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


@torch.no_grad()
def fill(tensor: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Let `draw` give `tensor` its first values, the same ones whether it is cut or not, and on whatever device.

    Of a tensor that is cut the whole is drawn, in float32 on the CPU, and this rank keeps its part: so no more than one
    parameter is ever whole.
    """
    if not is_cut(tensor):
        draw(tensor)
        return
    values = torch.empty(tensor.shape)
    draw(values)
    take_part(tensor, values)


def take_part(tensor: Tensor, values: Tensor) -> None:
    """Fill this rank's part of `tensor` from the whole `values`, of which no more than that part is read."""
    part = part_of(tensor)
    part.local.copy_(values[rows_of(part)])


def rows_of(part: Part) -> tuple[slice, ...]:
    """The index of a part in the whole."""
    return tuple(slice(start, start + length) for start, length in zip(part.offset, part.local.shape, strict=True))


def cut_like(values: Tensor, like: Tensor) -> Tensor:
    """A tensor of the values that `values`, this rank's part, has, cut as `like` is."""
    if not isinstance(like, DTensor):
        return values
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def without_values(module: nn.Module) -> nn.Module:
    """A copy of a module that is not cut yet, on the meta device: names, shapes, ties and methods, and no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are cut alike together, as operations on many tensors at once want them."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def ranks_of(tensor: Tensor) -> dist.ProcessGroup:
    """Those that hold parts of a tensor that is cut: the data-parallel ones, or all where it is split as well."""
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh._flatten("all").get_group()
    return group


def is_cut(tensor: Tensor) -> bool:
    """Whether other ranks hold other parts of it."""
    return isinstance(tensor, DTensor)
