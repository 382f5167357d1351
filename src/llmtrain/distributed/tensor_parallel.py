"""Matrices split over processes: each computes with its share of the heads and of the feed-forward's width.

    x, whole ─ colwise (q, k, v, gate, up): some of the outputs ─ … ─ rowwise (o, down): summed over ranks ─▶ x, whole

(Shoeybi et al. 2019, arXiv:1909.08053.) The model says which layer is which; norms, embeddings and the output are
whole on each. A layer's adapter follows it (B · A · x, Hu et al. 2021, arXiv:2106.09685), by one of its halves:

    colwise: x, whole ─ A, whole ─▶ r numbers ─ B: some of the outputs
    rowwise: x, some of it ─ A: summed over ranks ─▶ r numbers ─ B, whole

Whatever is whole has the same gradient on each rank. What is split is cut over the data-parallel ranks afterwards, as
everything is (sharding.py).
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
    """Of a module without parameters that can do so, `keep_share`: it leaves what belongs to this rank's heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        keep_share: Callable[..., None] = module.keep_share  # type: ignore[assignment]
        keep_share(device_mesh.get_local_rank(), of=device_mesh.size())
        return module


HEADS_DIM = 2
"""Of what a norm of queries or keys gets: [b, t, heads, width]."""
STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "per_head": lambda: SequenceParallel(sequence_dim=HEADS_DIM, use_local_output=True),
    "share": KeepShare,
}
"""By transformers' names; `per_head`: a weight that is whole on each rank, and applied to that rank's heads alone."""
_WHOLE_HALF = {"lora_A": "colwise", "lora_B": "rowwise"}
"""Of an adapter, by the style of its layer's that it is whole under; under the others it is split as the layer is."""
_WRAPPED = re.compile(r"\.(base_layer|original_module|(modules_to_save|lora_[AB])\.default)(?=\.|$)")
"""What peft adds to the name of a layer that it has put its own around."""


def split_matrices(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of `module`, in place, as its `tensor_parallel_plan` says (pattern of layers' names → style)."""
    plan: Callable[[int], Mapping[str, str]] = module.tensor_parallel_plan  # type: ignore[assignment]
    styles = plan(mesh.size())
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    for name, layer in list(module.named_modules()):
        style = _style_of(name, styles)
        if style is not None and not layer._modules:  # else it wraps the one
            parallelize_module(layer, mesh, STYLES[style]())
    for name in frozen:  # not every style keeps it so
        module.get_parameter(name).requires_grad_(False)


def _style_of(name: str, styles: Mapping[str, str]) -> str | None:
    layer = _WRAPPED.sub("", name)
    style = next((style for pattern, style in styles.items() if fnmatchcase(layer, pattern)), None)
    is_whole = any(f".{half}." in name and style.startswith(other) for half, other in _WHOLE_HALF.items() if style)
    return None if is_whole else style
