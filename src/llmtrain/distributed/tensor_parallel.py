"""Tensor parallelism: ranks share each matrix, and each computes some of the heads and feed-forward features.

    full x ─ colwise (q, k, v, gate, up): some of the outputs ─ … ─ rowwise (o, down): summed over ranks ─▶ full x

(Shoeybi et al. 2019, arXiv:1909.08053.) The model names the style of each layer. Norms, embeddings and the output are
full on each rank. One half of a layer's adapter (B · A · x, Hu et al. 2021, arXiv:2106.09685) is split like the layer:

    colwise: full x ─ full A ─▶ r numbers ─ B: some of the outputs
    rowwise: some of x ─ A: summed over ranks ─▶ r numbers ─ full B

Every full tensor has the same gradient on each rank. Afterwards all tensors, split or full, are sharded over the
data-parallel ranks (sharding.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


class KeepShare(ParallelStyle):
    """Style of a module without parameters: calls its `keep_share`, which keeps the values of this rank's heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        keep_share: Callable[..., None] = module.keep_share  # type: ignore[assignment]
        keep_share(device_mesh.get_local_rank(), of=device_mesh.size())
        return module


HEADS_DIM = 2
"""Dimension of the heads in the input [b, t, heads, width] of a norm of queries or keys."""
STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "per_head": lambda: SequenceParallel(sequence_dim=HEADS_DIM, use_local_output=True),
    "share": KeepShare,
}
"""Styles by the names that transformers uses. `per_head`: the weight is full on each rank, which applies it to its own
heads only."""
_FULL_HALF = {"lora_A": "colwise", "lora_B": "rowwise"}
"""Half of an adapter → style of its layer under which the half stays full. Under other styles it is split."""
_WRAPPED = re.compile(r"\.(base_layer|original_module|(modules_to_save|lora_[AB])\.default)(?=\.|$)")
"""Part that peft adds to the name of a layer that it wraps."""


def split_matrices(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of `module` in place by its `tensor_parallel_plan`: pattern of layer names → style."""
    plan: Callable[[int], Mapping[str, str]] = module.tensor_parallel_plan  # type: ignore[assignment]
    styles = plan(mesh.size())
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    for name, layer in list(module.named_modules()):
        style = _style_of(name, styles)
        if style is not None and not layer._modules:  # a module with children only wraps the layer
            parallelize_module(layer, mesh, STYLES[style]())
    for name in frozen:  # not every style keeps requires_grad
        module.get_parameter(name).requires_grad_(False)


def _style_of(name: str, styles: Mapping[str, str]) -> str | None:
    layer = _WRAPPED.sub("", name)
    style = next((style for pattern, style in styles.items() if fnmatchcase(layer, pattern)), None)
    is_full = any(f".{half}." in name and style.startswith(other) for half, other in _FULL_HALF.items() if style)
    return None if is_full else style
