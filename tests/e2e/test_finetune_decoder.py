"""Fine-tuning the decoder that is built here, whole or through LoRA, from the weights of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.errors import ConfigError, Preempted
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_model_folder, write_model_folder
from llmtrain.models.lora import add_lora_to_decoder, read_adapter
from llmtrain.verbs.train import train
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny import tiny_config
from tests.support.tiny_run import tiny_tuning, weight_hash, write_config

LORA = {"r": 4, "alpha": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that no layout of transformers holds: complex attention, learned positions."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    config = tiny_config(max_seq_len=96, attention={"variant": "complex"}, positional={"encoding": "learned"})
    torch.manual_seed(0)
    decoder = Decoder(config, len(tokenizer))
    write_model_folder(
        folder, config=config, vocab_size=len(tokenizer), state_dict=decoder.state_dict(), eos_id=tokenizer.eos_token_id
    )
    return folder


def config_of(folder: Path, base: Path, **model: Any) -> Path:
    rows = folder / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"{n} red"}, {"role": "assistant", "content": "green blue"}] for n in range(60)
    ]
    rows.write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns))
    tuned = {"init_from": str(base), **model}
    keys = tiny_tuning(folder, rows, tuned, seq_len=64, max_steps=12, save_every_steps=5)
    return write_config(folder / "tuned.yaml", keys)


@pytest.mark.parametrize("model", [{"lora": LORA}, {"lora": {**LORA, "dora": True}}, {}], ids=["lora", "dora", "full"])
def test_a_tuned_decoder_is_better_and_resumes_bit_for_bit(
    base: Path, tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(config_of(tmp_path, base, **model))
    whole = train(load_config(config, ["output.run_id=whole"]))
    assert whole["val_loss"] < whole["first_loss"] - 0.3
    trainable, total = whole["parameters"]["trainable"], whole["parameters"]["total"]
    assert trainable < total / 2 if model else trainable == total

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=7")
    with pytest.raises(Preempted):
        train(load_config(config, ["output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    stopped = train(None, resume=str(tmp_path / "runs" / "stopped"))
    assert weight_hash(Path(stopped["run"])) == weight_hash(Path(whole["run"]))


def test_adapters_lie_merged_in_the_model_folder_and_alone_beside_it(base: Path, tmp_path: Path) -> None:
    tuned = train(load_config(str(config_of(tmp_path, base, lora=LORA)), ["output.run_id=one"]))
    folder = Path(tuned["model"])
    ids = torch.arange(20)[None]
    untouched, merged = (read_model_folder(place)[0].eval() for place in (base, folder))
    adapted = read_model_folder(base)[0].eval()
    add_lora_to_decoder(adapted, LoraConfig.model_validate(LORA))
    read_adapter(folder / "adapter", adapted)
    with torch.inference_mode():
        torch.testing.assert_close(merged.logits(ids), adapted.logits(ids), rtol=0, atol=1e-5)
        assert float((merged.logits(ids) - untouched.logits(ids)).abs().max()) > 0.05
    assert merged.config.lora is None
    assert (folder / "chat_template.jinja").read_text() == CHATML
    assert (folder / "tokenizer.json").is_file()


def test_what_contradicts_the_model_that_is_begun_from_is_said(base: Path, tmp_path: Path) -> None:
    config = str(config_of(tmp_path, base))
    with pytest.raises(ConfigError, match=r"another one \(model.d_model is 32 there and 64 here; model.norm.eps is "):
        train(load_config(config, ["model.d_model=64", "model.norm.eps=0.5"]))
    with pytest.raises(ConfigError, match="there is no run 'nowhere'"):
        train(load_config(config, ["model.init_from=nowhere"]))
    with pytest.raises(ConfigError, match=r"lora trains adapters on frozen weights.*init_from"):
        load_config(config, ["model.init_from=null", "model.lora.r=8"])
    changed = train(load_config(config, ["model.dropout=0.1", "trainer.max_steps=1", "output.run_id=dropout"]))
    assert read_model_folder(Path(changed["model"]))[0].config.dropout == 0.1
