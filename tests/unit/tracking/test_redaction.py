from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llmtrain.config.sections.schema import Config
from llmtrain.tracking.redaction import is_secret_name, redact

# Put together here, so that no scanner of repositories takes them for real ones.
HF = "hf_" + "aB3" * 11
OPENAI = "sk-" + "proj-a1b2c3d4e5f6g7h8"
GITHUB = "ghp_" + "x9" * 18
AWS = "AKIA" + "ABCDEFGH12345678"
JWT = "eyJ" + "hbGciOiJI." + "eyJzdWIiOiIx." + "c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("argv", "written"),
    [
        (["train", "c.yaml", "--token", "abc"], ["train", "c.yaml", "--token", "***"]),
        (["--hub-token=abc", "--seed", "1"], ["--hub-token=***", "--seed", "1"]),
        (["tracking.wandb.api_key=a,b&c d"], ["tracking.wandb.api_key=***"]),
        (["--db-password", "-starts-with-a-dash"], ["--db-password", "***"]),
        (["data.train=s3://bucket/x", "trainer.max_tokens=5"], ["data.train=s3://bucket/x", "trainer.max_tokens=5"]),
        (["data.tokenizer=gpt2", "--resume", "latest"], ["data.tokenizer=gpt2", "--resume", "latest"]),
        ([f"run.notes={HF}", OPENAI], ["run.notes=***", "***"]),
        (["data.train=https://me:pa@ss@host/x?sig=abc&n=1"], ["data.train=https://***@host/x?sig=***&n=1"]),
    ],
)
def test_argv_is_written_without_secrets(argv: list[str], written: list[str]) -> None:
    assert redact(argv) == written


@pytest.mark.parametrize("secret", [HF, OPENAI, GITHUB, AWS, JWT])
def test_tokens_of_known_forms_are_redacted_anywhere(secret: str) -> None:
    assert redact(f"fetching with {secret}, then on") == "fetching with ***, then on"
    assert redact({"notes": [f"x={secret}"]}) == {"notes": ["x=***"]}


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://user:pw@example.com/x", "https://***@example.com/x"),
        ("https://abcdef@example.com/x", "https://***@example.com/x"),
        ("postgresql://u:p@db:5432/x", "postgresql://***@db:5432/x"),
        ("ssh://git@example.com/x", "ssh://git@example.com/x"),
        ("s3://bucket/key@v1 lakefs://repo/main@x", "s3://bucket/key@v1 lakefs://repo/main@x"),
        ("https://h/x?X-Amz-Signature=1f&part=2", "https://h/x?X-Amz-Signature=***&part=2"),
        ("curl -H 'Authorization: Bearer abcdef123'", "curl -H 'Authorization: *** ***'"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: *** ***"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("WANDB_API_KEY=abc python -m x --token abc -v", "WANDB_API_KEY=*** python -m x --token *** -v"),
        ("password: hunter2", "password: ***"),
        ("the end token: 0, eos_token=<|end|>", "the end token: 0, eos_token=<|end|>"),
        ("6.1k tok/s, tokens: 5, tokenizer: bpe", "6.1k tok/s, tokens: 5, tokenizer: bpe"),
    ],
)
def test_text_is_redacted_and_otherwise_unchanged(text: str, written: str) -> None:
    assert redact(text) == written


def test_names_of_secrets_are_recognized() -> None:
    names = (
        "token HF_TOKEN hubToken api_key AWS_SECRET_ACCESS_KEY key password credentials tracking.wandb.api_key apikey"
    )
    names += " --auth-token db_pwd WANDB_API_KEY_2 sas_token"

    assert [name for name in names.split() if not is_secret_name(name)] == []


def test_names_that_only_sound_like_secrets_are_not_secret() -> None:
    names = (
        "tokenizer tokens max_tokens eos_token pad_token_id tokens_per_sec PWD num_key_value_heads text_key keyboard"
    )
    names += " author secretary tracking.api_key.name"

    assert [name for name in names.split() if is_secret_name(name)] == []


def test_no_key_of_the_config_is_taken_for_a_secret() -> None:
    def names(section: type[BaseModel]) -> set[str]:
        found = set(section.model_json_schema()["properties"])
        for definition in section.model_json_schema().get("$defs", {}).values():
            found |= set(definition.get("properties", {}))
        return found

    assert len(names(Config)) > 80
    assert [name for name in sorted(names(Config)) if is_secret_name(name)] == []


def test_under_a_secret_name_all_values_are_redacted_except_none_true_and_false() -> None:
    config = {"hub": {"token": None, "password": 1234, "credentials": {"user": "u"}, "use_auth": True, "x": (1, 2.5)}}

    assert redact(config) == {
        "hub": {"token": None, "password": "***", "credentials": "***", "use_auth": True, "x": (1, 2.5)}
    }


SECRET = "Zq7-unique-Zq7"
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))
names = st.sampled_from(["a", "tokenizer", "lr", "path"])
planted = st.sampled_from(
    [
        {"api_key": SECRET},
        {"x": f"--token {SECRET}"},
        ["--hf-token", SECRET],
        f"https://u:{SECRET}@host/",
        f"a.secret='{SECRET}'",
        {"credentials": {"deep": [SECRET]}},
        {"h": f"Authorization: Bearer {SECRET}"},
    ]
)
documents = st.recursive(
    st.one_of(plain, planted),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


@given(documents)
def test_no_secret_survives_at_any_depth_and_redacting_twice_changes_nothing(document: Any) -> None:
    written = redact(document)

    assert SECRET not in repr(written)
    assert redact(written) == written


@pytest.mark.parametrize("piece", ["a", "a_", "a.", "a-", "a=", "://", "--a ", "a: ", "hf_", "sk-", "a@"])
def test_redacting_a_long_line_takes_linear_time(piece: str) -> None:
    began = time.thread_time()
    redact(piece * 5_000)
    assert time.thread_time() - began < 0.5
