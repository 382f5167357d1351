"""Under fsdp no parameter is full on a rank before it is sharded, and a model begins with the same values."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import full_tensor
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.training.setup.trained import Trained, Vocabulary, train_decoder, train_huggingface
from tests.support.ranks import RankPool
from tests.support.tiny_huggingface import VOCAB_SIZE, write_tiny_folder

SEED = 4
LORA = {"r": 2}
TINY: dict[str, Any] = {"d_model": 18, "num_layers": 2, "max_seq_len": 64, "attention": {"num_heads": 3}}
LARGE: dict[str, Any] = {"d_model": 768, "num_layers": 12, "max_seq_len": 64, "attention": {"num_heads": 12}}
LARGE_BYTES = 4 * 12 * (4 * 768**2 + 3 * 768 * 2048)


def make_engine(precision: str = "32") -> Engine:
    distributed = DistributedConfig(timeout_sec=60)
    trainer = TrainerConfig.model_validate({"precision": precision, "compile": False})
    resolved = resolve(RunConfig(device="cpu"), trainer, distributed)
    if resolved.strategy != "single":
        resolved = dataclasses.replace(resolved, strategy="fsdp")
    return Engine(resolved, distributed=distributed)


def own(keys: dict[str, Any], *, cut: bool) -> Trained:
    config = DecoderConfig.model_validate(keys)
    return train_decoder(config, Vocabulary(size=VOCAB_SIZE, tokenizer_folder=None, eos_id=0), sharded=cut)


def of_transformers(folder: Path, keys: dict[str, Any], *, cut: bool, precision: str) -> Trained:
    return train_huggingface(
        HuggingFaceConfig.model_validate({"name": "huggingface", "path": str(folder)} | keys),
        folder,
        Vocabulary(size=VOCAB_SIZE, tokenizer_folder=folder),
        seq_len=16,
        seed=SEED,
        precision=precision,
        device=torch.device("cpu"),
        sharded=cut,
    )


def begin(keys: dict[str, Any], folder: Path | None = None, precision: str = "32") -> tuple[dict[str, Tensor], bool]:
    """All tensors that a model begins with, whole, and whether it was on the meta device before it was cut."""
    engine = make_engine(precision)
    torch.manual_seed(SEED)
    trained = (
        own(keys, cut=engine.is_sharded)
        if folder is None
        else of_transformers(folder, keys, cut=engine.is_sharded, precision=precision)
    )
    was_empty = any(parameter.is_meta for parameter in trained.module.parameters())
    engine.setup(trained.module)
    torch.manual_seed(SEED)
    trained.initialize()
    tensors = trained.module.state_dict() | dict(trained.module.named_buffers())
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}, was_empty


def write_own(folder: Path, keys: dict[str, Any]) -> str:
    torch.manual_seed(1)
    config = DecoderConfig.model_validate(keys)
    write_model_folder(
        folder, config=config, vocab_size=VOCAB_SIZE, state_dict=Decoder(config, VOCAB_SIZE).state_dict(), eos_id=0
    )
    return str(folder)


def assert_begin_alike(ranks: RankPool, *arguments: Any, empty: bool = True) -> None:
    one, _ = begin(*arguments)
    for tensors, was_empty in ranks.run(begin, *arguments):
        assert was_empty is empty
        assert tensors.keys() == one.keys()
        assert [name for name in one if not torch.equal(tensors[name], one[name])] == []


@pytest.mark.parametrize("precision", ["32", "bf16-true"])
@pytest.mark.parametrize("keys", [{}, {"tie_embeddings": False, "positional": {"encoding": "learned"}}], ids=str)
def test_a_decoder_begins_with_the_same_random_weights(
    two_ranks: RankPool, keys: dict[str, Any], precision: str
) -> None:
    assert_begin_alike(two_ranks, TINY | keys, None, precision)


@pytest.mark.parametrize("lora", [None, LORA, {**LORA, "dora": True}], ids=str)
def test_a_decoder_begins_with_the_weights_of_another(
    two_ranks: RankPool, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    keys = TINY | {"init_from": write_own(tmp_path / "base", TINY), "lora": lora}
    assert_begin_alike(two_ranks, keys, empty=not (lora and "dora" in lora))


@pytest.mark.parametrize("lora", [None, LORA, {**LORA, "modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_of_transformers_begins_with_the_weights_in_its_files(
    two_ranks: RankPool, tmp_path: Path, family: str, lora: dict[str, Any] | None
) -> None:
    folder = write_tiny_folder(tmp_path, family)
    assert_begin_alike(two_ranks, {"lora": lora}, folder, "bf16-mixed", empty=not (lora and "modules_to_save" in lora))


def test_transformers_reads_models_whose_names_it_changes(two_ranks: RankPool, tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, "mixtral")  # whose experts lie in the files one by one
    assert_begin_alike(two_ranks, {}, folder, empty=False)


# -- memory ------------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/self/status")


def growth_while_building(keys: dict[str, Any], cut: bool) -> int:
    """By how many bytes this process grew at most while a large decoder was built, and got its values."""
    engine = make_engine()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier test has freed must not hide what this one takes
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        trained = own(keys, cut=cut)
        engine.setup(trained.module)
        trained.initialize()
    finally:
        done.set()
        watcher.join()
    return max(peak, anonymous_bytes()) - before


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_a_rank_never_holds_more_than_its_part_of_a_large_model(
    two_ranks: RankPool, tmp_path: Path, loaded: bool
) -> None:
    keys = LARGE | ({"init_from": write_own(tmp_path, LARGE)} if loaded else {})
    for growth in two_ranks.run(partial(growth_while_building, cut=True), keys):
        assert growth < 0.65 * LARGE_BYTES
    for growth in two_ranks.run(partial(growth_while_building, cut=False), keys):
        assert growth > 0.95 * LARGE_BYTES
