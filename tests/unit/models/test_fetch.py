"""Where models come from, and what is said when one cannot be had. Nothing here touches the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmtrain.errors import ConfigError, RunError
from llmtrain.models.fetch import fetch_model, fetch_tokenizer, missing_files, use_older_names


class Response:
    """What huggingface_hub's errors want to know of an answer."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code
        self.headers: dict[str, str] = {}
        self.request = None


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The Hub is there, and answers like that."""

    def model_info(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def http_error(kind: type[HfHubHTTPError], status_code: int) -> HfHubHTTPError:
    return kind("text of the library", response=Response(status_code))  # type: ignore[arg-type]


def fetch(path: str, **changes: Any) -> Path:
    return fetch_model(path, **{"revision": None, "local_files_only": False, **changes})


@pytest.mark.parametrize(
    ("kind", "status_code", "message"),
    [
        (GatedRepoError, 403, r"is gated \(403\): accept its licence at huggingface.co/owner/name.*HF_TOKEN"),
        (GatedRepoError, 401, r"is gated \(401\): accept its licence"),
        (HfHubHTTPError, 403, r"is gated \(403\): accept its licence"),
        (RepositoryNotFoundError, 401, r"not on the Hub, or is private or gated \(401\).*HF_TOKEN.*hf auth login"),
        (RepositoryNotFoundError, 404, r"check the name"),
        (RevisionNotFoundError, 404, r"has no revision 'v9'"),
    ],
)
def test_an_inaccessible_model_is_explained_in_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[HfHubHTTPError], status_code: int, message: str
) -> None:
    answer(monkeypatch, http_error(kind, status_code))
    with pytest.raises(ConfigError, match=message) as caught:
        fetch("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_failure_of_the_hub_is_not_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, http_error(HfHubHTTPError, 503))
    with pytest.raises(RunError, match="the Hub answered 503: try again"):
        fetch("owner/name")


def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    transport_error = HfHubHTTPError.__mro__[1]("no route to host")
    for error in (transport_error, ConnectionError("refused"), TimeoutError()):
        answer(monkeypatch, error)
        with pytest.raises(ConfigError, match=r"neither a folder nor in the cache .*Hub cannot be reached"):
            fetch("owner/name")


def test_the_missing_files_of_an_interrupted_download_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> NoReturn:
        raise IncompleteSnapshotError("text of the library", snapshot_path=str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"owner/name: .* lacks model.safetensors"):
        fetch("owner/name", local_files_only=True)
    assert fetch("owner/name", local_files_only=True, weights=False) == tmp_path


@pytest.mark.parametrize("by_variable", [True, False])
def test_offline_no_request_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, by_variable: bool, tmp_path: Path) -> None:
    answer(monkeypatch, AssertionError("the Hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", by_variable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"at revision v1 .*the run is offline: fetch it where there is a network"):
        fetch("owner/name", revision="v1", local_files_only=not by_variable)


def test_transformers_offline_is_offline_too() -> None:
    script = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE)"
    environment = {"TRANSFORMERS_OFFLINE": "1", "HF_HOME": "/somewhere"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "/somewhere/hub"]


def test_a_stored_login_is_used(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored")
    script = (
        "import huggingface_hub\n"
        "from llmtrain.models.fetch import use_older_names\n"
        "use_older_names()\n"
        "print(huggingface_hub.HfApi()._build_hf_headers().get('authorization'))"
    )
    environment = {"HF_HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Bearer hf_stored"


def test_an_adapter_is_rejected_as_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is an adapter: merge it into its base first \(llmtrain merge\)"):
        fetch(str(tmp_path))


def test_a_folder_is_taken_as_it_is_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks config.json, model.safetensors"):
        fetch(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert fetch(str(tmp_path), weights=False) == tmp_path
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"lacks model.safetensors. Weights in pytorch_model.bin are pickles"):
        fetch(str(tmp_path))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / shards["a"]).touch()
    assert missing_files(tmp_path, weights=True) == [shards["b"]]
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002.safetensors"):
        fetch(str(tmp_path), local_files_only=True)
    (tmp_path / shards["b"]).touch()
    assert fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", "~/no-such-model"])
def test_a_missing_folder_is_not_searched_on_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    answer(monkeypatch, AssertionError("the Hub was asked"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        fetch(path)


def test_a_folder_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer in .*tokenizer.json"):
        fetch_tokenizer(str(tmp_path), local_files_only=True)
    (tmp_path / "tokenizer.json").touch()
    assert fetch_tokenizer(str(tmp_path), local_files_only=True) == tmp_path


def test_older_names_count_with_one_warning_and_newer_ones_win(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"HUGGINGFACE_HUB_TOKEN": "hf_secret", "TRANSFORMERS_CACHE": "/cache"}
    use_older_names(environ)
    assert (environ["HF_TOKEN"], environ["HF_HUB_CACHE"]) == ("hf_secret", "/cache")
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "HUGGINGFACE_HUB_TOKEN is called HF_TOKEN" in warning
    assert "hf_secret" not in warning
    use_older_names(environ)
    assert capsys.readouterr().err == ""
    both = {"HUGGINGFACE_HUB_TOKEN": "old", "HF_TOKEN": "new"}
    use_older_names(both)
    assert both["HF_TOKEN"] == "new"


def test_the_program_reads_older_names_before_it_imports_libraries_of_hugging_face() -> None:
    script = (
        "import os, sys\nfrom llmtrain.cli.app import run\nrun(['version'])\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "from huggingface_hub import constants\nprint(constants.HF_HUB_CACHE)"
    )
    environment = {"TRANSFORMERS_CACHE": "/older", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "/older"
    assert done.stderr.startswith("warning: TRANSFORMERS_CACHE is called HF_HUB_CACHE today")
