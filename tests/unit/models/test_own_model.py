"""A model of the user's own: what the contract leaves optional has a default, and what it needs is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.errors import ConfigError
from llmtrain.generation.decoding import generate
from llmtrain.generation.sampling import Decoding, Sampling
from llmtrain.models.decoder.cache import KVCache
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.own_model import (
    OwnModel,
    build_own_model,
    check_same_class,
    load_own_weights,
    read_own_model,
    write_own_folder,
)
from llmtrain.training.setup.trained import Vocabulary, train_own
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config


class Tied(nn.Module):
    """A learned position for each place, so that padding in a wrong place shows; the output is the embedding."""

    max_seq_len = 32

    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(32, width)
        self.mix = nn.Linear(width, width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.output.weight = self.embedding.weight

    def logits(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        sums = torch.tanh(self.mix(x)).cumsum(1)
        scores: Tensor = self.output(sums)
        return scores

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].flatten()
        scores = self.logits(batch["input_ids"]).flatten(0, 1)
        return F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORE_INDEX), (labels >= 0).sum()


class WithCache(nn.Module):
    """The decoder as if it were the user's, with all that is optional."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.decoder = Decoder(tiny_config(), vocab_size)
        self.max_seq_len = self.decoder.max_seq_len
        self.layers, self.flops_per_token = self.decoder.layers, self.decoder.flops_per_token
        self.new_cache, self.checkpoint_blocks = self.decoder.new_cache, self.decoder.checkpoint_blocks

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.decoder.logits(*args, **kwargs)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.decoder(batch)
        return found


class NotAModule:
    def __init__(self, **_: Any) -> None: ...


class WithoutLogits(nn.Linear):
    def __init__(self, vocab_size: int) -> None:
        super().__init__(2, 2)


class WithoutWeights(Tied):
    def parameters(self, recurse: bool = True) -> Any:
        return iter(())


class WrongResult(Tied):
    def forward(self, batch: Batch) -> Any:
        return self.logits(batch["input_ids"])


class NotSaved(Tied):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def own(cls: type, **options: Any) -> OwnModel:
    torch.manual_seed(0)
    return build_own_model(OwnModelConfig(name=f"{__name__}:{cls.__name__}", options=options), TINY_VOCAB_SIZE)


def test_without_a_cache_of_its_own_a_row_is_the_same_alone_and_in_a_batch() -> None:
    model = own(Tied).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13]]
    how = Decoding(max_new_tokens=9, sampling=Sampling(temperature=0.0, seed=1), batch_size=3)
    together = generate(model, prompts, how, stop_ids=[7])
    alone = [generate(model, [prompt], how, stop_ids=[7])[0] for prompt in prompts]
    assert together == alone
    ids = torch.tensor([[*prompts[0], *alone[0]]])
    expected = model.logits(ids)[0].argmax(-1).tolist()
    assert alone[0] == expected[2 : 2 + len(alone[0])]


def test_optional_members_are_used_if_they_exist() -> None:
    model = own(WithCache).eval()
    decoder: Decoder = model.network.decoder
    how = Decoding(max_new_tokens=6, sampling=Sampling(temperature=0.0, seed=1))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(model, prompts, how) == generate(decoder, prompts, how)
    assert isinstance(model.new_cache(2, 8), KVCache)
    assert model.layers() == decoder.layers()
    assert model.flops_per_token(16) == decoder.flops_per_token(16)
    assert list(model.checkpointable) == [0, 2]
    with pytest.raises(ConfigError, match=r"recomputes all of its layers or none: set it to full or none"):
        model.checkpoint_blocks(1)
    model.checkpoint_blocks(2)
    batch = random_batch(num_documents=2)
    assert torch.equal(model(batch)[0], decoder(batch)[0])


def test_optional_members_have_defaults() -> None:
    model = own(Tied)
    tied, table, mix = TINY_VOCAB_SIZE * 8, 32 * 8, 8 * 8 + 8
    assert model.max_seq_len == 32
    assert model.layers() == []
    assert model.num_parameters() == tied + table + mix
    assert model.num_parameters(non_embedding=True) == tied + mix
    assert model.flops_per_token(16) == 6 * (tied + mix)
    with pytest.raises(ConfigError, match=r"trainer\.activation_checkpointing: .*:Tied has no method"):
        model.checkpoint_blocks()
    assert list(model.checkpointable) == [0]


def test_weights_written_are_the_weights_read_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    model, other = own(Tied), own(Tied)
    write_own_folder(tmp_path, model=model, state_dict=model.saved_tensors(), tokenizer_folder=None)
    with torch.no_grad():
        other.network.mix.weight.zero_()
        other.network.embedding.weight.zero_()
    load_own_weights(tmp_path, other)
    batch = random_batch()
    assert torch.equal(model(batch)[0], other(batch)[0])
    assert other.network.output.weight is other.network.embedding.weight
    with pytest.raises(ConfigError, match=r"changed since: embedding\.weight has shape .*, expected"):
        load_own_weights(tmp_path, own(Tied, width=4))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Tied, {"widht": 8}, r"model\.name: .*:Tied\(vocab_size=61, widht=8\) failed \(TypeError: .*'widht'"),
        (Tied, {"width": -1}, r"failed \(RuntimeError: .* at .*\.py:\d+\)"),
        (NotAModule, {}, r"NotAModule is not a subclass of torch\.nn\.Module"),
        (WithoutLogits, {}, r"WithoutLogits has no method logits: add it; llmtrain\.contracts\.Model lists"),
        (WithoutWeights, {}, "has no parameters, so there is nothing to train"),
    ],
)
def test_a_class_that_is_no_such_model_is_one_message(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own(cls, **options)


def test_a_wrong_result_and_state_that_cannot_be_saved_are_one_message() -> None:
    with pytest.raises(ConfigError, match=r"forward of .* should return two tensors, .* but it returned Tensor"):
        own(WrongResult)(random_batch())
    with pytest.raises(ConfigError, match=r"_extra_state in the state dict of .* is not a tensor"):
        own(NotSaved).saved_tensors()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module_here:M",
            r"model\.name: no_such_module_here cannot be imported \(ModuleNotFoundError: .*\); mod",
        ),
        (f"{__name__}:Missing", r"model\.name: .* has no function or class 'Missing'"),
    ],
)
def test_a_missing_class_is_one_message(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_own_model(OwnModelConfig(name=name), 7)


def test_adapters_are_merged_into_the_weights_of_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build_own_model(OwnModelConfig(name=f"{__name__}:Tied"), TINY_VOCAB_SIZE)
    write_own_folder(tmp_path, model=base, state_dict=base.saved_tensors(), tokenizer_folder=None)
    values = {"name": f"{__name__}:Tied", "init_from": str(tmp_path), "lora": {"r": 2}}
    vocabulary = Vocabulary(size=TINY_VOCAB_SIZE, tokenizer_folder=None)
    with pytest.raises(ConfigError, match="target_modules: output shares its weight with another layer"):
        train_own(OwnModelConfig.model_validate(values), vocabulary, seq_len=8)
    values["lora"] = {"r": 2, "target_modules": ["mix"]}
    trained = train_own(OwnModelConfig.model_validate(values), vocabulary, seq_len=8)
    ids = torch.arange(8)[None]
    assert torch.equal(trained.module.logits(ids), base.logits(ids)), "adapters begin with no effect"
    tensors = {name: torch.randn(tensor.shape) for name, tensor in trained.tensors().items()}
    assert sorted(tensors) == ["mix.lora_A.default.weight", "mix.lora_B.default.weight"]
    (tmp_path / "tuned").mkdir()
    trained.write(tmp_path / "tuned", tensors)
    trained.read(tmp_path / "tuned")
    merged = read_own_model(tmp_path / "tuned", OwnModelConfig(name=f"{__name__}:Tied"))
    torch.testing.assert_close(merged.logits(ids), trained.module.logits(ids))
    assert not torch.allclose(merged.logits(ids), base.logits(ids), atol=0.1)
    with pytest.raises(ConfigError, match=r"with options \{\}, but this config's is a:B with \{\}"):
        check_same_class(tmp_path, OwnModelConfig(name="a:B"))
