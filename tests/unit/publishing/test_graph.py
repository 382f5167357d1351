"""Graphs: any decoder and models of transformers, with batch and length free, read by torch and by onnxruntime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from llmtrain.errors import ConfigError, RunError, in_surroundings
from llmtrain.models.decoder.traceable import TraceableDecoder
from llmtrain.publishing.exported import Request
from llmtrain.publishing.graph import TORCH_FILE, check_batches, open_torch, trace, write_torch
from llmtrain.verbs.export import export
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_decoder
from tests.support.tiny_huggingface import tiny_network
from tests.support.tiny_model import write_tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "complex": {"attention": {"variant": "complex"}},
    "window": {"attention": {"mask": "sliding_window", "window": 9}},
    "alibi": {"positional": {"encoding": "alibi"}},
    "learned": {"positional": {"encoding": "learned"}},
    "sinusoidal": {"positional": {"encoding": "sinusoidal"}, "norm": {"placement": "post", "type": "layernorm"}},
    "gqa": {"attention": {"variant": "gqa", "num_kv_heads": 2, "qk_norm": True}, "parallel_layers": True},
}


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4000.0).reshape(1000, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight[input_ids]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_an_error_and_does_not_end_the_process(tmp_path: Path) -> None:
    model = Embedded()
    write_torch(tmp_path, model)
    ids = torch.tensor([[3, 999]])
    assert torch.equal(open_torch(tmp_path)(ids), model.weight[ids])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / TORCH_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        write_torch(tmp_path / "full", model)
    assert str(in_surroundings(full.value)).startswith(str(tmp_path / "full" / TORCH_FILE))


@torch.no_grad()
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_traced_decoder_equals_the_decoder_at_every_shape(variant: str) -> None:
    decoder = tiny_decoder(**VARIANTS[variant])
    graph = trace(TraceableDecoder(decoder)).module()
    for shape in ((1, 1), (1, 7), (3, 1), (4, 33), (2, 64)):
        ids = torch.randint(TINY_VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(graph(ids), decoder.logits(ids), rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_in_onnx_takes_batches_and_lengths(tmp_path: Path) -> None:
    decoder = write_tiny_model(tmp_path / "own", attention={"variant": "complex"}, positional={"encoding": "alibi"})
    result = export(str(tmp_path / "own"), Request(to=str(tmp_path / "out")), format="onnx")
    assert result["max_logit_difference"] < 1e-5
    assert result["greedy_tokens_equal"] == result["greedy_tokens"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("input_ids", ["batch", "length"])]
    for shape in ((1, 1), (5, 13)):
        ids = torch.randint(270, shape)
        found = session.run(["logits"], {"input_ids": ids.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), decoder.logits(ids), rtol=0, atol=1e-4)
    assert {"tokenizer.json", "config.json", "generation_config.json", "export.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_transformers_can_be_written_as_a_graph(tmp_path: Path) -> None:
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    network = tiny_network("qwen3", vocab_size=len(tokenizer))
    network.save_pretrained(tmp_path / "base")
    result = export(str(tmp_path / "base"), Request(to=str(tmp_path / "out")), format="torch-export")
    assert result["max_logit_difference"] < 1e-5
    graph = torch.export.load(tmp_path / "out" / "model.pt2").module()
    ids = torch.randint(len(tokenizer), (3, 11))
    torch.testing.assert_close(graph(ids), network(ids).logits, rtol=0, atol=1e-4)
    assert export(str(tmp_path / "base"), Request(to=str(tmp_path / "onnx")), format="onnx")["tokens"] > 50


def test_rows_that_influence_each_other_in_a_batch_are_rejected() -> None:
    def leaking(ids: Tensor) -> Tensor:
        return (ids.float() + ids.float().sum(0) * (len(ids) > 1))[..., None].expand(*ids.shape, 4)

    with pytest.raises(RunError, match="2 rows in one batch differ from the rows alone"):
        check_batches(leaking, [[1, 2, 3], [4, 5]], tolerance=1e-3)
    check_batches(lambda ids: ids.float()[..., None].expand(*ids.shape, 4), [[1, 2, 3], [4, 5]], tolerance=1e-3)


def test_missing_packages_and_impossible_graphs_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "own")
    with pytest.raises(ConfigError, match="--dtype bfloat16: onnxruntime computes a model in float32"):
        export(str(tmp_path / "own"), Request(to=str(tmp_path / "out"), dtype="bfloat16"), format="onnx")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "llmtrain.publishing.graph.find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"--format onnx needs onnxscript: .*pip install .*\[onnx\]'"):
        export(str(tmp_path / "own"), Request(to=str(tmp_path / "out")), format="onnx")
    assert not (tmp_path / "out").exists()
