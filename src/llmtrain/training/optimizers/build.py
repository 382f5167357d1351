"""Build the optimizer that the config names for the parameters of a model that require gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.native_bf16 import computes_bf16
from llmtrain.distributed.sharding import by_mesh, is_sharded
from llmtrain.errors import ConfigError
from llmtrain.training.optimizers.adamw_8bit import OutlineAdamW8bit, adamw_8bit
from llmtrain.training.optimizers.muon import Muon
from llmtrain.training.optimizers.named import NamedOptimizer


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    *,
    compiled: bool = False,
    bf16: bool | None = None,
    outline: bool = False,
    masters: Mapping[Tensor, Tensor] | None = None,
) -> NamedOptimizer:
    """Build the optimizer of the parameters of `model` that require gradients.

    Matrices inside `blocks` decay, and take Muon if it is chosen; embeddings, the output projection, norms and biases
    take AdamW then, where only the output projection decays. Muon's update has the root mean square of AdamW's (Liu et
    al. 2025, "Muon is Scalable for LLM Training"), so one learning rate serves both. With adamw8bit, embeddings keep
    their state in 32 bits, as its authors advise.

    `compiled`: compile Muon's iteration where that gains something, which is not on a CPU. `bf16`: let it multiply in
    bfloat16; None: where the device gains by that. `outline`: build something of the same size only, to predict memory
    with. `masters`: those that `narrow_weights` returned.

    Raises ConfigError if Muon is to train nothing, or adamw8bit cannot run here.
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
    narrowed = masters or {}
    masters = {**narrowed, **(_masters(p for p in names if p not in narrowed) if config.master_weights else {})}
    hidden, decayed, plain = (
        [masters.get(p, p) for p in hidden],
        [masters.get(p, p) for p in decayed],
        [masters.get(p, p) for p in plain],
    )
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(_muon(hidden, config, compiled=compiled, bf16=bf16))
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for some, decay in ((decayed, config.weight_decay), (plain, 0.0))
        for parameters in by_mesh(some)
    ]
    if groups and config.name == "sgd":
        fused = not any(is_sharded(parameter) for parameter in names)  # DTensors have no fused SGD
        optimizers.append(torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused))
        groups = []
    if groups and config.name == "adamw8bit":
        small, groups = _apart(groups, {masters.get(p, p) for p in embeddings})
        if small:
            optimizers.append(OutlineAdamW8bit(small) if outline else adamw_8bit(small, config))
    if groups:
        adam = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        optimizers.append(adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    return NamedOptimizer(optimizers, names=names, lr=config.lr, masters=masters, narrowed=narrowed.keys())


def _muon(matrices: Sequence[Tensor], config: OptimizerConfig, *, compiled: bool, bf16: bool | None) -> Muon:
    device = matrices[0].device
    in_bf16 = computes_bf16(str(device)) if bf16 is None else bf16
    return Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        dtype=torch.bfloat16 if in_bf16 else torch.float32,
        compiled=compiled and device.type != "cpu",
    )


def _apart(
    groups: Sequence[dict[str, Any]], tables: Collection[Tensor]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of parameters that are no embedding tables, and those of the tables."""
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for group in groups:
        for some, are_tables in zip(both, (False, True), strict=True):
            if chosen := [p for p in group["params"] if (p in tables) == are_tables]:
                some.append({**group, "params": chosen})
    return both


def _masters(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Return a float32 copy of each parameter that has 16 bits."""
    narrow = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
    return {p: p.detach().float().requires_grad_() for p in narrow}
