"""YAML and JSON become values with lines; text that is neither gets one message with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.sections.data import TokensConfig
from tests.support.configs import MINIMAL, load, message_of


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


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
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
        (
            "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n},' * 9}]\n" for n in range(9)),
            "than 200,000 values",
        ),
        ("run:\n  seed: 1\n  name: x\n  seed: 2\n", "c.yaml:4: run.seed: given twice; first at c.yaml:2"),
        ("run: {name: !!python/name:os.system x}\n", "c.yaml:1: run.name: the tag"),
        ("? [a, b]\n: 1\n", "c.yaml:1: a key must be plain text"),
        ("run: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_text_that_is_not_a_config_gets_one_message_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    assert message in message_of(tmp_path, text)


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
    assert message in message_of(tmp_path, text, name="c.json")
