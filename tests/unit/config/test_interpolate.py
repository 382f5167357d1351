"""Environment variables and folders of Python are filled in where a config names them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.loading.interpolate import escape, interpolate
from llmtrain.config.loading.load import to_yaml
from llmtrain.config.loading.tree import Tree
from llmtrain.config.sections.data import TokensConfig
from tests.support.configs import MINIMAL, load, message_of


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
    assert message in message_of(tmp_path, f"{MINIMAL}run:\n  name: '{value}'\n")


@given(st.text())
def test_escaped_text_comes_back_as_it_was(text: str) -> None:
    tree = Tree(label="c.yaml", values={"key": escape(text)})
    interpolate(tree)
    assert tree.values == {"key": text}
