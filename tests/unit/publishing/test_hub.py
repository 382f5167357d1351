"""Publishing to the Hub, against a local server that speaks its API: rights, commits, what breaks, what is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError, RunError
from llmtrain.models.fetch import ADAPTER_CONFIG
from llmtrain.publishing.hub import ATTEMPTS, check_may_write, upload
from llmtrain.verbs.publish import publish
from tests.support.hub import LocalHub, Repo
from tests.support.recorded_run import recorded_run_with_model
from tests.support.tiny_huggingface import write_tiny_adapter, write_tiny_chat_folder

GIVEN = {"license": "mit", "to": "hub:me/model"}


@pytest.fixture(autouse=True)
def _tries_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return recorded_run_with_model(tmp_path / "runs", "one")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something to upload: a card and weights."""
    home = tmp_path / "upload"
    home.mkdir()
    (home / "README.md").write_text("---\nlicense: mit\n---\n# model\n")
    (home / "model.safetensors").write_bytes(os.urandom(6000))
    return home


def test_a_model_is_on_the_hub_in_one_private_commit(hub: LocalHub, trained: Path, tmp_path: Path) -> None:
    done = publish("one", given=GIVEN)
    repo = hub.repos["me/model"]
    assert repo.private
    assert repo.commits == ["Publish one"]
    assert done["revision"] == repo.revision
    assert done["url"] == f"{hub.endpoint}/me/model/tree/{repo.revision}"
    weights = trained / "checkpoints" / "step_000200" / "model" / "model.safetensors"
    assert repo.files["model.safetensors"] == weights.read_bytes()
    assert {"README.md", "config.json", "tokenizer.json", "curves.svg", "publish.json"} <= repo.files.keys()
    assert 'from_pretrained("me/model")' in repo.files["README.md"].decode()
    record = json.loads((trained / "published.jsonl").read_text())
    assert (record["to"], record["revision"]) == ("hub:me/model", repo.revision)
    baseline = json.loads((tmp_path / "runs" / "last-published.json").read_text())["model"]
    assert baseline == f"me/model@{repo.revision}"
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_a_model_is_public_only_on_request_and_never_through_an_older_repository(hub: LocalHub, trained: Path) -> None:
    hub.repos["me/model"] = Repo(private=False)
    with pytest.raises(ConfigError, match=r"hub:me/model is public, but models are published privately by default"):
        publish("one", given=GIVEN)
    publish("one", given={**GIVEN, "private": False})
    publish("one", given={**GIVEN, "to": "hub:me/open", "private": False})
    assert not hub.repos["me/open"].private


def test_the_name_may_come_from_the_environment(hub: LocalHub, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    with pytest.raises(ConfigError, match="or set HF_REPO_ID"):
        publish("one", given={**GIVEN, "to": "hub"})
    monkeypatch.setenv("HF_REPO_ID", "me/named")
    publish("one", given={**GIVEN, "to": "hub"})
    assert hub.repos.keys() == {"me/named"}


def test_a_second_publish_removes_shards_of_the_first_and_keeps_other_files(hub: LocalHub, trained: Path) -> None:
    hub.repos["me/model"] = Repo(
        private=True, files={"model-00001-of-00002.safetensors": b"old", "NOTES.md": b"mine", "config.json": b"{}"}
    )
    publish("one", given=GIVEN)
    files = hub.repos["me/model"].files
    assert "model-00001-of-00002.safetensors" not in files
    assert files["NOTES.md"] == b"mine"
    assert json.loads(files["config.json"])["model_type"] == "llama"


def test_a_token_without_write_access_is_rejected_before_anything_is_done(
    hub: LocalHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"hub:other/model: the token may not write there \(403\).*to other"):
        publish("one", given={**GIVEN, "to": "hub:other/model"})
    hub.repos["other/model"] = Repo(private=True)
    with pytest.raises(ConfigError, match=r"may not write there \(403\)"):
        publish("one", given={**GIVEN, "to": "hub:other/model"})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"the token is not accepted \(401\): put a token in HF_TOKEN"):
        publish("one", given=GIVEN)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"needs a token that may write: put a token in HF_TOKEN"):
        publish("one", given=GIVEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        publish("one", given=GIVEN)
    assert hub.count("/preupload/") == 0
    assert not (tmp_path / "artifacts").exists()


def test_a_repository_that_another_made_meanwhile_is_no_error(hub: LocalHub) -> None:
    hub.fail("GET /api/models/me/model", status=404)
    hub.repos["me/model"] = Repo(private=True)
    check_may_write("me/model", private=True)
    assert hub.count("POST /api/repos/create") == 1


@pytest.mark.parametrize(
    ("part", "status"),
    [("/commit/", 409), ("/commit/", 500), ("/preupload/", None), ("/commit/", None), ("PUT /lfs/", None)],
)
def test_temporary_failures_are_tried_again(hub: LocalHub, folder: Path, part: str, status: int | None) -> None:
    hub.repos["me/model"] = Repo(private=True)
    hub.fail(part, status=status, times=2)
    waits: list[float] = []
    done = upload(folder, "me/model", message="again", sleep=waits.append)
    assert done.revision == hub.repos["me/model"].revision
    assert hub.repos["me/model"].commits == ["again"]
    assert waits == [1.0, 2.0][: len(waits)]
    assert hub.count(part) >= 3


def test_too_many_requests_are_waited_for_as_long_as_the_hub_says(hub: LocalHub, folder: Path) -> None:
    hub.repos["me/model"] = Repo(private=True)
    hub.fail("/commit/", status=429, headers={"Retry-After": "7"})
    waits: list[float] = []
    upload(folder, "me/model", message="later", sleep=waits.append)
    assert waits in ([7.0], [])  # the library itself waits where it tries again
    assert hub.count("/commit/") == 2


def test_weights_that_arrived_are_not_sent_again(hub: LocalHub, folder: Path) -> None:
    hub.repos["me/model"] = Repo(private=True)
    hub.fail("/commit/", status=503, times=100)
    with pytest.raises(RunError, match=r"hub:me/model: the Hub answered 503\. The same command continues"):
        upload(folder, "me/model", message="first", sleep=lambda _: None)
    assert hub.count("/commit/") >= ATTEMPTS
    assert hub.count("PUT /lfs/") == 1
    assert hub.repos["me/model"].files == {}
    hub.heal()
    upload(folder, "me/model", message="second", sleep=lambda _: None)
    assert hub.count("PUT /lfs/") == 1
    assert hub.repos["me/model"].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_refusal_is_not_tried_again(hub: LocalHub, folder: Path) -> None:
    hub.repos["me/model"] = Repo(private=True)
    hub.fail("/commit/", status=403, times=100)
    with pytest.raises(ConfigError, match=r"may not write there \(403\)"):
        upload(folder, "me/model", message="no", sleep=lambda _: None)
    assert hub.count("/commit/") == 1


def test_a_hub_that_does_not_answer_is_a_run_error(hub: LocalHub, trained: Path) -> None:
    hub.fail("/api/", status=503, times=1000)
    with pytest.raises(RunError, match=r"hub:me/model: the Hub answered 503: try again"):
        publish("one", given=GIVEN)


def test_an_adapter_of_a_local_base_needs_the_bases_name(hub: LocalHub, tmp_path: Path) -> None:
    adapter = str(write_tiny_adapter(tmp_path / "adapter", write_tiny_chat_folder(tmp_path / "base")))
    with pytest.raises(ConfigError, match=r"which is only on this machine: .*--base-model.*llmtrain merge"):
        publish(adapter, given=GIVEN, root_dir=str(tmp_path / "runs"))
    publish(adapter, given={**GIVEN, "base_model": "meta/llama"}, root_dir=str(tmp_path / "runs"))
    files = hub.repos["me/model"].files
    assert json.loads(files[ADAPTER_CONFIG])["base_model_name_or_path"] == "meta/llama"
    assert "base_model: meta/llama" in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(files.values())


@pytest.mark.slow
def test_the_command_reads_the_destination_from_the_environment(hub: LocalHub, trained: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.TOKEN,
        "HF_REPO_ID": "me/by-command",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "llmtrain", "publish", "one", "--to", "hub", "--license", "mit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert not set(done.stderr) & {"\x1b", "\r"}, "bars of the upload"
    told = json.loads(done.stdout)
    assert told["url"] == f"{hub.endpoint}/me/by-command/tree/{hub.repos['me/by-command'].revision}"
    assert HfApi(endpoint=hub.endpoint, token=hub.TOKEN).repo_info("me/by-command").sha == told["revision"]


def test_the_terminal_shows_revision_and_url(hub: LocalHub, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["publish", "one", "--to", "hub:me/model", "--license", "mit", "--private"]) == 0
    told = capsys.readouterr().out
    assert hub.repos["me/model"].revision in told
    assert f"{hub.endpoint}/me/model/tree/" in told
    assert run(["publish", "one", "--to", "hub:me/a--b", "--license", "mit"]) == 2
