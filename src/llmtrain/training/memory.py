"""How much memory a training step needs, before there is one: the step is run on tensors that have no storage.

    model + optimizer under FakeTensorMode ─ every new storage is booked, and struck off when it is freed ─▶ the peak

So every variant of a model and of the optimizer counts itself, and there is no formula to keep up with them. Token ids
and what is made of them alone have values, as which tokens are supervised decides what is computed. Compiled
parts go through Dynamo and AOTAutograd as in a run, which decides what the backward pass keeps; code generation is left
out, and of what remains only what kernels hand to each other counts, since the compiler fuses all else.

On a CPU the process and the holes in its heap come on top: the constants below, measured (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.config.training import OptimizerConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.sharding import layers_of
from llmtrain.models.decoder import loss, mask
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer

Part = Literal["parameters", "gradients", "optimizer_state", "activations", "logits", "optimizer_temporary", "gathered"]
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
    """Parameters that are trained and optimizer state, which a snapshot for a checkpoint copies."""

    @property
    def total(self) -> int:
        """All tensors together."""
        return sum(self.parts.values())

    @property
    def transient(self) -> int:
        """Those that a step makes and frees again."""
        return sum(size for part, size in self.parts.items() if part in TRANSIENT)


class Trainable(Protocol):
    """A model, before it is trained."""

    def checkpoint_blocks(self) -> None:
        """Keep only each block's input for the backward pass."""
        ...

    def compile_parts(self, **options: Any) -> None:
        """Compile the blocks and the loss, with `options` of torch.compile."""
        ...


def step_memory(
    build: Callable[[], Trainable],
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
    """Run a step that is not the first one, and so has optimizer state, and say what it needs at its peak.

    `build` makes the model on the default device; it meets `contracts.Model` and Trainable. `documents`: a row of a
    batch holds several.
    """
    batch = _batch(micro_batch_size, seq_len, documents=documents)
    book = _Book(vocab_size)
    with _default_dtype(torch.bfloat16 if precision == "bf16-true" else torch.float32), torch.device("meta"):
        trainable = build()
    assert isinstance(trainable, nn.Module)
    with _as_on(on_gpu), FakeTensorMode(allow_non_fake_inputs=True), book:
        _leave_meta(trainable)
        for tensor in (*trainable.parameters(), *trainable.buffers()):
            book.move(tensor, "parameters")
        saved = book.size_of(trainable.parameters())
        if any(not parameter.requires_grad for parameter in trainable.parameters()):
            saved = book.size_of(p for p in trainable.parameters() if p.requires_grad)
        if activation_checkpointing:
            trainable.checkpoint_blocks()
        if compiled:
            torch._dynamo.reset()
            trainable.compile_parts(backend=_backend(book))
        named = build_optimizer(optimizer, trainable, outline=True)
        for parameter in named.parameters:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: book.move(p.grad, "gradients")
            )
        _fill_gradients(named, book)
        named.step()
        for tensor in named.state_tensors().values():
            book.move(tensor, "optimizer_state")
        named.zero_grad()
        if num_micro_batches > 1:  # the last one meets the gradients of those before
            _fill_gradients(named, book)
        book.peak = 0
        _step(trainable, named, batch, precision=precision, book=book)
    if compiled:
        torch._dynamo.reset()
    persistent = saved + book.now["optimizer_state"]
    return StepMemory(parts={part: book.at_peak[part] for part in PARTS}, persistent=persistent)


def _step(model: nn.Module, optimizer: NamedOptimizer, batch: Batch, *, precision: str, book: _Book) -> None:
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    model.train()
    book.part = "activations"
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_sum, _ = model(batch)
    loss_sum.backward()
    del loss_sum
    book.part = "optimizer_temporary"
    torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()


def _fill_gradients(optimizer: NamedOptimizer, book: _Book) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
        book.move(parameter.grad, "gradients")


def _batch(micro_batch_size: int, seq_len: int, *, documents: bool) -> Batch:
    """Every token is supervised. Of documents there are two in a row."""
    ids = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
    batch = Batch(input_ids=ids, labels=torch.zeros_like(ids))
    if documents:
        batch["document_ids"] = (torch.arange(seq_len) * 2 // seq_len).int().repeat(micro_batch_size, 1)
    return batch


def _leave_meta(model: nn.Module) -> None:
    """Give the tensors of a model on the meta device ones in their place that are on a CPU; tied ones stay tied.

    Built under FakeTensorMode, modules could not be cast.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.zeros(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = parameter if parameter is None else cast(nn.Parameter, made[parameter])
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer not in made:
                made[buffer] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            module._buffers[name] = buffer if buffer is None else made[buffer]
        if not module._parameters and not module._buffers and not module._modules:
            module.to_empty(device="cpu")  # tables that are not even buffers


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
        with unset_fake_temporarily() if _has_values(args, kwargs or {}) else contextlib.nullcontext():
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

    def size_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of their storages; of what is shared, once."""
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._storages[key][1] for key in storages if key in self._storages)

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


def _has_values(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation is on numbers of tokens and the like alone, which have values here."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
    return kwargs.get("dtype") in (torch.int64, torch.int32, torch.bool)


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

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Recomputed kernels that may draw numbers are wrapped, to draw the same again; here they draw none."""
        if target is run_and_save_rng_state:
            return torch.empty(0, dtype=torch.uint8), args[0](*args[1:], **kwargs)
        if target is run_with_rng_state:
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)


def _viewed(node: fx.Node) -> fx.Node:
    """What the node is a view of, in the end."""
    while node.op == "call_function" and _name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    wrapped = {run_and_save_rng_state: 0, run_with_rng_state: 1}.get(cast(Any, node.target))
    target = node.target if wrapped is None else node.args[wrapped]
    return str(getattr(target, "__name__", "")).partition(".")[0]


# -- the whole process -------------------------------------------------------------------------------------------------


def state_bytes(model: nn.Module, *, optimizer: OptimizerConfig, precision: str) -> int:
    """Of the whole model what is there between two steps, and the gradients: weights, gradients, optimizer state."""
    moments = 2 if optimizer.name in ("adam", "adamw") else 1
    total = 0
    for parameter in model.parameters():
        width = 2 if precision == "bf16-true" else parameter.element_size()
        total += parameter.numel() * width * (2 + moments if parameter.requires_grad else 1)
    return total


def cut(step: StepMemory, model: nn.Module, *, ranks: int, precision: str, num_micro_batches: int = 1) -> StepMemory:
    """What each of `ranks` ranks holds where parameters are cut over them; `model` says of which layers.

    Whole at once are what is in no layer, one layer in use and the next one, and the gradients of one of them: of all
    where they are added up over several micro-batches, since the ranks exchange them after the last one only.
    """
    width = 4 if precision == "32" else 2
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    largest = max(layers, default=0)
    kept: list[Part] = ["parameters", "optimizer_state"]
    if num_micro_batches == 1:
        kept.append("gradients")
    parts = {part: size // ranks if part in kept else size for part, size in step.parts.items()}
    parts["gathered"] = width * (rest + 2 * largest) + 4 * max(rest, largest)
    return replace(step, parts=parts, persistent=step.persistent // ranks)


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


_PARTS_BY_WORD = (
    ("adapters", ("lora_",)),
    ("norms", ("norm", "ln_", "layernorm")),
    ("embedding", ("embed", "wte", "wpe")),
    ("attention", ("attn", "attention")),
    ("feed_forward", ("feed_forward", "mlp", "ffn", "experts", "moe", "fc1", "fc2")),
)
"""Of what the names of layers are made, in the decoder and in the families of transformers. The first fit wins."""
_HEADS = ("output", "lm_head", "embed_out")


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters by the part of the model that they are in; tied ones count once, as embedding."""
    counts = {"embedding": 0, "attention": 0, "feed_forward": 0, "norms": 0, "head": 0, "adapters": 0, "other": 0}
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count or part not in ("adapters", "other")}


def _part_of(name: str) -> str:
    words = name.split(".")
    if "lora_" not in name and any(word in _HEADS for word in words):
        return "head"
    for part, marks in _PARTS_BY_WORD:
        if any(mark in word for mark in marks for word in words):
            return part
    return "other"
