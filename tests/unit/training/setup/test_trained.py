"""What is trained, and how checkpoints store it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.errors import ConfigError
from llmtrain.generation.open_model import open_model
from llmtrain.training.setup.trained import Trained, Vocabulary, train_decoder, train_huggingface
from tests.support.tiny_huggingface import write_tiny_chat_folder

SMALL = {"d_model": 8, "num_layers": 1, "max_seq_len": 8, "attention": {"num_heads": 1}}


def test_a_model_is_freed_with_the_run_that_trained_it() -> None:
    """The next thing that a run may do is load the published model, for which there is memory only once."""
    config = DecoderConfig.model_validate(SMALL)
    train_decoder(
        config, Vocabulary(size=16, tokenizer_folder=None)
    )  # at the first one torch imports, and keeps frames
    gc.collect()
    gc.disable()
    try:
        trained = train_decoder(config, Vocabulary(size=16, tokenizer_folder=None))
        assert trained.split is not None
        module = weakref.ref(trained.module)
        del trained
        assert module() is None
    finally:
        gc.enable()


def with_more_tokens(folder: Path) -> tuple[int, int]:
    """A model whose tokenizer has two tokens more than its embedding has rows; both numbers."""
    rows = len(AutoTokenizer.from_pretrained(write_tiny_chat_folder(folder)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<call>", "<result>"])
    tokenizer.save_pretrained(folder)
    return rows, len(tokenizer)


def trained_on(folder: Path, size: int, **settings: Any) -> Trained:
    config = HuggingFaceConfig.model_validate({"path": str(folder), **settings})
    vocabulary = Vocabulary(size=size, tokenizer_folder=folder)
    cpu = torch.device("cpu")
    return train_huggingface(config, folder, vocabulary, seq_len=16, seed=3, precision="32", device=cpu)


def test_tokens_without_a_row_in_the_embedding_are_named_with_the_way_out(tmp_path: Path) -> None:
    rows, size = with_more_tokens(tmp_path)
    names = rf"of {rows} rows, has none: <call> \({rows}\), <result> \({rows + 1}\)\. If they are wanted, "
    with pytest.raises(ConfigError, match=names + r"set model\.resize_embeddings=true"):
        trained_on(tmp_path, size)
    with pytest.raises(ConfigError, match=names + rf".*resize_token_embeddings\({size}\)"):
        trained_on(tmp_path, size, lora={})
    with pytest.raises(ValueError, match="an adapter does not hold the new rows"):
        trained_on(tmp_path, size, lora={}, resize_embeddings=True)


def test_rows_are_added_alike_each_time_saved_and_used(tmp_path: Path) -> None:
    _, size = with_more_tokens(tmp_path / "base")
    trained, again = (trained_on(tmp_path / "base", size, resize_embeddings=True) for _ in range(2))
    assert trained.module.vocab_size == size
    assert trained.described["vocab_size"] == size
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    with torch.no_grad():
        for tensor in trained.tensors().values():
            tensor.add_(0.01)
    trained.write(tmp_path / "model", trained.tensors())
    again.read(tmp_path / "model")
    for name, tensor in trained.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert open_model(str(tmp_path / "model"), device="cpu").generate("a <call>", chat=False, max_new_tokens=1)
