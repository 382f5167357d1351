"""`ui` as its browser sees it: what it serves, whom it turns away, how it follows a run and lets a model write."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError
from llmtrain.reports import follower as followers_module
from llmtrain.reports.chat_box import ChatDesk
from llmtrain.reports.document import run_document
from llmtrain.reports.follower import Follower, follow
from llmtrain.reports.web_app import make_app
from llmtrain.runs.events import EventLog
from llmtrain.runs.listing import describe_run
from llmtrain.verbs.ui import serve
from tests.support.recorded_run import metrics_line, recorded_run


def client_of(root: Path, *, host: str = "127.0.0.1") -> TestClient:
    return TestClient(make_app(root, host=host), base_url="http://127.0.0.1:8765")


def asking(prompt: str, *, run: str = "a", **settings: Any) -> dict[str, Any]:
    return {"run": run, "messages": [{"role": "user", "content": prompt}], **settings}


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    for name in ("a", "b"):
        recorded_run(tmp_path / "runs", name, num_steps=60)
    (tmp_path / "secret.txt").write_text("not for anybody")
    return client_of(tmp_path / "runs")


def test_pages_and_their_parts_are_served_with_a_policy_that_lets_nothing_else_in(client: TestClient) -> None:
    for path in ("/", "/runs?run=a", "/runs?run=a&run=b"):
        page = client.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        for script in page.text.split('<script src="')[1:]:
            part = client.get(script.partition('"')[0])
            assert part.status_code == 200
            assert part.headers["content-type"] == "text/javascript; charset=utf-8"
            assert part.headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/page.css").headers["content-type"] == "text/css; charset=utf-8"
    assert len(client.get("/static/plotly.js").text) > 1e6


def test_the_list_and_the_documents_are_those_of_runs_and_report(client: TestClient, tmp_path: Path) -> None:
    listed = client.get("/api/runs").json()
    assert listed["root"] == str(tmp_path / "runs")
    assert [(one["id"], one["state"], one["steps"]) for one in listed["runs"]] == [
        ("b", "finished", 60),
        ("a", "finished", 60),
    ]
    page = client.get("/api/page?run=a&run=b").json()
    assert [one["id"] for one in page["runs"]] == ["a", "b"]
    assert page["runs"][0]["curves"]["train/loss"]["count"] == 60
    assert page["runs"][0]["can_write"] is False


def test_a_list_that_is_asked_again_looks_only_at_runs_that_changed(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []

    def describe(folder: Path) -> dict[str, Any]:
        looked_at.append(folder.name)
        return describe_run(folder)

    monkeypatch.setattr("llmtrain.reports.run_list.describe_run", describe)

    def steps_of_all() -> list[tuple[str, int]]:
        looked_at.clear()
        return sorted((one["id"], one["steps"]) for one in client.get("/api/runs").json()["runs"])

    assert (steps_of_all(), looked_at) == ([("a", 60), ("b", 60)], ["a", "b"])
    assert (steps_of_all(), looked_at) == ([("a", 60), ("b", 60)], [])
    append(tmp_path / "runs" / "b", json.dumps(metrics_line(61)) + "\n")
    recorded_run(tmp_path / "runs", "c", num_steps=7)
    assert (steps_of_all(), looked_at) == ([("a", 60), ("b", 61), ("c", 7)], ["b", "c"])
    monkeypatch.setattr("llmtrain.reports.run_list.is_locked", lambda folder: folder.name == "a")
    assert (steps_of_all(), looked_at) == ([("a", 60), ("b", 61), ("c", 7)], ["a"])


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1", "10.0.0.1"],
)
def test_a_foreign_host_is_rejected_everywhere(client: TestClient, host: str) -> None:
    for path in ("/", "/api/runs", "/api/page?run=a", "/static/page.js", "/none"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 403
        assert answer.json() == {"error": "this server answers only under its own address"}
    assert client.post("/api/generate", headers={"Host": host}, json=asking("x")).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "LOCALHOST", "[::1]:8765"])
def test_this_machine_s_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"Host": host}).status_code == 200


# -- a server for others -----------------------------------------------------------------------------------------------

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture
def shared(tmp_path: Path) -> TestClient:
    recorded_run(tmp_path, "a", num_steps=5)
    app = make_app(tmp_path, host="0.0.0.0", token=TOKEN)
    return TestClient(app, base_url="http://10.1.2.3:8765", follow_redirects=False)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": "llmtrain_8765=wrong"},
        {"Cookie": f"other={TOKEN}"},
        {"Cookie": "llmtrain_8765=é; =;;"},
    ],
)
def test_a_server_for_others_answers_nobody_without_its_token(shared: TestClient, given: dict[str, str]) -> None:
    headers = {name.encode(): value.encode() for name, value in given.items()}
    for path in ("/", "/runs?run=a", "/api/runs", "/static/page.js", "/none", "/?token=wrong", "/?token="):
        answer = shared.get(path, headers=headers)
        assert (answer.status_code, answer.headers.get("set-cookie")) == (401, None), path
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert shared.post("/api/generate", headers=headers, json=asking("x")).status_code == 401
    assert shared.post(f"/api/generate?token={TOKEN}", headers=headers, json=asking("x")).status_code == 401


def test_the_first_visit_gives_a_cookie_that_is_enough_afterwards(shared: TestClient) -> None:
    first = shared.get(f"/runs?run=a&token={TOKEN}")
    assert (first.status_code, first.headers["location"]) == (303, "/runs?run=a")
    assert first.headers["set-cookie"].split("; ") == [f"llmtrain_8765={TOKEN}", "HttpOnly", "Path=/", "SameSite=lax"]
    for path in ("/runs?run=a", "/api/runs", "/static/page.js"):
        assert shared.get(path).status_code == 200
    assert shared.get(f"//evil.example/?token={TOKEN}").status_code != 303, "the cookie is there"


def test_a_redirect_stays_on_this_server(shared: TestClient) -> None:
    assert shared.get(f"http://10.1.2.3:8765//evil.example/x?token={TOKEN}").headers["location"] == "/evil.example/x"


def test_a_program_sends_the_token_as_a_bearer(shared: TestClient) -> None:
    assert shared.get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}"}).json()["runs"][0]["id"] == "a"


def test_host_and_origin_are_checked_beside_the_token(shared: TestClient) -> None:
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    for host, status in (("10.1.2.3:8765", 200), ("[fe80::1]", 200), (os.uname().nodename, 200), ("evil.example", 403)):
        assert shared.get("/api/runs", headers={"Host": host, **with_token}).status_code == status
    assert shared.get("/api/runs", headers={"Origin": "http://evil.example", **with_token}).status_code == 403
    assert shared.get(f"/?token={TOKEN}", headers={"Host": "evil.example"}).status_code == 403


def test_a_server_for_others_without_a_token_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        make_app(tmp_path, host="0.0.0.0")


# -- requests ----------------------------------------------------------------------------------------------------------


def test_another_site_s_page_can_ask_for_nothing(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8765"):
        assert client.get("/api/runs", headers={"Origin": origin}).status_code == 403
    assert client.get("/api/runs", headers={"Origin": "http://127.0.0.1:8765"}).status_code == 200
    asked = json.dumps(asking("x"))
    assert client.post("/api/generate", content=asked, headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    "name", ["..", "../secret.txt", "%2e%2e", "a/../../secret.txt", "/etc", "c", "", "a\x00", "latest"]
)
def test_only_ids_of_runs_that_are_there_name_anything(client: TestClient, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "latest").symlink_to("a")
    for path in ("/runs", "/api/page"):
        assert client.get(path, params={"run": name}).status_code == 404
    assert client.get("/api/follow", params={"run": name, "from": "0-0"}).status_code == 404
    assert client.post("/api/generate", json=asking("x", run=name)).status_code == 404


@pytest.mark.parametrize("name", ["html.py", "../html.py", "..%2fhtml.py", "%2e%2e/html.py", "/etc/passwd", "x.js"])
def test_only_the_pages_own_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "an object with `run` and `messages` is expected"),
        ("[]", "an object with `run` and `messages` is expected"),
        ('{"run": "a"}', "an object with `run` and `messages` is expected"),
        ('{"run": "a", "messages": 5}', "`messages` are turns: objects with `role` and `content`"),
        ('{"run": "a", "messages": []}', "`messages` are turns"),
        ('{"run": "a", "messages": [{"role": "tool", "content": "x"}]}', "`messages` are turns"),
        ('{"run": "a", "messages": [{"role": "user", "content": 5}]}', "`messages` are turns"),
        ('{"run": "a", "messages": [{"role": "assistant", "content": "x"}]}', "the last of `messages` is the user's"),
        (
            json.dumps({"run": "a", "messages": [{"role": "user", "content": "x" * 100_001}]}),
            "at most 100,000 characters",
        ),
        (
            '{"run": "a", "messages": [{"role": "user", "content": "x"}], "temperature": -1}',
            "`temperature` is a number from 0 to 10",
        ),
        (
            '{"run": "a", "messages": [{"role": "user", "content": "x"}], "max_new_tokens": 2.5}',
            "`max_new_tokens` is a number from 1 to 4096",
        ),
        ("[" * 5000, "an object with `run` and `messages` is expected"),
        ('{"run": "a", "messages": [{"role": "user", "content": "x"}], "seed": NaN}', "`seed` is a number from 0"),
        (
            '{"run": "a", "messages": [{"role": "user", "content": "x"}], "top_p": true}',
            "`top_p` is a number from 0 to 1",
        ),
    ],
)
def test_a_request_to_write_that_is_wrong_says_how(client: TestClient, body: str, message: str) -> None:
    answer = client.post("/api/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_too_many_runs_and_a_wrong_position_are_rejected(client: TestClient) -> None:
    assert client.get("/api/page", params={"run": [str(n) for n in range(21)]}).status_code == 400
    for position in ("", "5", "-1-2", "1-2-3", "x-1"):
        assert client.get("/api/follow", params={"run": "a", "from": position}).status_code == 400
    assert client.get("/api/follow", params={"run": "a"}).status_code == 400


# -- following a run ---------------------------------------------------------------------------------------------------


def follower_of(folder: Path) -> Follower:
    offset, file_id = map(int, run_document(folder)["followed_from"].split("-"))
    return Follower(folder, offset, file_id)


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_new_lines_are_told_once_and_only_when_they_are_whole(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=5, state="killed")
    follower = follower_of(folder)
    assert follower.news() == []
    text = json.dumps(metrics_line(6)) + "\n"
    append(folder, text[:20])
    assert follower.news() == []
    append(folder, text[20:] + "not json\n" + '{"step": 7, "time": 1, "x": NaN}\n')
    assert follower.news() == [("lines", [metrics_line(6), {"step": 7, "time": 1, "x": None}])]
    assert follower.news() == []


def test_a_run_without_metrics_yet_is_followed_from_its_first(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=0, state="killed")
    (folder / "metrics.jsonl").unlink()
    follower = follower_of(folder)
    assert follower.news() == []
    append(folder, json.dumps(metrics_line(1)) + "\n")
    assert follower.news() == [("lines", [metrics_line(1)])]


def test_events_are_told_when_there_are_new_ones(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=50, state="killed")
    follower = follower_of(folder)
    assert follower.news() == []
    EventLog(folder / "events.jsonl").add("skipped", step=51)
    ((kind, events),) = follower.news()
    assert (kind, [event["event"] for event in events]) == ("events", ["saved", "skipped"])


def test_samples_are_told_when_there_are_new_ones(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=5, state="killed")
    follower = follower_of(folder)
    assert follower.news() == []
    sample = {"step": 5, "prompt": "def f", "completion": "(x):"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert follower.news() == [("samples", [sample])]
    assert follower.news() == []


def test_a_run_that_goes_on_from_an_earlier_step_is_shown_anew(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=5, state="killed")
    follower = follower_of(folder)
    path = folder / "metrics.jsonl"
    (folder / "part").write_text(path.read_text()[:200])
    (folder / "part").replace(path)
    assert follower.news() == [("reset", "it went on from an earlier step")]


def test_a_run_that_begins_to_train_is_shown_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = follower_of(recorded_run(tmp_path, "a", num_steps=5))
    assert follower.news() == []
    monkeypatch.setattr(followers_module, "is_locked", lambda _: True)
    assert follower.news() == [("reset", "it goes on")]
    assert follower.news() == []
    monkeypatch.setattr(followers_module, "is_locked", lambda _: False)
    assert follower.news() == [("reset", "it ended")]


def test_messages_name_their_run_and_silence_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers_module, "POLL_SEC", 0.0)
    folders = [recorded_run(tmp_path, name, num_steps=5, state="killed") for name in ("a", "b")]
    followers = [follower_of(folder) for folder in folders]
    append(folders[1], json.dumps({"step": 6, "time": 1.0, "note": "a\nb"}) + "\n")

    async def first_two() -> list[str]:
        stream: AsyncIterator[str] = follow(followers)
        return [await anext(stream), await anext(stream)]

    lines, silence = asyncio.run(first_two())
    assert lines == 'event: lines\ndata: {"run":"b","lines":[{"step":6,"time":1.0,"note":"a\\nb"}]}\n\n'
    assert silence == ": still here\n\n"


# -- the chat box ------------------------------------------------------------------------------------------------------


class ModelThatTalks:
    """Stands for a LanguageModel: three pieces of text, and then an end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chats = False
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.pieces = 0

    def generate(self, prompts: list[Any], *, on_text: Any, **settings: Any) -> list[Any]:
        (prompt,) = prompts
        self.asked.append((prompt, settings))
        if prompt == "too long":
            raise ConfigError("the prompt is too long")
        for piece in ("one ", "two ", "three"):
            self.pieces += 1
            on_text(0, piece)
        return [SimpleNamespace(tokens=3, ended_by="length")]


@pytest.fixture
def model(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelThatTalks:
    model = ModelThatTalks(tmp_path)
    monkeypatch.setattr(ChatDesk, "_open", lambda self, run: model)
    return model


def test_text_is_told_piece_by_piece(client: TestClient, model: ModelThatTalks) -> None:
    asked = asking("hello", temperature=1, max_new_tokens=9, seed=None)
    answer = client.post("/api/generate", json=asked)
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"chats": False},
        {"text": "one "},
        {"text": "two "},
        {"text": "three"},
        {"done": {"tokens": 3, "ended_by": "length"}},
    ]
    assert model.asked == [("hello", {"temperature": 1.0, "max_new_tokens": 9, "chat": False})]


def test_a_model_that_chats_is_given_the_whole_conversation(client: TestClient, model: ModelThatTalks) -> None:
    model.chats = True
    turns = [("user", "hello"), ("assistant", "one two three"), ("user", "and then?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = client.post("/api/generate", json={"run": "a", "messages": messages})
    assert json.loads(answer.text.splitlines()[0]) == {"chats": True}
    assert model.asked == [(messages, {"chat": True})]


def test_what_the_model_cannot_do_is_told(client: TestClient, model: ModelThatTalks) -> None:
    answer = client.post("/api/generate", json=asking("too long"))
    assert json.loads(answer.text.splitlines()[-1]) == {"error": "the prompt is too long"}


def test_a_reader_who_goes_away_ends_the_text(model: ModelThatTalks, tmp_path: Path) -> None:
    async def read_one() -> None:
        stream = ChatDesk().answer(tmp_path, asking("hello")["messages"], {})
        assert json.loads(await anext(stream)) == {"chats": False}
        assert json.loads(await anext(stream)) == {"text": "one "}
        await stream.aclose()  # type: ignore[attr-defined]

    slow = model.generate

    def generate(prompts: list[Any], *, on_text: Any, **settings: Any) -> list[Any]:
        def wait_for_reader(row: int, piece: str) -> None:
            on_text(row, piece)
            gone.wait(10)

        gone = threading.Event()
        closed.append(gone)
        return slow(prompts, on_text=wait_for_reader, **settings)

    closed: list[threading.Event] = []
    model.generate = generate  # type: ignore[method-assign]
    asyncio.run(read_one())
    closed[0].set()
    for thread in threading.enumerate():
        if thread.name == "chat":
            thread.join(10)
    assert model.pieces == 2


def test_a_run_without_a_checkpoint_says_so(client: TestClient) -> None:
    answer = client.post("/api/generate", json=asking("x"))
    assert json.loads(answer.text) == {"error": "the run a has no checkpoint yet"}


def test_a_text_that_is_written_ends_with_the_server(model: ModelThatTalks, tmp_path: Path) -> None:
    async def read() -> list[str]:
        return [
            piece async for piece in ChatDesk(is_ending=lambda: True).answer(tmp_path, asking("hello")["messages"], {})
        ]

    assert asyncio.run(read()) == []


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_an_address_that_cannot_be_had_and_a_folder_that_is_not_there_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ui", "--root", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"cannot serve at '192\.0\.2\.1', port 0 \(.*choose another --host"):
        serve(root_dir=str(tmp_path), host="192.0.2.1", port=0)


def test_ctrl_c_ends_it_at_once_though_pages_are_open(tmp_path: Path) -> None:
    recorded_run(tmp_path, "a", num_steps=5)
    command = [sys.executable, "-m", "llmtrain", "ui", "--root", str(tmp_path), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[0]
        with urllib.request.urlopen(f"{url}api/follow?run=a&from=0-0", timeout=60) as stream:
            assert stream.readline() == b"event: lines\n"
            process.send_signal(signal.SIGINT)
            rest = stream.read()  # ends, and whole
        assert b'"step":5' in rest
        output, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (0, "")
    assert json.loads(output) == {"url": url, "root": str(tmp_path)}


def served(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmtrain", "ui", "--port", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_address_of_a_server_for_others_holds_a_new_token(tmp_path: Path) -> None:
    recorded_run(tmp_path, "a", num_steps=5)
    tokens = set()
    for _ in range(2):
        with served("--root", str(tmp_path), "--host", "0.0.0.0") as process:
            assert process.stderr is not None
            address = urlsplit(process.stderr.readline().split()[0])
            tokens.add(token := address.query.removeprefix("token="))
            here = f"http://127.0.0.1:{address.port}/api/runs"
            with pytest.raises(HTTPError, match="401"):
                urllib.request.urlopen(here, timeout=60)
            asked = urllib.request.Request(here, headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["runs"][0]["id"] == "a"
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)
        assert token not in "".join(rest)
    assert len(tokens) == 2
    assert all(len(token) >= 40 for token in tokens)


def test_a_service_has_its_token_in_a_file_and_prints_none(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with served("--root", str(tmp_path), "--token-file", str(file)) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        with pytest.raises(HTTPError, match="401"):
            urllib.request.urlopen(line.split()[0], timeout=60)
        asked = urllib.request.Request(line.split()[0], headers={"Authorization": f"Bearer {TOKEN}"})
        assert urllib.request.urlopen(asked, timeout=60).status == 200
        process.send_signal(signal.SIGINT)
        assert TOKEN not in line + "".join(process.communicate(timeout=60))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "16 to 512"),
        ("short", "16 to 512"),
        ("with blanks " * 4, "16 to 512"),
        ("é" * 20, "ASCII"),
    ],
)
def test_a_token_file_that_is_no_good_is_one_message(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"--token-file {file}: .*{message}"):
        serve(root_dir=str(tmp_path), host="127.0.0.1", port=0, token_file=str(file))
