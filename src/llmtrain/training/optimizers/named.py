"""Optimizers over named parameters, with state that is saved by parameter name and not by position.

gradients ─▶ [float32 master copies of 16-bit weights] ─▶ one or two torch optimizers ─▶ weights
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.distributed.sharding import part_of, rows_of, sharded_like
from llmtrain.errors import ConfigError
from llmtrain.models.device_type import device_type_of
from llmtrain.training.optimizers.adamw_8bit import BLOCK_KEYS, WHOLE_KEYS, is_8bit
from llmtrain.training.optimizers.muon import Muon


class Readable(Protocol):
    """A tensor, in memory or in a file, of which a box is taken by an index of slices; () of a scalar."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


MASTER = "master"
"""The name of a float32 copy in a state."""
CHUNK = 2**28
"""Elements that are updated at a time where there are masters, since the gradients of a chunk are copied to float32."""


class NamedOptimizer:
    """One optimizer, or two with the parameters shared out between them, behind one face.

    Where a parameter has a master, a float32 copy, the optimizer updates that, and the parameter is what it rounds to:
    in bfloat16 most updates would be lost, as they are smaller than half of the last of its 8 bits.
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        names: Mapping[Tensor, str],
        lr: float,
        masters: Mapping[Tensor, Tensor] | None = None,
        narrowed: Collection[Tensor] = (),
    ) -> None:
        self._optimizers = list(optimizers)
        self._names = names
        self._masters = masters or {}
        self._narrowed = {parameter: self._masters[parameter] for parameter in narrowed}
        """Masters that are read and saved in place of their parameters."""
        self._own = {p: master for p, master in self._masters.items() if p not in self._narrowed}
        """Masters that are saved with the optimizer's state."""
        self._chunks = _in_chunks(self._masters)
        self._beside_masters = [p for p in names if p not in self._masters] if self._masters else []
        self._updated = {name: self._masters.get(parameter, parameter) for parameter, name in names.items()}
        self._peak_lr = lr
        self.lr = lr

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained; these have the gradients."""
        return list(self._names)

    @property
    def masters(self) -> list[Tensor]:
        """Float32 copies of parameters in 16 bits."""
        return list(self._masters.values())

    def set_lr_scale(self, scale: float) -> None:
        """Take `scale` times the peak learning rate from now on."""
        self.lr = self._peak_lr * scale
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the parameters, which have their first values by now, into the masters."""
        for parameter, master in self._own.items():
            master.copy_(parameter)

    @contextmanager
    def reading_weights(self) -> Iterator[None]:
        """Let narrowed parameters be their masters within the block, in which weights are read; round them after it."""
        narrow = {parameter: parameter.data for parameter in self._narrowed}
        for parameter, master in self._narrowed.items():
            parameter.data = master.data
        try:
            yield
        finally:
            for parameter, values in narrow.items():
                parameter.data = values
            _copy_all(list(self._narrowed.values()), list(self._narrowed))

    def saved_weights(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the model's tensors as they are saved: the masters in place of narrowed parameters."""
        return {name: self._narrowed.get(tensor, tensor) for name, tensor in tensors.items()}

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> None:
        """Update the parameters from their gradients, if `finite` (a bool scalar on their device; None: true).

        A GPU decides that itself, by the flag that torch's fused optimizers take from a gradient scaler. The host
        reads `finite` only for an optimizer without such a flag. Where there are masters, no gradient is left after an
        update.
        """
        found_inf = None
        if finite is not None and all(_takes_found_inf(optimizer) for optimizer in self._optimizers):
            found_inf = finite.logical_not().float()
        elif finite is not None and not finite:
            return
        for chunk in self._chunks or [{}]:
            given = {parameter: master for parameter, master in chunk.items() if parameter.grad is not None}
            for master in given.values():
                master.grad = torch.empty_like(master)
            _copy_all(
                [cast(Tensor, parameter.grad) for parameter in given], [cast(Tensor, m.grad) for m in given.values()]
            )
            for parameter in given:
                parameter.grad = None
            for optimizer in self._optimizers:
                setattr(optimizer, "found_inf", found_inf)  # noqa: B010  # torch's own name, not declared there
                optimizer.step()
            _copy_all(list(given.values()), list(given))
            for updated in (*given.values(), *self._beside_masters):
                updated.grad = None  # else the next chunk's step would update it again

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._masters:  # a skipped step has not handed them to the masters
            parameter.grad = None
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def drop_state(self) -> None:
        """Forget momenta and counts, as if there had been no step yet."""
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return `<parameter>/<state>` → tensor: the state itself, not a copy; counts as tensors."""
        names = {updated: name for name, updated in self._updated.items()}
        state = {
            f"{names[parameter]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }
        return state | {f"{self._names[parameter]}/{MASTER}": master for parameter, master in self._own.items()}

    def load_state_tensors(self, tensors: Mapping[str, Readable]) -> None:
        """Load full tensors with the names of `state_tensors`. Of each, no more is read than this rank's part.

        Raises ConfigError if it belongs to other parameters or optimizers.
        """
        self._load_masters({name: tensor for name, tensor in tensors.items() if name.endswith(f"/{MASTER}")})
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(f"/{MASTER}")}
        self.drop_state()
        owner = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in self._updated:
                raise ConfigError(f"the checkpoint has optimizer state for {name}, which this model does not train")
            parameter = self._updated[name]
            optimizer = owner[parameter]
            optimizer.state[parameter][key] = (
                _read_block(tensor, parameter, key=key)
                if key in BLOCK_KEYS or (is_8bit(optimizer) and not tensor.ndim)
                else _read_part(tensor, parameter, name=full_name)
            )
        if tensors and (missing := set(self._updated) - {name.rpartition("/")[0] for name in tensors}):
            raise ConfigError(f"the checkpoint has no optimizer state for {', '.join(sorted(missing))}")
        for optimizer in self._optimizers:
            wanted = _state_keys(optimizer)
            for state in optimizer.state.values():
                if state.keys() - BLOCK_KEYS != wanted:
                    raise ConfigError(
                        f"the checkpoint's optimizer state has {sorted(state)}, but this run's optimizer has "
                        f"{sorted(wanted)}: resume with the optimizer that the run was started with"
                    )

    @torch.no_grad()
    def _load_masters(self, tensors: Mapping[str, Readable]) -> None:
        wanted = {f"{self._names[parameter]}/{MASTER}": master for parameter, master in self._own.items()}
        if other := sorted(wanted.keys() ^ tensors.keys()):
            whose = "this run has and the checkpoint has not" if other[0] in wanted else "the checkpoint has alone"
            raise ConfigError(
                f"{other[0]}: a float32 copy of weights that {whose}: resume with the precision, model.dtype and "
                "optimizer.master_weights that the run was started with"
            )
        for name, master in wanted.items():
            part_of(master).local.copy_(part_of(_read_part(tensors[name], master, name=name)).local)


def _in_chunks(masters: Mapping[Tensor, Tensor]) -> list[dict[Tensor, Tensor]]:
    """Split the masters into chunks of at most CHUNK elements, or of one tensor that has more."""
    chunks: list[dict[Tensor, Tensor]] = []
    size = CHUNK
    for parameter, master in masters.items():
        if size + master.numel() > CHUNK:
            chunks.append({})
            size = 0
        chunks[-1][parameter] = master
        size += master.numel()
    return chunks


@torch.no_grad()
def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each source to its target, whose dtype may differ, in few kernels. Both may be sharded, alike."""
    if sources:
        torch._foreach_copy_([_local(target) for target in targets], [_local(source) for source in sources])


def _local(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor on this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read_part(tensor: Readable, parameter: Tensor, *, name: str) -> Tensor:
    """Read this rank's part of a state as large as its parameter, or a number."""
    if not tensor.ndim:
        return tensor[()].to(parameter.device)
    if tensor.shape != parameter.shape:
        raise ConfigError(f"{name} is {list(tensor.shape)}, but the parameter is {list(parameter.shape)}")
    return sharded_like(tensor[rows_of(part_of(parameter))].to(parameter.device), parameter)


def _read_block(tensor: Readable, parameter: Tensor, *, key: str) -> Tensor | int:
    """Read what only an 8-bit state has: constants of its blocks, and its own count of steps."""
    if key == "step":
        return int(tensor[()])
    return tensor[(slice(0, tensor.shape[0]),)].to(parameter.device)


def _takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer, on a GPU, changes nothing in a step for which its `found_inf` is 1."""
    if device_type_of(optimizer.param_groups[0]["params"][0].device) != "cuda":
        return False
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] and not optimizer.state:
        return False  # its first step would leave momenta without values
    return isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of what the optimizer keeps of a parameter that it has updated."""
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return {"step", "exp_avg", "exp_avg_sq"}
    if is_8bit(optimizer):
        return set(WHOLE_KEYS)
    if isinstance(optimizer, Muon):
        return {"momentum_buffer"}
    return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
