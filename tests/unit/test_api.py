"""`import llmtrain`: light until a name is asked for; decoders from configs and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llmtrain
from llmtrain.models.folder import read_model_folder
from tests.support.tiny import tiny_config
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_config

HEAVY = ("torch", "numpy", "pydantic", "tokenizers", "pyarrow", "lightning_fabric", "transformers", "rich", "typer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


def run_script(text: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = f"import sys, llmtrain; dir(llmtrain); print(*[name for name in {HEAVY} if name in sys.modules])"
    assert run_script(script) == []


def test_errors_and_configs_need_no_torch() -> None:
    script = "import sys, llmtrain; llmtrain.ConfigError; llmtrain.load_config('quickstart'); llmtrain.DecoderConfig"
    assert run_script(f"{script}; print('torch' in sys.modules, 'pydantic' in sys.modules)") == ["False", "True"]


def test_every_name_is_there_and_documented() -> None:
    for name in llmtrain.__all__:
        value = getattr(llmtrain, name)
        assert name in dir(llmtrain)
        assert name == "__version__" or value.__doc__, name
    assert sorted(llmtrain.__all__) == sorted([*llmtrain._HOME_OF, "__version__"])
    with pytest.raises(AttributeError, match="module 'llmtrain' has no attribute 'trian'"):
        llmtrain.trian  # noqa: B018


def test_a_model_folder_generates_and_tokenises(folder: Path) -> None:
    loaded = llmtrain.load_model(folder, device="cpu")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("def f(x):")) == "def f(x):"
    pieces: list[str] = []
    one = loaded.generate("def f(x):", max_new_tokens=5, on_text=lambda _, piece: pieces.append(piece))
    assert len(one) == 1
    assert one[0].completion == "".join(pieces)
    assert loaded.generate(["def f(x):", "x"], max_new_tokens=5)[0] == one[0]


@pytest.mark.parametrize("kind", ["object", "mapping", "config.json", "yaml"])
def test_a_decoder_comes_from_its_config_and_a_file(kind: str, folder: Path, tmp_path: Path) -> None:
    wanted, _ = read_model_folder(folder)
    section = tiny_config().model_dump(mode="json")
    file = tmp_path / "w.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in wanted.state_dict().items()}, file)
    yaml = write_config(tmp_path / "c.yaml", {"model": section, "data": {"name": "synthetic", "seq_len": 8}})
    config: dict[str, Any] = {
        "object": tiny_config(),
        "mapping": section,
        "config.json": folder / "config.json",
        "yaml": yaml,
    }
    loaded = llmtrain.load_decoder(config[kind], file, tokenizer=folder, device="cpu")
    assert not loaded.model.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.model.logits(ids), wanted.eval().logits(ids))
    assert loaded.generate("x", max_new_tokens=4) == llmtrain.load_model(folder, device="cpu").generate(
        "x", max_new_tokens=4
    )


def test_mistakes_are_config_errors(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with pytest.raises(llmtrain.ConfigError, match="d_modle"):
        llmtrain.load_decoder({"d_modle": 3}, weights)
    with pytest.raises(llmtrain.ConfigError, match="'gpu' is not a device"):
        llmtrain.load_model(folder, device="gpu")
    without = llmtrain.load_decoder(folder / "config.json", weights, device="cpu")
    with pytest.raises(llmtrain.ConfigError, match="no tokenizer"):
        without.generate("x")
    with pytest.raises(TypeError, match="generate has no setting 'max_tokens': it has max_new_tokens"):
        llmtrain.load_model(folder, device="cpu").generate("x", max_tokens=4)  # type: ignore[call-arg]
    with pytest.raises(llmtrain.ConfigError, match="there is no run"):
        llmtrain.load_model("nobody", root_dir=str(folder))
    with pytest.raises(llmtrain.ConfigError, match="no such file"):
        llmtrain.train("nothing.yaml")
