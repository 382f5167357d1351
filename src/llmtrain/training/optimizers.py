"""AdamW, Adam, SGD and Muon over named parameters, with state that is saved by parameter name and not by position.

Which parameters train is decided by `requires_grad`; the learning rate at a step is in `schedules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.training import OptimizerConfig
from llmtrain.distributed.sharding import by_mesh, cut_like, is_cut, part_of, rows_of
from llmtrain.training.sharded_muon import step_muon


class Readable(Protocol):
    """A tensor, in memory or in a file, of which a box is taken by an index of slices; () of a scalar."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


class NamedOptimizer:
    """One optimizer, or two with the parameters shared out between them, behind one face."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], *, names: Mapping[Tensor, str], lr: float) -> None:
        self._optimizers = list(optimizers)
        self._names = names
        self._peak_lr = lr
        self.lr = lr

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is updated."""
        return list(self._names)

    def set_lr_scale(self, scale: float) -> None:
        """Take `scale` times the peak learning rate from now on."""
        self.lr = self._peak_lr * scale
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.Muon) and any(is_cut(parameter) for parameter in self._names):
                step_muon(optimizer)
            else:
                optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`<parameter>/<state>` → tensor: the state itself, not a copy."""
        return {
            f"{self._names[parameter]}/{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Readable]) -> None:
        """Take over what `state_tensors` gave, whole: of each tensor no more is read than this rank's part.

        Raises ConfigError if it belongs to other parameters or optimizers.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        owner = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in parameters:
                raise ConfigError(f"the checkpoint has optimizer state for {name}, which this model does not train")
            parameter = parameters[name]
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ConfigError(f"{full_name} is {list(tensor.shape)}, but the parameter is {list(parameter.shape)}")
            own = tensor[rows_of(part_of(parameter))] if tensor.ndim else tensor[()]
            state = own.to(parameter.device)
            owner[parameter].state[parameter][key] = cut_like(state, parameter) if tensor.ndim else state
        if tensors and (missing := set(parameters) - {name.rpartition("/")[0] for name in tensors}):
            raise ConfigError(f"the checkpoint has no optimizer state for {', '.join(sorted(missing))}")
        for optimizer in self._optimizers:
            wanted = _state_keys(optimizer)
            for state in optimizer.state.values():
                if state.keys() != wanted:
                    raise ConfigError(
                        f"the checkpoint's optimizer state has {sorted(state)}, but this run's optimizer has "
                        f"{sorted(wanted)}: resume with the optimizer that the run was started with"
                    )


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> NamedOptimizer:
    """The optimizer of the parameters of `model` that require gradients.

    Matrices inside `blocks` decay, and take Muon if it is chosen; embeddings, the output projection, norms and biases
    take AdamW then, where only the output projection decays. Muon's update has the root mean square of AdamW's (Liu et
    al. 2025, "Muon is Scalable for LLM Training"), so one learning rate serves both. Raises ConfigError if Muon is to
    train nothing.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = [p for p, name in names.items() if p.ndim == 2 and "blocks." in name]
    decayed = [p for p, name in names.items() if p.ndim == 2 and "blocks." not in name and p not in embeddings]
    plain = [p for p in names if p.ndim != 2 or p in embeddings]
    if config.name == "muon" and not hidden:
        raise ConfigError("optimizer.name is muon, but no matrix of the decoder's blocks is trained: take adamw")
    if config.name != "muon":
        decayed, hidden = hidden + decayed, []
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": parameters, "weight_decay": decay}
        for some, decay in ((decayed, config.weight_decay), (plain, 0.0))
        for parameters in by_mesh(some)
    ]
    if groups and config.name == "sgd":
        fused = not any(is_cut(parameter) for parameter in names)  # DTensors have no fused SGD
        optimizers.append(torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused))
    elif groups:
        adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        optimizers.append(adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    return NamedOptimizer(optimizers, names=names, lr=config.lr)


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of what the optimizer keeps of a parameter that it has updated."""
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
