"""`export`: what is written loads in plain transformers and says the same; what does not is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError, RunError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_model_folder, write_model_folder
from llmtrain.publishing import transformers_folder
from llmtrain.publishing.agreement import answer, compare
from llmtrain.publishing.exported import Request
from llmtrain.verbs.export import export
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_huggingface import tiny_network
from tests.support.tiny_model import write_tiny_model

GPT2 = {
    "attention": {"bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "activation": "gelu_tanh", "bias": True},
    "norm": {"type": "layernorm"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"attention": {"qk_norm": True, "variant": "gqa", "num_kv_heads": 2}},
    "gpt2": GPT2,
}
IDS = torch.tensor([[5, 17, 3, 40, 9, 100, 31]])


def request(to: Path, **changes: Any) -> Request:
    return Request(to=str(to), device="cpu", **changes)


@torch.no_grad()
@pytest.mark.parametrize("model_type", list(LAYOUTS))
def test_the_decoder_is_what_transformers_loads(tmp_path: Path, model_type: str) -> None:
    decoder = write_tiny_model(tmp_path / "own", **LAYOUTS[model_type])
    result = export(str(tmp_path / "own"), request(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == model_type
    torch.testing.assert_close(theirs(IDS).logits, decoder.logits(IDS), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0
    kept = json.loads((tmp_path / "out" / "export.json").read_text())
    assert kept == {key: value for key, value in result.items() if key != "output"}
    assert kept["max_logit_difference"] < 1e-5
    assert kept["greedy_tokens_equal"] == kept["greedy_tokens"] == 4 * 24
    assert kept["compared_on"] == "built-in texts"
    assert set(kept["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"attention": {"variant": "complex"}}, "attention.variant complex"),
        ({"positional": {"encoding": "alibi"}}, "positional.encoding alibi"),
        ({"parallel_layers": True}, "parallel_layers"),
    ],
)
def test_a_decoder_that_transformers_does_not_have_is_refused_by_the_feature(
    tmp_path: Path, changes: dict[str, Any], feature: str
) -> None:
    decoder = write_tiny_model(tmp_path / "own", **changes)
    with pytest.raises(ConfigError, match=f"no class of transformers is exactly this model: .*llama: {feature}"):
        export(str(tmp_path / "own"), request(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    plain = export(str(tmp_path / "own"), request(tmp_path / "out"), format="safetensors")
    assert plain["max_logit_difference"] == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == decoder.state_dict().keys()


def test_plain_safetensors_have_the_decoders_own_names_where_transformers_has_others(tmp_path: Path) -> None:
    decoder = write_tiny_model(tmp_path / "own")
    export(str(tmp_path / "own"), request(tmp_path / "out"), format="safetensors")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == decoder.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in decoder.state_dict().items())
    assert isinstance(read_model_folder(tmp_path / "out")[0], Decoder)


def test_weights_that_are_rounded_differ_and_by_how_much_is_said(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "own")
    result = export(str(tmp_path / "own"), request(tmp_path / "out", dtype="bfloat16"))
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert 1e-4 < result["max_logit_difference"] < 0.05
    assert 1e-7 < result["mean_kl_nats"] < 0.01


def test_over_the_tolerance_nothing_is_at_the_destination_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "own")
    arguments = ["export", str(tmp_path / "own"), "--to", str(tmp_path / "here" / "out"), "--device", "cpu"]
    assert run([*arguments, "--dtype", "bfloat16", "--tolerance", "0.0001"]) == 1
    assert "error: the result does not agree with" in (told := capsys.readouterr().err)
    assert "over the tolerance of 1e-04" in told
    assert list((tmp_path / "here").iterdir()) == []
    assert run([*arguments, "--format", "gguf"]) == 2
    assert run(arguments) == 0
    assert "greedy tokens" in capsys.readouterr().out


def test_weights_that_are_wrong_in_the_file_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "own")

    def write_wrongly(folder: Path, **described: Any) -> None:
        write_model_folder(folder, **described)
        weights = load_file(folder / "model.safetensors")
        name = "model.layers.1.self_attn.q_proj.weight"
        weights[name] = weights[name].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(transformers_folder, "write_model_folder", write_wrongly)
    with pytest.raises(RunError, match="logits differ by"):
        export(str(tmp_path / "own"), request(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "own-tokenizer"]


def test_a_chat_model_keeps_template_and_all_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_network("qwen3", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "base")
    result = export(str(tmp_path / "base"), request(tmp_path / "out"))
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert ends <= set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == set(result["eos_token_ids"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert result["chat_template"]
    assert result["max_logit_difference"] < 1e-5
    monkeypatch.setattr(transformers_folder, "set_end_tokens", lambda folder, eos_ids: None)
    with pytest.raises(RunError, match=r"the result ends texts at \[2\], and its source at \[1, 2, 4\]"):
        export(str(tmp_path / "base"), request(tmp_path / "lost"))


def test_what_stands_there_is_not_replaced_without_force_nor_if_it_is_a_strangers(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "own")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="is there already; name another folder with --to, or replace it: --force"):
        export(str(tmp_path / "own"), request(mine))
    with pytest.raises(ConfigError, match="was not made by llmtrain"):
        export(str(tmp_path / "own"), request(mine, force=True))
    assert (mine / "thesis.txt").read_text() == "years"
    export(str(tmp_path / "own"), request(tmp_path / "out"))
    before = (tmp_path / "out" / "export.json").read_text()
    with pytest.raises(ConfigError, match="is there already"):
        export(str(tmp_path / "own"), request(tmp_path / "out"))
    export(str(tmp_path / "own"), request(tmp_path / "out", force=True, dtype="float16"))
    assert (tmp_path / "out" / "export.json").read_text() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "own", "own-tokenizer"]


def test_texts_that_part_at_a_near_tie_agree_and_others_do_not() -> None:
    def scores(first: float, second: float) -> Any:
        return lambda ids: torch.tensor([first, second, -10.0]).expand(*ids.shape, 3)

    rows = [[0, 1, 0, 1]]
    source = answer(scores(1.0, 0.99), rows)
    tie = compare(source, answer(scores(0.99, 1.0), rows))
    assert tie.written_equal == 0
    assert tie.largest_gap == pytest.approx(0.001, rel=1e-3)
    assert tie.why_not_within(0.002) is None
    other = compare(source, answer(scores(0.9, 1.0), rows))
    assert "logits differ by 1.00e-02" in (other.why_not_within(0.005) or "")
    nan = compare(source, answer(scores(float("nan"), 1.0), rows))
    assert nan.why_not_within(1.0) is not None
