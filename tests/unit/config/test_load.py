"""Shipped configs and files load; a config is written as YAML that loads again."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.loading.load import json_schema, load_config, plain_config, shipped_configs, to_yaml
from llmtrain.config.sections.data import SyntheticConfig
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from tests.support.configs import MINIMAL

SHIPPED = sorted(file.name for file in (resources.files("llmtrain") / "configs").iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stem = name.removesuffix(".yaml")
    loaded = load_config(stem)
    assert loaded.source == stem
    assert loaded.as_written.startswith("#")
    assert shipped_configs()[stem] != ""


@pytest.mark.parametrize("name", SHIPPED)
def test_one_override_makes_any_shipped_config_train_on_random_tokens(name: str) -> None:
    loaded = load_config(name.removesuffix(".yaml"), ["data.name=synthetic"])
    assert isinstance(loaded.config.data, SyntheticConfig)


def test_a_missing_file_gets_the_nearest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medium.yaml").write_text(MINIMAL)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for ref, hint in [
        ("quickstrat", "did you mean quickstart?"),
        ("quickstart.yaml", "did you mean quickstart?"),
        ("medum.yaml", "did you mean medium.yaml?"),
        ("nowhere/at/all.yaml", "no such file"),
        ("binary.yaml", "not a text file in UTF-8"),
        (str(tmp_path), "a folder, where a config file was expected"),
    ]:
        with pytest.raises(ConfigError, match=hint.replace("?", r"\?")):
            load_config(ref)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)


@given(name=TEXT, notes=st.none() | TEXT, tags=st.lists(TEXT, max_size=3), lr=st.floats(1e-12, 0.999))
def test_yaml_comes_back_as_the_same_config(
    name: str, notes: str | None, tags: list[str], lr: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Config.model_validate(
        {
            "data": {"name": "tokens", "train": [{"path": name.replace("\0", "x"), "weight": lr}]},
            "run": {"name": name, "notes": notes, "tags": tags},
            "optimizer": {"lr": lr, "betas": [0.5, lr]},
        }
    )
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)).config == config


def test_printed_config_has_every_key_in_the_order_of_the_schema() -> None:
    text = to_yaml(load_config("quickstart").config)
    tops = [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "schema_version"))]
    assert tops == list(Config.model_fields)[1:]
    assert "  max_grad_norm: 1.0\n" in text
    assert "  warmup_steps: null\n" in text


def test_json_schema_describes_keys_and_rejects_others() -> None:
    schema = json.loads(json.dumps(json_schema()))
    trainer = schema["$defs"]["TrainerConfig"]
    assert trainer["additionalProperties"] is False
    assert trainer["properties"]["keep_last"]["description"].startswith("Newest checkpoints")
    variants = [schema["$defs"][one["$ref"].rpartition("/")[2]] for one in schema["properties"]["data"]["oneOf"]]
    assert [variant["properties"]["name"].get("const") for variant in variants[:2]] == ["tokens", "corpus"]


def test_a_config_cannot_be_changed_once_loaded() -> None:
    config = load_config("quickstart").config
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1


def test_an_integer_that_nothing_could_count_to_is_rejected() -> None:
    assert plain_config(["run.seed=9223372036854775807"]).run.seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: expected a number ≤ 1,000,000,000,000,000 \(got 10"):
        plain_config([f"trainer.max_steps={10**30}"])
