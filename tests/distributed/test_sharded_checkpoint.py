"""Checkpoints that several ranks write together, and that any number of ranks reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import full_tensor
from llmtrain.faults import VARIABLE
from llmtrain.models.folder import read_model_folder
from llmtrain.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Snapshot,
    load_optimizer,
    load_state,
    newest_good,
    step_folder,
    verify,
)
from llmtrain.training.checkpoint.format import sealed
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.setup.trained import Trained, Vocabulary, train_decoder
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update
from tests.support.ranks import RankFailed, RankPool
from tests.support.tiny import random_batch

VOCAB = 37
"""Odd, as is the width of feed-forward layers: the ranks' slices differ in size, and a rank may have none."""
DECODER: dict[str, Any] = {
    "d_model": 12,
    "num_layers": 3,
    "max_seq_len": 16,
    "attention": {"num_heads": 2, "qk_norm": True},
    "ffn": {"d_ff": 19},
}
GPT2: dict[str, Any] = {
    "attention": {"num_heads": 2, "bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "activation": "gelu_tanh", "bias": True, "d_ff": 19},
    "norm": {"type": "layernorm"},
    "num_layers": 2,
}
"""Its layout transposes matrices and joins three into one."""


class Run:
    """A decoder, its optimizer and its store, as the recipe makes them."""

    def __init__(
        self, folder: Path, *, strategy: str, optimizer: str = "adamw", replicate: int = 1, **keys: Any
    ) -> None:
        distributed = DistributedConfig(timeout_sec=60, replicate=replicate)
        resolved = resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)
        if resolved.strategy != "single":
            resolved = dataclasses.replace(resolved, strategy=strategy)
        self.engine = Engine(resolved, distributed=distributed)
        torch.manual_seed(3)
        config = DecoderConfig.model_validate(DECODER | keys)
        self.trained: Trained = train_decoder(
            config, Vocabulary(size=VOCAB, tokenizer_folder=None, eos_id=0), sharded=self.engine.is_sharded
        )
        self.model = self.engine.setup(self.trained.module)
        self.trained.initialize()
        self.optimizer: NamedOptimizer = build_optimizer(
            OptimizerConfig.model_validate({"name": optimizer, "lr": 0.01}), self.trained.module
        )
        self.folder, group = folder, self.engine.save_group()
        self.store = group and CheckpointStore(
            folder,
            keep_last=2,
            config_yaml="run: {}\n",
            write_model=self.trained.write,
            resumed_from=step_folder(folder, 0),
            group=group,
            split=self.trained.split,
        )
        self.step = 0

    def train(self, steps: int) -> list[float]:
        """The losses of some steps, in each of which all ranks share four rows."""
        losses = []
        for _ in range(steps):
            batch, size = random_batch(VOCAB, batch_size=4, seed=self.step), 4 // self.engine.world_size
            mine = slice(self.engine.rank * size, (self.engine.rank + 1) * size)
            rows = {name: tensor[mine] for name, tensor in batch.items()}  # type: ignore[index]
            num_tokens = agree([rows], engine=self.engine, stop_requested=False).num_tokens  # type: ignore[list-item]
            loss_sum = compute_gradients(self.model, [rows], engine=self.engine, num_tokens=num_tokens)  # type: ignore[list-item]
            losses.append(loss_sum.item())
            update(self.optimizer, grad_norm=gradient_norm(self.optimizer), max_grad_norm=1.0)
            self.optimizer.zero_grad()
            self.step += 1
        return losses

    def save(self) -> None:
        """Begin to save the state as it is."""
        if self.store:
            tensors = self.trained.tensors()
            state = {"step": self.step}
            self.store.save(
                Snapshot(step=self.step, state=state, model=tensors, optimizer=self.optimizer.state_tensors())
            )

    def load(self) -> None:
        """Go on from the newest good checkpoint."""
        found = newest_good(self.folder)
        assert found is not None
        self.trained.read(found[0] / "model")
        self.optimizer.load_state_tensors(load_optimizer(found[0]))
        self.step = load_state(found[0])["step"]

    def tensors(self) -> dict[str, Tensor]:
        """All weights and all optimizer state as full tensors."""
        named = {**self.trained.tensors(), **self.optimizer.state_tensors()}
        return {name: full_tensor(tensor.detach()).clone() for name, tensor in named.items()}

    def close(self) -> None:
        """Wait for the save under way."""
        if self.store:
            self.store.close()


def go_on(folder: Path, strategy: str, steps: int, options: Mapping[str, Any]) -> tuple[list[float], Any, Any]:
    """Load what is there, train, save. Return the losses, and all tensors after loading and after training."""
    run = Run(folder, strategy=strategy, **options)
    if folder.exists() and any(folder.glob("step_*")):
        run.load()
    before = run.tensors()
    losses = run.train(steps)
    run.save()
    run.close()
    return losses, before, run.tensors()


def save_while_training(folder: Path) -> dict[str, Tensor]:
    """Train on while a save is being written. Return all tensors as they were when it began."""
    run = Run(folder, strategy="fsdp")
    run.train(1)
    then = run.tensors()
    run.save()
    run.train(5)
    run.close()
    return then


def save_with_nan_on_rank_1(folder: Path) -> str:
    """Save while one rank holds NaN. Return the message that this rank got."""
    run = Run(folder, strategy="fsdp")
    run.train(1)
    run.save()
    run.train(1)
    if run.engine.rank == 1:
        state = run.optimizer.state_tensors()["blocks.0.feed_forward.up_proj.weight/exp_avg"]
        state.to_local()[0] = torch.nan  # type: ignore[attr-defined]
    run.save()
    with pytest.raises(CheckpointError) as caught:
        run.close()
    return str(caught.value)


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def tensors_in(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, read by one process."""
    decoder, _ = read_model_folder(checkpoint / "model")
    return decoder.state_dict() | {name: stored.full() for name, stored in load_optimizer(checkpoint).items()}


@pytest.mark.parametrize("options", [{}, GPT2, {"tie_embeddings": False}, {"optimizer": "muon"}], ids=str)
def test_every_rank_writes_its_slices_and_one_process_reads_all(
    two_ranks: RankPool, tmp_path: Path, options: dict[str, Any]
) -> None:
    results = two_ranks.run(go_on, tmp_path / "c", "fsdp", 2, options)
    checkpoint = tmp_path / "c" / "latest"
    verify(checkpoint)
    assert equal(tensors_in(checkpoint), results[0][2])
    names = sorted(path.name for path in checkpoint.glob("*/*.safetensors"))
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "rank_00000_shard_00000.safetensors",
        "rank_00001_shard_00000.safetensors",
    ]
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("model/*.safetensors"))]
    assert max(sizes) < 0.75 * sum(sizes), "the ranks share the work"


@pytest.mark.parametrize("options", [DECODER, GPT2], ids=["llama", "gpt2"])
def test_transformers_reads_what_several_ranks_wrote(
    two_ranks: RankPool, tmp_path: Path, options: dict[str, Any]
) -> None:
    two_ranks.run(go_on, tmp_path / "c", "fsdp", 1, options)
    folder = tmp_path / "c" / "latest" / "model"
    decoder, _ = read_model_folder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(12)[None] % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder.eval().logits(ids), atol=1e-5, rtol=0)


def test_a_resume_with_the_same_number_of_ranks_is_bit_identical(two_ranks: RankPool, tmp_path: Path) -> None:
    straight = two_ranks.run(go_on, tmp_path / "straight", "fsdp", 6, {})
    first = two_ranks.run(go_on, tmp_path / "c", "fsdp", 3, {})
    second = two_ranks.run(go_on, tmp_path / "c", "fsdp", 3, {})
    for rank in range(2):
        assert first[rank][0] + second[rank][0] == straight[rank][0]
        assert equal(second[rank][2], straight[rank][2])


def test_another_number_of_ranks_and_another_strategy_keep_every_bit(two_ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    last = two_ranks.run(go_on, folder, "fsdp", 2, {})[0][2]
    for strategy in ("ddp", "fsdp"):
        _, before, after = two_ranks.run(go_on, folder, strategy, 2, {})[0]
        assert equal(before, last)
        _, before, last = go_on(folder, "single", 2, {})
        assert equal(before, after)


@pytest.mark.slow
def test_four_two_one_four_ranks_keep_every_bit(two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    losses, _, last = four_ranks.run(go_on, folder, "fsdp", 2, {})[0]
    for ranks, strategy in ((two_ranks, "fsdp"), (None, "single"), (four_ranks, "fsdp"), (four_ranks, "ddp")):
        results = ranks.run(go_on, folder, strategy, 2, {}) if ranks else [go_on(folder, strategy, 2, {})]
        more, before, after = results[0]
        assert equal(before, last)
        losses, last = losses + more, after
    straight, _, _ = go_on(tmp_path / "straight", "single", 10, {})
    assert losses == pytest.approx(straight, rel=1e-5)


@pytest.mark.slow
def test_one_of_two_replicas_writes_the_slices_and_a_resume_is_bit_identical(
    four_ranks: RankPool, tmp_path: Path
) -> None:
    replicas = {"replicate": 2}
    straight = four_ranks.run(go_on, tmp_path / "straight", "fsdp", 4, replicas)
    first = four_ranks.run(go_on, tmp_path / "c", "fsdp", 2, replicas)
    checkpoint = tmp_path / "c" / "latest"
    verify(checkpoint)
    assert equal(tensors_in(checkpoint), first[0][2])
    assert sorted(path.name for path in checkpoint.glob("optimizer/rank_*")) == [
        "rank_00000_shard_00000.safetensors",
        "rank_00001_shard_00000.safetensors",
    ]
    second = four_ranks.run(go_on, tmp_path / "c", "fsdp", 2, replicas)
    for rank in range(4):
        assert first[rank][0] + second[rank][0] == straight[rank][0]
        assert equal(second[rank][2], straight[rank][2])


def test_a_save_holds_the_values_at_its_beginning(two_ranks: RankPool, tmp_path: Path) -> None:
    then = two_ranks.run(save_while_training, tmp_path / "c")[0]
    assert equal(tensors_in(tmp_path / "c" / "step_000001"), then)


def test_nan_on_one_rank_fails_the_save_on_all(two_ranks: RankPool, tmp_path: Path) -> None:
    told = two_ranks.run(save_with_nan_on_rank_1, tmp_path / "c")
    for message in told:
        assert "optimizer state blocks.0.feed_forward.up_proj.weight/exp_avg holds NaN" in message
    assert "rank 1" in told[0]
    assert [path.name for path in sorted((tmp_path / "c").iterdir())] == ["latest", "step_000001"]
    verify(tmp_path / "c" / "latest")


def fail_at(folder: Path, point: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"raise@{point}:ENOSPC:rank=1:step=2")
        run = Run(folder, strategy="fsdp")
        run.train(1)
        run.save()
        run.train(1)
        run.save()
        run.close()


def test_a_full_disk_on_one_rank_leaves_the_checkpoint_before(two_ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"No space left on device.*lower trainer\.keep_last"):
        two_ranks.run(fail_at, tmp_path / "c", "optimizer-written")
    assert [path.name for path in sorted((tmp_path / "c").iterdir())] == ["latest", "step_000001"]


@pytest.fixture(scope="module")
def written(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for _ in range(2):
        two_ranks.run(go_on, folder, "fsdp", 1, {})
    return folder


@pytest.mark.parametrize("file", ["model/model-00002-of-00002", "optimizer/rank_00001_shard_00000"])
@pytest.mark.parametrize("damage", ["missing", "torn", "bit"])
def test_after_damage_to_a_file_of_one_rank_the_checkpoint_before_is_used(
    written: Path, tmp_path: Path, file: str, damage: str
) -> None:
    shutil.copytree(written, tmp_path / "c", symlinks=True)
    path = tmp_path / "c" / "step_000002" / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(content[:-4])
    else:
        content[-3] ^= 1
        path.write_bytes(content)
    found = newest_good(tmp_path / "c")
    assert found is not None
    assert found[0].name == "step_000001"
    assert file in found[1][0]


def test_slices_that_do_not_make_up_a_tensor_are_rejected(written: Path, tmp_path: Path) -> None:
    """A manifest that is in order by itself, of a save that has lost a rank's slice."""
    copy = tmp_path / "step_000002"
    shutil.copytree(written / "step_000002", copy)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    name = "optimizer/rank_00001_shard_00000.safetensors"
    assert "token_embedding.weight/exp_avg" in load_file(copy / name)
    del manifest["files"][name]
    (copy / name).unlink()
    (copy / "MANIFEST.json").write_text(sealed(manifest))
    with pytest.raises(
        CheckpointError, match=r"the slices of .*/exp_avg do not make up the tensor: \d+ elements of \d+"
    ):
        verify(copy)
