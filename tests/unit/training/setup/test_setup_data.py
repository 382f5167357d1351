"""The config as a run records it."""

from __future__ import annotations

from pathlib import Path

from llmtrain.config.loading.load import load_config, to_yaml
from llmtrain.training.setup.data import Folders, as_recorded

TOKEN = "hf_" + "abcDEF123456" * 3


def test_a_token_in_free_text_is_recorded_nowhere(tmp_path: Path) -> None:
    keys = [
        *(f"run.name=try {TOKEN}", f"run.notes=with token={TOKEN} again", f"run.tags=[{TOKEN}, plain, 'key {TOKEN}']"),
        *("publish.license=mit", f"publish.description=made with {TOKEN}", f"publish.tags=[{TOKEN}]"),
        f"publish.limits={TOKEN}",
    ]
    config = as_recorded(load_config("quickstart", keys).config, Folders(None, None))
    assert TOKEN not in to_yaml(config)
    assert config.run.notes == "with token=*** again"
    assert config.run.tags == ["***", "plain", "key ***"]
    assert config.publish is not None
    assert config.publish.description == "made with ***"
