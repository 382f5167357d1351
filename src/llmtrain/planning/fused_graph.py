"""A backend of torch.compile that generates no kernels, to find which tensors compiled code keeps in memory.

Compiled parts go through Dynamo and AOTAutograd as in a run, which decide what the backward pass keeps. No code is
generated. Of the graph's values, only those that one kernel passes to another are recorded, since the compiler fuses
everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

Mute = Callable[[bool], None]
"""Called with true before the computation of a value that fusion keeps out of memory, and with false afterwards."""

_KERNELS = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "_scaled_dot_product",
    "_varlen_attn",
    "index_put",
    "embedding",
    "scatter",
    "rng",
)
_VIEWS = frozenset(
    ("alias", "as_strided", "expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view")
)


def backend_without_kernels(mute: Mute) -> Callable[..., Any]:
    """Return a backend that splits forward and backward pass as Inductor does, and interprets the graphs."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compile_graph(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run = _FusedGraph(graph, mute)

        def call(arguments: list[Any]) -> Any:
            try:
                return run.boxed_run(arguments)
            finally:
                run.env = {}

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    return backend


class _FusedGraph(fx.Interpreter):
    """Runs a graph, and mutes the recording of values that are not in memory after fusion.

    In memory are the inputs and results of library kernels, and the outputs of the graph.
    """

    def __init__(self, graph: fx.GraphModule, mute: Mute) -> None:
        super().__init__(graph)
        self._mute = mute
        self._in_memory: set[fx.Node] = set()
        for node in graph.graph.nodes:
            is_kernel = node.op == "call_function" and _name(node).startswith(_KERNELS)
            if is_kernel:
                self._in_memory.add(node)
            if is_kernel or node.op == "output":
                self._in_memory.update(_viewed(argument) for argument in node.all_input_nodes)

    def run_node(self, n: fx.Node) -> Any:
        self._mute(n not in self._in_memory)
        try:
            return super().run_node(n)
        finally:
            self._mute(False)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a kernel. Recomputed kernels are wrapped, to draw the same random numbers again; here they draw none."""
        if target is run_and_save_rng_state:
            return torch.empty(0, dtype=torch.uint8), args[0](*args[1:], **kwargs)
        if target is run_with_rng_state:
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)


def _viewed(node: fx.Node) -> fx.Node:
    """Return the node that `node` is a view of, through any number of views; `node` itself if it is not a view."""
    while node.op == "call_function" and _name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    wrapped = {run_and_save_rng_state: 0, run_with_rng_state: 1}.get(cast(Any, node.target))
    target = node.target if wrapped is None else node.args[wrapped]
    return str(getattr(target, "__name__", "")).partition(".")[0]
