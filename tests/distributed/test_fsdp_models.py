"""Models of transformers, and adapters, with parameters sharded over the ranks, compute the same as on one rank."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import full_tensor, part_of
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_model_folder, write_model_folder
from llmtrain.training.checkpoint import CheckpointStore, Snapshot, load_optimizer, newest_good, step_folder
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.setup.trained import Trained, Vocabulary, train_decoder, train_huggingface
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update
from tests.support.ranks import RankFailed, RankPool
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import VOCAB_SIZE, write_tiny_folder

LORA = {"r": 2, "alpha": 4.0}
DECODER = {"d_model": 12, "num_layers": 2, "max_seq_len": 64, "attention": {"num_heads": 2}}
EPS = 1e-4
"""Attention does not see a bias that all keys share: its gradient is a rounding error, which Adam must not blow up."""


class Result(NamedTuple):
    """Of one rank."""

    losses: list[float]
    tensors: dict[str, Tensor]
    """Of a checkpoint, whole, after training."""


def make_engine(precision: str, strategy: str) -> Engine:
    strategy = strategy if "WORLD_SIZE" in os.environ else "auto"
    distributed = DistributedConfig.model_validate({"timeout_sec": 60, "strategy": strategy})
    trainer = TrainerConfig.model_validate({"precision": precision, "compile": False})
    return Engine(resolve(RunConfig(device="cpu"), trainer, distributed), distributed=distributed)


def build(
    folder: Path, engine: Engine, *, lora: dict[str, Any] | None, own: bool, decoder: dict[str, Any] | None
) -> Trained:
    keys: dict[str, Any] = {} if lora is None else {"lora": lora}
    torch.manual_seed(4)
    if own:
        config = DecoderConfig.model_validate((decoder or DECODER) | keys | {"init_from": str(folder)})
        return train_decoder(
            config, Vocabulary(size=VOCAB_SIZE, tokenizer_folder=None, eos_id=0), sharded=engine.is_sharded
        )
    return train_huggingface(
        HuggingFaceConfig.model_validate({"name": "huggingface", "path": str(folder)} | keys),
        folder,
        Vocabulary(size=VOCAB_SIZE, tokenizer_folder=folder),
        seq_len=16,
        seed=4,
        precision=engine.resolved.precision,
        device=torch.device("cpu"),
        sharded=engine.is_sharded,
    )


def write_own_folder(folder: Path, decoder: dict[str, Any] | None) -> Path:
    """A decoder of this library with random weights."""
    torch.manual_seed(3)
    config = DecoderConfig.model_validate(decoder or DECODER)
    state_dict = Decoder(config, VOCAB_SIZE).state_dict()
    write_model_folder(folder, config=config, vocab_size=VOCAB_SIZE, state_dict=state_dict, eos_id=0)
    return folder


def train(
    folder: Path,
    checkpoints: Path,
    steps: int,
    *,
    own: bool = False,
    lora: dict[str, Any] | None = None,
    precision: str = "32",
    checkpointing: bool = False,
    compiled: bool = False,
    strategy: str = "fsdp",
    decoder: dict[str, Any] | None = None,
) -> Result:
    """Go on from the checkpoint in `checkpoints` if there is one; save there at the end."""
    engine = make_engine(precision, strategy)
    trained = build(folder, engine, lora=lora, own=own, decoder=decoder)
    if checkpointing:
        trained.module.checkpoint_blocks()
    if compiled:
        torch._dynamo.reset()  # what earlier tests of this process compiled would make its sizes symbols
        trained.module.compile_parts()
    model = engine.setup(trained.module)
    trained.initialize()
    optimizer = build_optimizer(OptimizerConfig(lr=0.01, eps=EPS), trained.module)
    start = 0
    if found := newest_good(checkpoints):
        trained.read(found[0] / "model")
        optimizer.load_state_tensors(load_optimizer(found[0]))
        start = int(found[0].name.removeprefix("step_"))
    engine.gather(start)  # nobody saves before all have read
    losses = []
    for step in range(start, start + steps):
        rows = random_batch(VOCAB_SIZE, batch_size=4, num_documents=2, ignored_fraction=0.5, seed=step)
        size = 4 // engine.data_parallel_size
        mine = slice(engine.data_parallel_rank * size, (engine.data_parallel_rank + 1) * size)
        share: Batch = {name: tensor[mine] for name, tensor in rows.items()}  # type: ignore[assignment, index]
        num_tokens = agree([share], engine=engine, stop_requested=False).num_tokens
        loss_sum = compute_gradients(model, [share], engine=engine, num_tokens=num_tokens)
        losses.append(loss_sum.item() / num_tokens)
        update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
        optimizer.zero_grad()
    if group := engine.save_group():
        store = CheckpointStore(
            checkpoints,
            keep_last=3,
            config_yaml="",
            write_model=trained.write,
            resumed_from=step_folder(checkpoints, start),
            group=group,
            split=trained.split,
        )
        state = optimizer.state_tensors()
        store.save(Snapshot(step=start + steps, state={}, model=trained.tensors(), optimizer=state))
        store.close()
    return Result(losses, {name: full_tensor(tensor.detach()).clone() for name, tensor in trained.tensors().items()})


def run(folder: Path, checkpoints: Path, steps: int, options: dict[str, Any]) -> Result:
    return train(folder, checkpoints, steps, **options)


def assert_equal_to_one(ranks: RankPool, family: str | None, tmp_path: Path, **options: Any) -> None:
    """Two steps on both ranks, two more on both, and two more on one, beside four and two on one."""
    tolerance = options.pop("tolerance", 1e-5)
    base = tmp_path / "base"
    folder = write_tiny_folder(base, family) if family else write_own_folder(base, options.get("decoder"))
    options["own"] = family is None
    straight = train(folder, tmp_path / "one", 6, **options)
    first, second = (ranks.run(run, folder, tmp_path / "two", 2, options)[0] for _ in range(2))
    third = train(folder, tmp_path / "two", 2, **options)
    assert first.losses + second.losses + third.losses == pytest.approx(straight.losses, abs=tolerance)
    assert third.tensors.keys() <= second.tensors.keys()  # of a decoder with adapters more is gathered
    for name, tensor in straight.tensors.items():
        if (
            options.get("precision") == "bf16-mixed"
        ):  # a gradient near 0 may have either sign, and Adam's step is as long
            assert (third.tensors[name] - tensor).norm() < 0.05 * tensor.norm() + 0.01, name
        else:
            torch.testing.assert_close(third.tensors[name], tensor, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_of_transformers_on_two_ranks_equals_one(two_ranks: RankPool, tmp_path: Path, family: str) -> None:
    assert_equal_to_one(two_ranks, family, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "latest" / "model")
    written = train(tmp_path / "base", tmp_path / "two", 0)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, written.tensors[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_of_a_model_of_transformers_on_two_ranks_equal_one(
    two_ranks: RankPool, tmp_path: Path, family: str
) -> None:
    assert_equal_to_one(two_ranks, family, tmp_path, lora=LORA)
    assert (tmp_path / "two" / "latest" / "model" / "adapter_model.safetensors").exists()


def test_adapters_of_a_decoder_on_two_ranks_equal_one(two_ranks: RankPool, tmp_path: Path) -> None:
    assert_equal_to_one(two_ranks, None, tmp_path, lora=LORA)
    merged = [read_model_folder(tmp_path / kind / "latest" / "model")[0].state_dict() for kind in ("one", "two")]
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", None])
def test_with_mixed_precision(two_ranks: RankPool, tmp_path: Path, family: str | None) -> None:
    assert_equal_to_one(two_ranks, family, tmp_path, precision="bf16-mixed", tolerance=0.05)


def dtypes_of_weights_and_stream(folder: Path) -> set[torch.dtype]:
    engine = make_engine("bf16-mixed", "fsdp")
    trained = build(folder, engine, lora=None, own=False, decoder=None)
    model = engine.setup(trained.module)
    trained.initialize()
    found = {next(trained.module.parameters()).dtype}
    trained.module.layers()[1].register_forward_pre_hook(lambda _, inputs: found.add(inputs[0].dtype))
    model(random_batch(VOCAB_SIZE))
    return found


def test_under_mixed_precision_weights_are_float32_and_the_residual_stream_is_bfloat16(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    folder = write_tiny_folder(tmp_path / "base")
    assert two_ranks.run(dtypes_of_weights_and_stream, folder) == [{torch.float32, torch.bfloat16}] * 2


def test_with_frozen_bfloat16_under_trained_float32(two_ranks: RankPool, tmp_path: Path) -> None:
    assert_equal_to_one(two_ranks, "llama", tmp_path, lora=LORA, precision="bf16-mixed", tolerance=0.02)


def test_with_activation_checkpointing(two_ranks: RankPool, tmp_path: Path) -> None:
    assert_equal_to_one(two_ranks, "llama", tmp_path, checkpointing=True)


@pytest.mark.slow
# One to four minutes each on two cores. CI compiles our decoder here, and both with adapters and split matrices below.
@pytest.mark.parametrize("family", [None, pytest.param("llama", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.nightly)])
def test_compiled_by_block(
    two_ranks: RankPool, tmp_path: Path, family: str | None, lora: dict[str, Any] | None
) -> None:
    assert_equal_to_one(two_ranks, family, tmp_path, lora=lora, compiled=True)


# -- matrices split as well --------------------------------------------------------------------------------------------

GQA = {"d_model": 16, "num_layers": 2, "max_seq_len": 64, "ffn": {"d_ff": 20}} | {
    "attention": {"num_heads": 4, "variant": "gqa", "num_kv_heads": 2, "qk_norm": True}
}
GPT2_LIKE = {
    "d_model": 16,
    "num_layers": 2,
    "max_seq_len": 64,
    "attention": {"num_heads": 2, "bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "activation": "gelu_tanh", "bias": True, "d_ff": 20},
    "norm": {"type": "layernorm"},
    "tie_embeddings": False,
}


ALIBI = GQA | {"positional": {"encoding": "alibi"}}


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [GQA, GPT2_LIKE, ALIBI], ids=["gqa", "gpt2", "alibi"])
def test_two_by_two_ranks_equal_one(four_ranks: RankPool, tmp_path: Path, decoder: dict[str, Any]) -> None:
    assert_equal_to_one(four_ranks, None, tmp_path, strategy="fsdp_tp", decoder=decoder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_model_of_transformers_on_two_by_two_ranks_equals_one(
    four_ranks: RankPool, tmp_path: Path, family: str
) -> None:
    assert_equal_to_one(four_ranks, family, tmp_path, strategy="fsdp_tp")


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}], ids=str)
def test_one_row_of_two_ranks_equals_one(two_ranks: RankPool, tmp_path: Path, options: dict[str, Any]) -> None:
    assert_equal_to_one(two_ranks, None, tmp_path, strategy="fsdp_tp", decoder=GQA, **options)


@pytest.mark.slow
def test_split_matrices_in_mixed_precision(four_ranks: RankPool, tmp_path: Path) -> None:
    precision = {"precision": "bf16-mixed", "tolerance": 0.05}
    assert_equal_to_one(four_ranks, None, tmp_path, strategy="fsdp_tp", decoder=GQA, **precision)


@pytest.mark.nightly  # two minutes; with adapters below, on two ranks, CI compiles the same
def test_split_matrices_compiled(four_ranks: RankPool, tmp_path: Path) -> None:
    assert_equal_to_one(four_ranks, None, tmp_path, strategy="fsdp_tp", decoder=GQA, compiled=True)


@pytest.mark.slow
def test_a_checkpoint_of_two_by_two_ranks_is_read_by_two_and_by_one(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    folder, checkpoints = write_own_folder(tmp_path / "base", GQA), tmp_path / "c"
    options = {"own": True, "decoder": GQA}
    straight = train(folder, tmp_path / "one", 6, **options)  # type: ignore[arg-type]
    by_four = four_ranks.run(run, folder, checkpoints, 2, options | {"strategy": "fsdp_tp"})[0]
    by_two = two_ranks.run(run, folder, checkpoints, 2, options | {"strategy": "fsdp"})[0]
    by_one = train(folder, checkpoints, 2, **options)  # type: ignore[arg-type]
    assert by_four.losses + by_two.losses + by_one.losses == pytest.approx(straight.losses, abs=1e-5)


# -- and their adapters ------------------------------------------------------------------------------------------------

SPLIT: dict[str, Any] = {"strategy": "fsdp_tp", "decoder": GQA, "lora": LORA}


@pytest.mark.parametrize("family", ["llama", None])
def test_adapters_of_split_matrices_equal_those_of_one_rank(
    two_ranks: RankPool, tmp_path: Path, family: str | None
) -> None:
    assert_equal_to_one(two_ranks, family, tmp_path, **SPLIT)
    inside = Path("latest/model" if family else "latest/model/adapter")
    one, two = (load_file(tmp_path / run / inside / "adapter_model.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)


def test_plain_peft_loads_adapters_of_split_matrices(two_ranks: RankPool, tmp_path: Path) -> None:
    base = write_tiny_folder(tmp_path / "base", "llama")
    trained = two_ranks.run(run, base, tmp_path / "c", 2, SPLIT)[0]
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "c" / "latest" / "model")
    tensors = {name: tensor for name, tensor in read.state_dict().items() if ".lora_" in name}
    assert len(tensors) == 2 * 2 * 7  # layers × halves × matrices of a layer
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained.tensors[name])


def numbers_held(folder: Path, family: str | None) -> dict[str, int]:
    """Of each tensor of layer 0's adapters, on this rank."""
    engine = make_engine("32", "fsdp_tp")
    trained = build(folder, engine, lora=LORA, own=family is None, decoder=GQA)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model passed to `Fabric.setup")
        engine.setup(trained.module)
    held = {name: part_of(parameter).local.numel() for name, parameter in trained.module.named_parameters()}
    return {
        ".".join(name.split(".")[-4:-2]): number for name, number in held.items() if ".0." in name and ".lora_" in name
    }


def test_the_half_of_an_adapter_that_meets_the_split_is_split(two_ranks: RankPool, tmp_path: Path) -> None:
    for family, width, ffn, kv in (("llama", 32, 48, 16), (None, 16, 20, 8)):
        folder = tmp_path / str(family)
        folder = write_tiny_folder(folder, family) if family else write_own_folder(folder, GQA)
        wanted = {
            "q_proj.lora_A": width,
            "q_proj.lora_B": width // 2,
            "k_proj.lora_B": kv // 2,
            "v_proj.lora_B": kv // 2,
        }
        wanted |= {"o_proj.lora_A": width // 2, "o_proj.lora_B": width, "down_proj.lora_A": ffn // 2}
        for rank in two_ranks.run(numbers_held, folder, family):
            assert {name: rank[name] for name in wanted} == {name: 2 * number for name, number in wanted.items()}


@pytest.mark.parametrize("lora", [LORA, LORA | {"dropout": 0.3}], ids=str)
def test_full_tensors_stay_the_same_on_each_rank(two_ranks: RankPool, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder = write_own_folder(tmp_path / "base", GQA)
    first, second = two_ranks.run(run, folder, tmp_path / "c", 4, SPLIT | {"own": True, "lora": lora})
    assert first.losses == second.losses
    for name, tensor in first.tensors.items():
        assert torch.equal(second.tensors[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", None])
def test_adapters_on_two_by_two_ranks_equal_one(four_ranks: RankPool, tmp_path: Path, family: str | None) -> None:
    assert_equal_to_one(four_ranks, family, tmp_path, **SPLIT, checkpointing=True)


def test_modules_to_save_are_split_too(two_ranks: RankPool, tmp_path: Path) -> None:
    lora = LORA | {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["mlp", "q_norm", "embed_tokens"]}
    assert_equal_to_one(two_ranks, "qwen3", tmp_path, **SPLIT | {"lora": lora})


def distance(one: Result, other: Result) -> float:
    """Of the adapters, over all tensors."""
    pairs = [(tensor, other.tensors[name]) for name, tensor in one.tensors.items() if ".lora_" in name]
    return math.sqrt(sum(float((left - right).square().sum()) for left, right in pairs))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", None])
def test_adapters_of_split_matrices_in_mixed_precision(
    four_ranks: RankPool, tmp_path: Path, family: str | None
) -> None:
    """As near to float32 as one process is: which way a sum over ranks is rounded is not the same."""
    folder = write_tiny_folder(tmp_path / "base", family) if family else write_own_folder(tmp_path / "base", GQA)
    options: dict[str, Any] = SPLIT | {"own": family is None}
    exact, one = (train(folder, tmp_path / p, 6, **options, precision=p) for p in ("32", "bf16-mixed"))
    split = four_ranks.run(run, folder, tmp_path / "four", 6, options | {"precision": "bf16-mixed"})[0]
    assert split.losses == pytest.approx(exact.losses, abs=0.05)
    assert distance(split, exact) < 1.5 * distance(one, exact)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", None])
def test_adapters_of_split_matrices_compiled(two_ranks: RankPool, tmp_path: Path, family: str | None) -> None:
    decoder = GQA | {"num_layers": 1}
    base = tmp_path / "base"
    folder = write_tiny_folder(base, family, num_hidden_layers=1) if family else write_own_folder(base, decoder)
    options: dict[str, Any] = SPLIT | {"own": family is None, "decoder": decoder}
    one = train(folder, tmp_path / "one", 3, **options)
    compiled = two_ranks.run(run, folder, tmp_path / "two", 3, options | {"compiled": True, "checkpointing": True})[0]
    assert compiled.losses == pytest.approx(one.losses, abs=1e-5)


def test_a_family_without_a_plan_is_rejected(two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="transformers has no plan for GPT2LMHeadModel: use fsdp"):
        assert_equal_to_one(two_ranks, "gpt2", tmp_path, strategy="fsdp_tp")
