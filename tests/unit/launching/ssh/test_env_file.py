"""A file of variables is read as `source .env` reads it, and a line that cannot be read is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.env_file import read_env_file


def test_lines_may_have_export_quotes_and_comments(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# tokens\n\nexport HF_TOKEN=\"hf_x\"\nWANDB_API_KEY=a#b=c  # mine\nHF_HOME='~/it s'\n  export  EMPTY=\n"
        'QUOTED="say \\"x\\" $5 \\n"\r\nSPACED = two words \n'
    )
    assert read_env_file(str(tmp_path / ".env")) == {
        "HF_TOKEN": "hf_x",
        "WANDB_API_KEY": "a#b=c",
        "HF_HOME": "~/it s",
        "EMPTY": "",
        "QUOTED": 'say "x" $5 \\n',
        "SPACED": "two words",
    }


@pytest.mark.parametrize("line", ["HF_TOKEN", "1X=secret", "A='secret", 'A="secret" b', "A-B=secret", "A='x'y"])
def test_a_line_that_sets_nothing_is_named_without_its_value(tmp_path: Path, line: str) -> None:
    (tmp_path / "env").write_text(f"X=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"env:2: this line sets no variable") as caught:
        read_env_file(str(tmp_path / "env"))
    assert "secret" not in str(caught.value)


def test_a_missing_env_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the env file .* cannot be read: No such file"):
        read_env_file(str(tmp_path / "none"))
