"""Attention of a GPU: what its two kernels are given, and that it is the same attention as with a dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.contracts import Batch
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.models.decoder import gpu_kernels
from llmtrain.models.decoder.attention import attend
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.decoder.gpu_kernels import BLOCK, build_block_mask
from llmtrain.models.decoder.mask import AttentionInputs, alibi_slopes, build_mask
from llmtrain.models.device_type import assume_device_type
from tests.support import varlen  # noqa: F401  # the reference in place of FlashAttention
from tests.support.predicted_memory import memory_of
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config, tiny_decoder
from tests.support.tiny_huggingface import FAMILIES, VOCAB_SIZE, WITHOUT_SDPA, tiny_huggingface

CPU = torch.device("cpu")
LENGTH = 320
"""Not the size of anything else, so that a mask of [t, t] is told by its shape."""
WINDOW = {"mask": "sliding_window", "window": 5}
GQA = {"variant": "gqa", "num_kv_heads": 2}
VARLEN_MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "gqa": {"attention": GQA},
    "learned": {"positional": {"encoding": "learned"}},
    "sinusoidal, gqa": {"positional": {"encoding": "sinusoidal"}, "attention": GQA},
    "qk-norm, window": {"attention": {**WINDOW, "qk_norm": True}},
}


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the GPU's code on a CPU, where the reference computes in any precision."""
    monkeypatch.setattr(gpu_kernels, "VARLEN_DTYPES", (torch.float32,))
    with assume_device_type("cuda"):
        yield


def packed(**changes: Any) -> Batch:
    """Return a batch with documents as the loader describes them; the second row ends with padding."""
    batch = random_batch(num_documents=5, **changes)
    batch["document_ids"][1, -3:] = -1
    batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    return batch


def loss_and_gradients(decoder: Decoder, batch: Batch) -> list[Tensor]:
    decoder.zero_grad()
    loss_sum, _ = decoder(batch)
    loss_sum.backward()
    return [
        loss_sum.detach(),
        *(parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("changes", VARLEN_MODELS.values(), ids=VARLEN_MODELS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "recomputed"])
def test_sequences_of_different_lengths_are_what_the_dense_mask_makes_of_them(
    changes: dict[str, Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, batch = tiny_decoder(**changes).train(), packed(seq_len=21)
    wanted = loss_and_gradients(decoder, batch)
    if checkpointed:
        decoder.checkpoint_blocks()
    monkeypatch.setattr(gpu_kernels, "VARLEN_DTYPES", (torch.float32,))
    with assume_device_type("cuda"), Operators() as seen:
        found = loss_and_gradients(decoder, batch)
    assert seen.count("torch_attn::_varlen_attn") == (4 if checkpointed else 2)
    for ours, target in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, target, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_a_window_without_documents_takes_the_rows_as_sequences() -> None:
    decoder, ids = tiny_decoder(attention=WINDOW), random_batch(seq_len=20)["input_ids"]
    with Operators() as seen, torch.no_grad():
        found = decoder.logits(ids)
    assert seen.count("torch_attn::_varlen_attn") == 2
    with assume_device_type("cpu"), torch.no_grad():
        torch.testing.assert_close(found, decoder.logits(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("in_float32")
def test_compiled_blocks_share_two_graphs_for_any_number_of_documents() -> None:
    """The first number of entries is compiled for itself, and then any number of them."""
    decoder = tiny_decoder().train()
    batches = [random_batch(seq_len=24, num_documents=number, seed=number) for number in (1, 2, 4, 8, 12)]
    for batch in batches:
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    assert len({len(batch["cu_seqlens"]) for batch in batches}) > 2
    wanted = [loss_and_gradients(decoder, batch) for batch in batches]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in decoder.blocks:
        block.compile(backend=counter, fullgraph=True)
    for batch, expected in zip(batches, wanted, strict=True):
        for ours, target in zip(loss_and_gradients(decoder, batch), expected, strict=True):
            torch.testing.assert_close(ours, target, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


class Operators(TorchDispatchMode):
    """Records the names of operators, and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.shapes: set[torch.Size] = set()

    def count(self, name: str) -> int:
        return self.names.count(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name().partition(".")[0])
        self.shapes.update(x.shape for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@pytest.fixture
def flex_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of flex_attention, which returns something."""
    calls: list[dict[str, Any]] = []

    def called(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)

    monkeypatch.setattr(gpu_kernels, "_compiled_flex", lambda: called)
    return calls


@pytest.mark.parametrize(
    ("changes", "documents", "precision", "kernel"),
    [
        ({}, True, torch.bfloat16, "varlen"),
        ({"attention": GQA}, True, torch.float16, "varlen"),
        ({"attention": WINDOW}, True, torch.bfloat16, "varlen"),
        ({"attention": WINDOW}, False, torch.bfloat16, "varlen"),
        ({}, True, torch.float32, "flex"),
        ({"positional": {"encoding": "alibi"}}, False, torch.bfloat16, "flex"),
        ({"positional": {"encoding": "alibi"}, "attention": {**GQA, **WINDOW}}, True, torch.bfloat16, "flex"),
        ({"attention": {"variant": "complex"}}, True, torch.bfloat16, "flex"),
        ({}, False, torch.bfloat16, "causal"),
    ],
)
def test_no_mask_of_all_pairs_is_made_on_a_gpu(
    changes: dict[str, Any],
    documents: bool,
    precision: torch.dtype,
    kernel: str,
    flex_calls: list[dict[str, Any]],
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(precision)  # autocast would ask for the GPU
    with FakeTensorMode(), torch.device("cuda"), Operators() as seen:
        decoder = Decoder(tiny_config(d_model=64, max_seq_len=LENGTH, **changes), TINY_VOCAB_SIZE)
        ids = torch.zeros(2, LENGTH, dtype=torch.long)
        batch = Batch(input_ids=ids, labels=ids)
        if documents:
            batch["document_ids"], batch["cu_seqlens"] = ids.int(), torch.zeros(4, dtype=torch.int32)
        with sdpa_kernel(SDPBackend.MATH):  # the choice among kernels asks the GPU
            decoder(batch)
    layers = len(decoder.layers())
    assert seen.count("torch_attn::_varlen_attn") == (layers if kernel == "varlen" else 0)
    assert len(flex_calls) == (layers if kernel == "flex" else 0)
    assert all(call["block_mask"] is not None for call in flex_calls)
    if kernel != "causal":  # the mathematical kernel, which asks no GPU, makes scores
        assert not [shape for shape in seen.shapes if tuple(shape[-2:]) == (LENGTH, LENGTH)]


@pytest.mark.parametrize("length", [128, 300])
@pytest.mark.parametrize("window", [None, 3, 140])
@pytest.mark.parametrize("documents", [False, True])
def test_a_block_mask_is_the_dense_mask(length: int, window: int | None, documents: bool) -> None:
    ids = torch.zeros(2, length, dtype=torch.int32)
    if documents:
        ids[0, 50:], ids[0, 130:], ids[1, 128:], ids[1, length - 40 :] = 1, 2, 1, -1
    found = build_block_mask(ids, document_ids=ids if documents else None, window=window)
    dense, _ = build_mask(length, document_ids=ids if documents else None, cache=None, device=CPU, window=window)
    assert dense is not None
    wanted = (dense == 0).expand(2, 1, -1, -1)
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(found.mask_mod(b, torch.zeros_like(b), q, k), wanted[:, 0])
    blocks = -(-length // BLOCK)
    padded = torch.zeros(2, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:, :length, :length] = wanted[:, 0]
    in_blocks = padded.view(2, blocks, BLOCK, blocks, BLOCK)
    for row in range(2 if documents else 1):
        for query in range(blocks):
            partial = set(_keys(found.kv_num_blocks, found.kv_indices, row, query))
            full = set(_keys(found.full_kv_num_blocks, found.full_kv_indices, row, query))
            needed = {key for key in range(blocks) if in_blocks[row, query, :, key].any()}
            assert needed <= partial | full, "no block is missing"
            assert not partial & full
            assert all(in_blocks[row, query, :, key].all() for key in full), "full ones need no mask"
    if window == 3 and length == 300 and not documents:
        assert found.kv_num_blocks.flatten().tolist() == [1, 2, 2], "what is before the window is left out"


def _keys(numbers: Tensor | None, indices: Tensor | None, row: int, query: int) -> list[int]:
    assert numbers is not None
    assert indices is not None
    found: list[int] = indices[row, 0, query, : int(numbers[row, 0, query])].tolist()
    return found


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("with_slopes", [False, True])
def test_attention_by_blocks_is_what_the_dense_mask_makes_of_it(
    kv_heads: int, with_slopes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "_compiled_flex", lambda: flex_attention)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 16) for heads in (4, kv_heads, kv_heads))
    ids = packed(seq_len=200)["document_ids"]
    slopes = alibi_slopes(4, device=CPU) if with_slopes else None
    block_mask = build_block_mask(ids, document_ids=ids, window=30)
    mask, explicit = build_mask(200, document_ids=ids, cache=None, device=CPU, window=30, slopes=slopes)
    ours = AttentionInputs(mask=None, rope=None, explicit=False, slopes=slopes, window=30, block_mask=block_mask)
    dense = AttentionInputs(mask=mask, rope=None, explicit=explicit, slopes=slopes, window=30)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, ours, dropout=0.0), attend(q, k, v, dense, dropout=0.0))


def test_compiled_attention_by_blocks_is_one_graph_for_all_batches() -> None:
    q, k, v = (torch.randn(2, 4, 256, 16) for _ in range(3))
    slopes = alibi_slopes(4, device=CPU)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for seed in range(3):
        ids = random_batch(seq_len=256, num_documents=4, seed=seed)["document_ids"]
        block_mask = build_block_mask(ids, document_ids=ids, window=70)
        mask, explicit = build_mask(256, document_ids=ids, cache=None, device=CPU, window=70, slopes=slopes)
        inputs = AttentionInputs(mask=None, rope=None, explicit=False, slopes=slopes, window=70, block_mask=block_mask)
        dense = AttentionInputs(mask=mask, rope=None, explicit=explicit, slopes=slopes, window=70)
        with torch.no_grad():
            found, wanted = compiled(q, k, v, inputs, dropout=0.0), attend(q, k, v, dense, dropout=0.0)
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


def test_what_no_kernel_takes_gets_a_dense_mask_and_says_so_once(
    caplog: pytest.LogCaptureFixture, flex_calls: list[dict[str, Any]]
) -> None:
    gpu_kernels._say_once.cache_clear()
    decoder = tiny_decoder(d_model=64, max_seq_len=LENGTH, attention={"dropout": 0.1}).train()
    batch = packed(seq_len=LENGTH)
    with assume_device_type("cuda"):
        for _ in range(2):
            decoder(batch)
        decoder.eval()
        decoder(batch)
    assert [record.message for record in caplog.records] == [
        "attention takes a dense mask, which is slow for long rows. FlashAttention does not fit: it computes in 16 "
        "bits, not in torch.float32; flex_attention does not: it has no dropout (model.attention.dropout)"
    ]
    assert not flex_calls


@pytest.mark.usefixtures("in_float32")
def test_cached_decoding_takes_the_dense_mask() -> None:
    decoder, ids = tiny_decoder(attention=WINDOW), random_batch(seq_len=12)["input_ids"]
    with Operators() as seen, torch.no_grad():
        cache = decoder.new_cache(2, 12)
        pieces = [decoder.logits(ids[:, :7], cache=cache), decoder.logits(ids[:, 7:], cache=cache)]
        assert seen.count("torch_attn::_varlen_attn") == 0
        torch.testing.assert_close(torch.cat(pieces, 1), decoder.logits(ids), rtol=1e-4, atol=1e-5)


NOT_COVERED = {"falcon", "granite", "gemma3", "opt", "stablelm"}
"""Scores have another scale, or a layer is not told where documents begin."""


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_SDPA])
def test_models_of_transformers_take_no_mask_for_packed_rows_either(family: str) -> None:
    batch = random_batch(VOCAB_SIZE, seq_len=24, num_documents=4)
    batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    wanted, found = (tiny_huggingface(family, attention="sdpa").train() for _ in range(2))
    with assume_device_type("cpu"):
        wanted(batch)[0].backward()
    with Operators() as seen:
        loss_sum, _ = found(batch)
    loss_sum.backward()
    assert (found._packing == "varlen") == (family not in NOT_COVERED)
    if family not in NOT_COVERED:
        assert seen.count("torch_attn::_varlen_attn") == 4, "two layers, in the trial and then"
    for ours, target in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, target.grad, rtol=1e-4, atol=1e-4)
    ids = batch["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(found.logits(ids), wanted.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_are_planned_to_take_no_memory_on_a_gpu(compiled: bool) -> None:
    shape: dict[str, Any] = {"seq_len": 512, "max_seq_len": 512, "precision": "bf16-mixed", "compiled": compiled}
    without = memory_of(on_gpu=True, **shape)
    assert memory_of(on_gpu=True, mask_documents=True, **shape).total == pytest.approx(without.total, rel=0.03)
