"""How much memory a training step needs, before there is one: the step is run on tensors that have no storage.

    Decoder + optimizer under FakeTensorMode ─ every new storage is booked, and struck off when it is freed ─▶ the peak

So every variant of the model and of the optimizer counts itself, and there is no formula to keep up with them. Compiled
parts go through Dynamo and AOTAutograd as in a run, which decides what the backward pass keeps; code generation is left
out, and of what remains only what kernels hand to each other counts, since the compiler fuses all else.

On a CPU the process and the holes in its heap come on top: the constants below, measured (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.config.model import DecoderConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.contracts import Batch
from llmtrain.models.decoder import loss, mask
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer

Part = Literal["parameters", "gradients", "optimizer_state", "activations", "logits", "optimizer_temporary"]
PARTS: tuple[Part, ...] = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "logits",
    "optimizer_temporary",
)
TRANSIENT: frozenset[Part] = frozenset({"activations", "logits", "optimizer_temporary"})

HEAP_HOLES_EAGER = 0.43
HEAP_HOLES_COMPILED = 0.15
"""What the heap wastes on tensors that come and go, over their size (glibc 2.36): in a trace of addresses many did not
go into the hole that one of their own size had just left. Compiled code has far fewer of them."""
HEAP_HOLES_RECOMPUTED = 0.87
"""The same of eager code that computes its blocks again, over the geometric mean of what all blocks and one block would
leave for the backward pass without that: the tensors of a block come and go as often as there are blocks. A fit."""
FIRST_STEP_BYTES = 30_000_000
COMPILER_BYTES = 120_000_000
"""What the process grows by when it first computes (libraries' code and buffers), and when it first compiles."""
CUDA_CONTEXT_BYTES = 600_000_000
"""Outside of what torch counts: driver, kernels, cuBLAS workspaces."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes at the moment of a step when the most is held, by what holds them; one rank."""

    parts: Mapping[Part, int]
    persistent: int
    """Parameters and optimizer state, which a snapshot for a checkpoint copies."""

    @property
    def total(self) -> int:
        """All tensors together."""
        return sum(self.parts.values())

    @property
    def transient(self) -> int:
        """Those that a step makes and frees again."""
        return sum(size for part, size in self.parts.items() if part in TRANSIENT)


def step_memory(
    model: DecoderConfig,
    *,
    vocab_size: int,
    optimizer: OptimizerConfig,
    micro_batch_size: int,
    seq_len: int,
    num_micro_batches: int,
    documents: bool,
    precision: str,
    compiled: bool,
    on_gpu: bool,
    activation_checkpointing: bool,
) -> StepMemory:
    """Run two steps without storage and say what the second, which has optimizer state, needs at its peak.

    `documents`: the batches carry document ids.
    """
    book = _Book(vocab_size)
    # Not more than two micro-batches: from the second on, the gradients of those before are there.
    batch = partial(_batch, micro_batch_size=micro_batch_size, seq_len=seq_len, documents=documents)
    with _as_on(on_gpu), FakeTensorMode(allow_non_fake_inputs=True), book:
        with _default_dtype(torch.bfloat16 if precision == "bf16-true" else torch.float32):
            decoder = Decoder(model, vocab_size)
        for weight in decoder.parameters():
            book.move(weight, "parameters")
        if activation_checkpointing:
            decoder.checkpoint_blocks()
        if compiled:
            torch._dynamo.reset()
            decoder.compile_parts(backend=_backend(book))
        named = build_optimizer(optimizer, decoder)
        for parameter in named.parameters:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: book.move(p.grad, "gradients")
            )
        book.peak = 0
        for _ in range(2):
            _step(decoder, named, [batch() for _ in range(min(2, num_micro_batches))], precision=precision, book=book)
    if compiled:
        torch._dynamo.reset()
    persistent = book.now["parameters"] + book.now["optimizer_state"]
    return StepMemory(parts={part: book.at_peak[part] for part in PARTS}, persistent=persistent)


def _step(
    model: Decoder, optimizer: NamedOptimizer, micro_batches: Sequence[Batch], *, precision: str, book: _Book
) -> None:
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    model.train()
    book.part = "activations"
    for micro_batch in micro_batches:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss_sum, _ = model(micro_batch)
        loss_sum.backward()
        del loss_sum
    book.part = "optimizer_temporary"
    torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    optimizer.step()
    for tensor in optimizer.state_tensors().values():
        book.move(tensor, "optimizer_state")
    optimizer.zero_grad()


def _batch(*, micro_batch_size: int, seq_len: int, documents: bool) -> Batch:
    ids = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
    batch = Batch(input_ids=ids, labels=torch.zeros_like(ids))
    if documents:
        batch["document_ids"] = torch.zeros(micro_batch_size, seq_len, dtype=torch.int32)
    return batch


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _as_on(gpu: bool) -> Iterator[None]:
    """Let the model, whose tensors say that they are on a CPU, take the ways that it takes on a GPU.

    Tensors without storage can be on a GPU only where there is one.
    """
    if not gpu:
        yield
        return
    with (
        mock.patch.object(mask, "EXPLICIT_MAX_KEYS", 0),
        mock.patch.object(loss, "CHUNK_TOKENS_CPU", loss.CHUNK_TOKENS_GPU),
        mock.patch.object(loss, "CHUNK_LOGITS_CPU", loss.CHUNK_LOGITS_GPU),
    ):
        yield


class _Book(TorchDispatchMode):
    """Books every storage that an operation makes, under the part that is being computed."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part: Part = "activations"
        self.muted = False
        self.now: Counter[Part] = Counter()
        self.at_peak: Counter[Part] = Counter()
        self.peak = 0
        self._vocab_size = vocab_size
        self._storages: dict[int, tuple[Part, int]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo gives up on a frame under any other mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.muted:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._add(tensor)
        return out

    def move(self, tensor: Tensor | None, part: Part) -> None:
        """Book a tensor's storage under another part from now on."""
        assert tensor is not None
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = (part, size)
            self.now[old] -= size
            self.now[part] += size

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        part, size = self.part, storage.nbytes()
        if part == "activations" and self._vocab_size in tensor.shape and tensor.is_floating_point():
            part = "logits"
        self._storages[storage._cdata] = (part, size)
        self.now[part] += size
        weakref.finalize(storage, self._drop, storage._cdata)
        total = sum(self.now.values())
        if total > self.peak:
            self.peak, self.at_peak = total, self.now.copy()

    def _drop(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.now[part] -= size


# -- compiled parts ----------------------------------------------------------------------------------------------------

_KERNELS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "index_put", "embedding", "scatter", "rng")
_VIEWS = (
    "view",
    "permute",
    "transpose",
    "t",
    "expand",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
    "alias",
    "as_strided",
)


def _backend(book: _Book) -> Callable[..., Any]:
    """A backend of torch.compile that cuts forward from backward as Inductor does, and runs the graphs as they are."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compile_graph(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run = _Fused(graph, book)

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


class _Fused(fx.Interpreter):
    """Runs a graph; of its values those are booked that are in memory after fusion.

    These are the results of library kernels, what is handed to one, and the outputs.
    """

    def __init__(self, graph: fx.GraphModule, book: _Book) -> None:
        super().__init__(graph)
        self._book = book
        self._in_memory: set[fx.Node] = set()
        for node in graph.graph.nodes:
            is_kernel = node.op == "call_function" and _name(node).startswith(_KERNELS)
            if is_kernel:
                self._in_memory.add(node)
            if is_kernel or node.op == "output":
                self._in_memory.update(_viewed(argument) for argument in node.all_input_nodes)

    def run_node(self, n: fx.Node) -> Any:
        self._book.muted = n not in self._in_memory
        try:
            return super().run_node(n)
        finally:
            self._book.muted = False


def _viewed(node: fx.Node) -> fx.Node:
    """What the node is a view of, in the end."""
    while node.op == "call_function" and _name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


# -- the whole process -------------------------------------------------------------------------------------------------


def overhead(
    step: StepMemory,
    *,
    on_gpu: bool,
    compiled: bool,
    process_bytes: int,
    saves_on_the_way: bool,
    kept_otherwise: int | None = None,
    num_blocks: int = 1,
) -> dict[str, int]:
    """What comes on top of a step's tensors, in bytes by what it is.

    `process_bytes`: resident memory of a process that has imported everything and computed nothing.
    `kept_otherwise`: with activation checkpointing, what `transient` would be without it.
    `saves_on_the_way`: the copy of a checkpoint that is being written, kept for the next one, meets a step's peak.
    """
    if on_gpu:
        return {}  # torch counts tensors alone, and so does a run's summary
    holes = step.transient * (HEAP_HOLES_COMPILED if compiled else HEAP_HOLES_EAGER)
    if kept_otherwise is not None and not compiled:
        holes = HEAP_HOLES_RECOMPUTED * kept_otherwise / math.sqrt(num_blocks)
    parts = {
        "heap_holes": round(holes),
        "process": process_bytes + FIRST_STEP_BYTES + (COMPILER_BYTES if compiled else 0),
    }
    at_the_end = max(0, 2 * step.persistent - step.total - parts["heap_holes"])
    copy = step.persistent if saves_on_the_way else at_the_end
    return parts | ({"checkpoint_copy": copy} if copy else {})


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters by the part of the model that they are in; tied ones count once, as embedding."""
    counts = {"embedding": 0, "attention": 0, "feed_forward": 0, "norms": 0, "head": 0, "other": 0}
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count or part != "other"}


def _part_of(name: str) -> str:
    words = name.split(".")
    if any("norm" in word for word in words):
        return "norms"
    for word, part in (("embedding", "embedding"), ("attention", "attention"), ("feed_forward", "feed_forward")):
        if any(word in each for each in words):
            return part
    return "head" if words[0] == "output" else "other"
