"""Loading: files, overrides, interpolation, and the way back to YAML."""

from __future__ import annotations

import json
import sysconfig
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.data import SyntheticConfig, TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.interpolate import escape, interpolate
from llmtrain.config.load import json_schema, load_config, shipped_configs, to_yaml
from llmtrain.config.schema import Config
from llmtrain.config.tree import Tree

SHIPPED = sorted(file.name for file in (resources.files("llmtrain") / "configs").iterdir())
MINIMAL = "data: {name: tokens, train: shards}\n"


def load(folder: Path, text: str, *overrides: str, name: str = "c.yaml") -> Config:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return load_config(str(file), overrides).config


def refusal(folder: Path, text: str, *overrides: str, name: str = "c.yaml") -> str:
    """The message, with the folder taken out."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides, name=name)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stem = name.removesuffix(".yaml")
    loaded = load_config(stem)
    assert loaded.source == stem
    assert loaded.as_written.startswith("#")
    assert shipped_configs()[stem] != ""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_becomes_random_tokens_by_one_word(name: str) -> None:
    loaded = load_config(name.removesuffix(".yaml"), ["data.name=synthetic"])
    assert isinstance(loaded.config.data, SyntheticConfig)


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL + "optimizer: {lr: 1e-3, eps: 1E-6}\ntrainer: {max_steps: 010, max_grad_norm: null}\n"
        "prepare: {input: x, output: y, shard_size: 50_000}\nrun: {name: no, notes: 2024-01-01}\n",
    )
    assert config.optimizer.lr == 0.001
    assert config.optimizer.eps == 1e-6
    assert config.trainer.max_steps == 10
    assert config.trainer.max_grad_norm is None
    assert config.prepare is not None
    assert config.prepare.shard_size == 50_000
    assert config.run.name == "no"
    assert config.run.notes == "2024-01-01"


def test_text_takes_unquoted_numbers_as_they_are_written(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL + "run: {name: 1.10, tags: [2024, true]}\ntrainer: {precision: 32}\n", "output.run_id=007"
    )
    assert config.run.name == "1.10"
    assert config.run.tags == ["2024", "true"]
    assert config.trainer.precision == "32"
    assert config.output.run_id == "007"


def test_json_loads_like_yaml_tabs_escapes_and_all(tmp_path: Path) -> None:
    text = '{\n\t"data":{"name": "tokens",\t"train": ["a", "b\\/c"]},\n\t"run": {"name": "\\ud83d\\ude00", "seed":1e3}}'
    config = load(tmp_path, text, name="c.json")
    assert isinstance(config.data, TokensConfig)
    assert config.data.train == ["a", "b/c"]
    assert config.run.name == "😀"
    assert config.run.seed == 1000


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + MINIMAL).data.name == "tokens"


def test_aliases_work(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {name: tokens, train: &shards [a, b], val: *shards}\n")
    assert isinstance(config.data, TokensConfig)
    assert config.data.val == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml:1:1: the file is empty"),
        ("# nothing\n", "c.yaml:1:1: the file is empty"),
        (
            "\n- a\n",
            "c.yaml:2:1: the top of a config holds sections (data:, model:, trainer:, …), but here it is a list",
        ),
        ("just text", "c.yaml:1:1: the top of a config holds sections"),
        ("data: [1\n", "c.yaml:2:1: not valid YAML: while parsing a flow sequence"),
        ("run:\n  name: b: c\n", "c.yaml:2:10: not valid YAML: mapping values are not allowed here"),
        ("run:\n\tname: x\n", "indent with spaces, not tabs"),
        ("run: {}\n---\nrun: {}\n", "c.yaml:2:1: not valid YAML: expected a single document"),
        ("run:\n  name: \x00", "c.yaml:2:9: a character that YAML does not allow"),
        ("run: &x [*x]\n", "c.yaml:1: run[0]: an alias that contains itself"),
        ("run:\n  seed: 1\n  name: x\n  seed: 2\n", "c.yaml:4: run.seed: given twice; first at c.yaml:2"),
        ("run: {name: !!python/name:os.system x}\n", "c.yaml:1: run.name: the tag"),
        ("? [a, b]\n: 1\n", "c.yaml:1: a key must be plain text"),
        ("run: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_config_gets_one_message_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"run":\n  {"seed": }}', "c.json:2:12: not valid JSON: Expecting value"),
        ('{"run":\n  {"seed": 1,\n   "seed": 2}}', "c.json:3: run.seed: given twice; first at c.json:2"),
        (
            '{"data":\n\t{"name": "tokens",\n\t"trian": "x"}}',
            "c.json:3: data.trian: unknown key; did you mean data.train?",
        ),
        ("", "c.json:1:1: the file is empty"),
        ("[]", "c.json:1:1: the top of a config holds sections"),
    ],
)
def test_json_has_lines_too(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text, name="c.json")


def test_a_file_that_is_not_there_names_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "trainer.max_steps=5",
        "trainer.max_steps=7",
        "optimizer.lr=1e-3",
        "optimizer.betas=[0.8, 0.9]",
        "trainer.compile=true",
        "trainer.max_grad_norm=null",
        "prepare.output=a=b",
        "prepare.input=texts",
        "scheduler={name: wsd, decay_ratio: 0.5}",
        "run.notes=",
        "data.train=data/*.parquet",
    )
    assert config.trainer.max_steps == 7
    assert config.optimizer.lr == 0.001
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.trainer.compile is True
    assert config.trainer.max_grad_norm is None
    assert config.prepare is not None
    assert config.prepare.output == "a=b"
    assert config.scheduler.decay_ratio == 0.5
    assert config.run.notes is None
    assert isinstance(config.data, TokensConfig)
    assert config.data.train == "data/*.parquet"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", 'override "foo": expected key=value, such as trainer.max_steps=100'),
        ("=x", 'override "=x": expected key=value'),
        ("run..name=x", 'override "run..name=x": expected key=value'),
        ("data.train[0]=x", "a list is replaced whole: key=[a, b]"),
        (
            "data.train.x=1",
            'override "data.train.x=1": data.train is not a section; it was given as a value at c.yaml:1',
        ),
        ("data.train=*.parquet", "'data.train=\"*.parquet\"'"),
        (
            "trainer.max_step=3",
            'override "trainer.max_step=3": trainer.max_step: unknown key; did you mean trainer.max_steps?',
        ),
        ("data.seq_len=3.5", 'override "data.seq_len=3.5": data.seq_len: expected an integer (got 3.5)'),
        ("run.seed=true", 'override "run.seed=true": run.seed: expected a number (got true)'),
        ("prepare.output=x", 'override "prepare.output=x": prepare.input: missing'),
        ("data.vocab_size=9", "data.vocab_size: a key of data.name: synthetic, but data.name is tokens"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, MINIMAL, override)


def test_another_data_source_keeps_only_the_keys_that_it_has(tmp_path: Path) -> None:
    text = "data: {name: tokens, train: a, val: b, seq_len: 64, num_workers: 2, mask_documents: false}\n"
    data = load(tmp_path, text, "data.name=synthetic", "data.num_items=8").data
    assert data == SyntheticConfig(seq_len=64, num_workers=2, num_items=8)


def test_keys_of_the_other_data_source_are_faults_where_the_file_or_an_override_asks_for_them(tmp_path: Path) -> None:
    text = "data:\n  name: synthetic\n  train: a\n"
    assert "c.yaml:3: data.train: a key of data.name: tokens" in refusal(tmp_path, text)
    assert "c.yaml:3: data.train" in refusal(tmp_path, text, "data.name=synthetic")
    assert 'override "data.train=x": data.train' in refusal(tmp_path, MINIMAL, "data.train=x", "data.name=synthetic")


def test_environment_variables_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "1e-3")
    monkeypatch.setenv("WHO", "007")
    monkeypatch.setenv("LITERAL", "${oc.env:LR}")
    monkeypatch.delenv("UNSET", raising=False)
    config = load(
        tmp_path,
        "data: {name: tokens, train: 'a/${oc.env:WHO}/b'}\n"
        "optimizer:\n  lr: ${oc.env:LR}\n  eps: ${oc.env:UNSET, 1e-7}\n"
        "run:\n  name: ${oc.env:WHO}\n  notes: ${oc.env:LITERAL}\n  tags: ['$${oc.env:LR}', \"${oc.env:UNSET,}\"]\n",
        "prepare={input: '${sysconfig:stdlib}', output: x}",
    )
    assert isinstance(config.data, TokensConfig)
    assert config.data.train == "a/007/b"
    assert (config.optimizer.lr, config.optimizer.eps) == (0.001, 1e-7)
    assert config.run.name == "007"
    assert config.run.notes == "${oc.env:LR}"
    assert config.run.tags == ["${oc.env:LR}", ""]
    assert config.prepare is not None
    assert config.prepare.input == sysconfig.get_path("stdlib")
    assert load(tmp_path, to_yaml(config)) == config


def test_an_interpolation_that_is_overridden_is_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    config = load(tmp_path, "data:\n  name: tokens\n  train: ${oc.env:UNSET}\n", "data.train=here")
    assert isinstance(config.data, TokensConfig)
    assert config.data.train == "here"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.env:UNSET}", "c.yaml:3: run.name: the environment variable UNSET is not set; set it, or write"),
        ("${oc.decode:x}", "c.yaml:3: run.name: ${oc.decode:x}: there is no resolver 'oc.decode'"),
        ("${data.train}", "c.yaml:3: run.name: ${data.train} is not known"),
        ("${sysconfig:lib}", "c.yaml:3: run.name: ${sysconfig:lib}: sysconfig knows stdlib"),
        ("a${oc.env:X", "c.yaml:3: run.name: ${ without its }"),
    ],
)
def test_a_bad_interpolation_has_its_line(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    assert message in refusal(tmp_path, f"{MINIMAL}run:\n  name: '{value}'\n")


@given(st.text())
def test_escaped_text_comes_back_as_it_was(text: str) -> None:
    tree = Tree(label="c.yaml", values={"key": escape(text)})
    interpolate(tree)
    assert tree.values == {"key": text}


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@given(name=TEXT, notes=st.none() | TEXT, tags=st.lists(TEXT, max_size=3), lr=st.floats(1e-12, 0.999))
def test_yaml_comes_back_as_the_same_config(
    name: str, notes: str | None, tags: list[str], lr: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Config.model_validate(
        {
            "data": {"name": "tokens", "train": [{"path": name, "weight": lr}]},
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


def test_json_schema_describes_keys_and_refuses_others() -> None:
    schema = json.loads(json.dumps(json_schema()))
    trainer = schema["$defs"]["TrainerConfig"]
    assert trainer["additionalProperties"] is False
    assert trainer["properties"]["keep_last"]["description"].startswith("Newest checkpoints")
    assert schema["properties"]["data"]["discriminator"]["propertyName"] == "name"


def test_a_config_cannot_be_changed_once_loaded() -> None:
    config = load_config("quickstart").config
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1
