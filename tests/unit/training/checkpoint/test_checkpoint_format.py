"""The format of a checkpoint: what is read is what was written, all damage is named, nothing is a pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import llmtrain
from llmtrain.training.checkpoint import CheckpointError, CheckpointStore, Snapshot, load_optimizer, load_state, verify
from llmtrain.training.checkpoint import format as checkpoint_format

FILES = [
    "MANIFEST.json",
    "config.yaml",
    "model/config.json",
    "model/model.safetensors",
    "optimizer/shard_00000.safetensors",
    "optimizer/shard_00001.safetensors",
    "state.json",
]


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text("{}\n")


OPTIMIZER = {
    "a/exp_avg": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a/step": torch.tensor(7.0),
    "b/exp_avg": torch.full((30,), 0.5, dtype=torch.bfloat16),
    "b/nothing": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of two optimizer shards, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "MAX_SHARD_BYTES", 64)
        store = CheckpointStore(folder, keep_last=1, config_yaml="run: {name: ä}\n", write_model=write_model)
        model = {"w": torch.arange(12, dtype=torch.float32).reshape(3, 4), "b": torch.ones(4, dtype=torch.bfloat16)}
        store.save(Snapshot(step=500, state={"step": 500, "loss": 1.25, "name": "ä"}, model=model, optimizer=OPTIMIZER))
        store.close()
    return folder / "step_000500"


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_holds_exactly_these_files_and_verifies(checkpoint: Path) -> None:
    assert files_of(checkpoint) == FILES
    verify(checkpoint)
    verify(checkpoint, content=False)


def test_what_is_read_is_what_was_written(checkpoint: Path) -> None:
    assert load_state(checkpoint) == {"step": 500, "loss": 1.25, "name": "ä"}
    assert (checkpoint / "config.yaml").read_text(encoding="utf-8") == "run: {name: ä}\n"
    read = {name: tensor.full() for name, tensor in load_optimizer(checkpoint).items()}
    assert read.keys() == OPTIMIZER.keys()
    for name, tensor in OPTIMIZER.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_loaded_optimizer_state_outlives_its_file(checkpoint: Path, tmp_path: Path) -> None:
    """What is read must be a copy: memory that maps a file is lost with it (a bus error, once it is truncated)."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    read = {name: tensor.full() for name, tensor in load_optimizer(copy).items()}
    for path in (copy / "optimizer").iterdir():
        path.write_bytes(b"")
    assert all(torch.equal(read[name], tensor) for name, tensor in OPTIMIZER.items())


def test_the_manifest_lists_every_file_and_every_tensor(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["step"] == 500
    assert sorted(manifest["files"]) == FILES[1:]
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["files"]["model/model.safetensors"]["tensors"] == {
        "b": {"dtype": "BF16", "shape": [4]},
        "w": {"dtype": "F32", "shape": [3, 4]},
    }
    shards = [manifest["files"][f"optimizer/shard_0000{n}.safetensors"]["tensors"] for n in (0, 1)]
    assert [sorted(shard) for shard in shards] == [["a/exp_avg", "a/step"], ["b/exp_avg", "b/nothing"]]


def test_all_files_have_the_mode_that_the_umask_gives(checkpoint: Path) -> None:
    modes = {name: (checkpoint / name).stat().st_mode for name in FILES}
    assert set(modes.values()) == {(checkpoint / "config.yaml").stat().st_mode}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "longer"])
def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy = tmp_path / "step_000500"
    shutil.copytree(checkpoint, copy)
    path = copy / name
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "longer": content + b"\0"}[damage])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        verify(copy)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        verify(copy, content=False)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_detected_and_its_file_named(checkpoint: Path, name: str, where: float, bit: int) -> None:
    content = (checkpoint / name).read_bytes()
    flipped = bytearray(content)
    flipped[int(where * len(content))] ^= 1 << bit
    try:
        (checkpoint / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            verify(checkpoint)
    finally:
        (checkpoint / name).write_bytes(content)
    verify(checkpoint)


def test_an_extra_file_is_named_and_hidden_files_are_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_000500"
    shutil.copytree(checkpoint, copy)
    (copy / "model" / ".DS_Store").write_text("")
    verify(copy)
    (copy / "optimizer" / "shard_00002.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"optimizer/shard_00002\.safetensors is extra"):
        verify(copy)


def test_a_tensor_of_the_manifest_that_no_file_has_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """A shard that was written incompletely and hashed afterwards has a size and a hash that fit."""
    copy = tmp_path / "step_000500"
    shutil.copytree(checkpoint, copy)
    shard = copy / "optimizer" / "shard_00001.safetensors"
    save_file({"b/exp_avg": OPTIMIZER["b/exp_avg"]}, shard)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    entry = manifest["files"]["optimizer/shard_00001.safetensors"]
    entry |= {"size": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    (copy / "MANIFEST.json").write_text(checkpoint_format.sealed(manifest))
    with pytest.raises(CheckpointError, match=r"shard_00001\.safetensors: tensor b/nothing is None instead of"):
        verify(copy)


def test_the_error_for_a_newer_format_names_the_version_that_wrote_it(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_000500"
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    manifest |= {"format_version": 3, "llmtrain_version": "9.0"}
    (copy / "MANIFEST.json").write_text(checkpoint_format.sealed(manifest))
    with pytest.raises(CheckpointError, match=r"format version 3, .* reads up to 2: use the newer llmtrain .*9\.0"):
        verify(copy)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step_000001 is no checkpoint folder"):
        verify(tmp_path / "step_000001")


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoint: Path) -> None:
    """Every file is text, or a length and text and then bare numbers."""
    for name in FILES:
        content = (checkpoint / name).read_bytes()
        if name.endswith(".safetensors"):
            length = int.from_bytes(content[:8], "little")
            assert json.loads(content[8 : 8 + length]), name
        else:
            assert not set(content) & set(range(9)), name  # control characters
        assert not zipfile.is_zipfile(checkpoint / name), name  # what torch.save writes


def test_the_checkpoint_code_does_not_use_pickle() -> None:
    package = Path(llmtrain.__file__).parent
    sources = [
        *package.glob("training/checkpoint/*.py"),
        package / "models/safetensors_header.py",
        package / "faults.py",
    ]
    assert len(sources) == 8
    for source in sources:
        code = source.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal)", code, re.M), source
        assert not re.search(r"torch\.(save|load)\(|weights_only|allow_pickle", code), source
