"""Matrices split over processes: each computes with its share of the heads and of the feed-forward's width.

    x, whole ─ colwise (q, k, v, gate, up): some of the outputs ─ … ─ rowwise (o, down): summed over ranks ─▶ x, whole

(Shoeybi et al. 2019, arXiv:1909.08053.) The model says which layer is which; norms, embeddings and the output are
whole on each. What is split is cut over the data-parallel ranks afterwards, as everything is (sharding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

HEADS_DIM = 2
"""Of what a norm of queries or keys gets: [b, t, heads, width]."""
STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "per_head": lambda: SequenceParallel(sequence_dim=HEADS_DIM, use_local_output=True),
}
"""By transformers' names; `per_head`: a weight that is whole on each rank, and applied to that rank's heads alone."""


def split_matrices(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of `module`, in place, as its `tensor_parallel_plan` says (layer's name → style)."""
    plan: Callable[[int], Mapping[str, str]] = module.tensor_parallel_plan  # type: ignore[assignment]
    styles = {name: STYLES[style]() for name, style in plan(mesh.size()).items()}
    parallelize_module(module, mesh, styles)
