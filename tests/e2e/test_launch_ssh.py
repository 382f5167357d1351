"""`launch ssh` against a real sshd, rsync and tmux on this machine, with connections that break in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.group import check_sharing
from llmtrain.launching.ssh.job import Node, nodes_of, write_file
from llmtrain.launching.ssh.remote import remote_of
from llmtrain.runs.listing import describe_run
from llmtrain.tracking.sinks import read_metrics
from tests.support.ssh_server import PYTHON, SshServer
from tests.support.tiny_run import SYNTHETIC, weight_hash, write_config

pytestmark = [pytest.mark.slow, pytest.mark.processes]

ODD = '~/it\'s "odd" $(touch pwned)\n#(touch pwned) %'
TOKEN = "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef12"
TRAINER = {**SYNTHETIC["trainer"], "max_steps": 20, "log_every_steps": 1, "save_every_steps": 10}
TRACKING = {"tensorboard": {"enabled": False}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("ssh")) as running:
        yield running


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, in which the test stands."""
    folder = tmp_path / "my project"
    folder.mkdir()
    data = {**SYNTHETIC["data"], "num_val_items": 8}
    write_config(folder / "tiny.yaml", {**SYNTHETIC, "data": data, "trainer": TRAINER, "tracking": TRACKING})
    (folder / ".env").write_text(f'export HF_TOKEN="{TOKEN}"\nWANDB_API_KEY=a$b\n')
    (folder / "data").mkdir()
    (folder / "data" / "it's $(x).jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    return folder


def launch(*words: str) -> int:
    return run(["launch", "ssh", *words])


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmtrain", "launch", "ssh", *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], object], *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps_shown(text: str) -> list[int]:
    """The steps whose lines of the log were shown."""
    return [int(step) for step in re.findall(r"step +(\d+)[ /]", text)]


def log_in(stderr: str) -> str:
    """What was shown of the job's log by a command whose connection broke."""
    assert "connecting again" in stderr
    return "".join(line for line in stderr.splitlines(keepends=True) if "connecting again" not in line)


def test_a_foreground_training_survives_broken_connections_and_its_run_comes_back(
    server: SshServer, project: Path
) -> None:
    there = ["--dir", ODD, *server.options("one")]
    remote = server.home / ODD.removeprefix("~/")
    assert launch("push", *there) == 0
    config = (project / "tiny.yaml").rename("it's $(touch pwned).yaml")
    words = [str(config), "output.run_id=kept", "run.notes=; $(touch pwned)"]
    process = start("train", *words, *there, *PYTHON, "--env-file", ".env")
    log = remote / ".llmtrain" / "train-0" / "log"
    wait_for(lambda: log.exists() and len(steps_shown(log.read_text())) > 2)
    assert TOKEN not in "".join(" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))
    assert server.cut() > 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "last loss" in out
    assert log_in(err) == log.read_text(), "no line twice, none missing"
    environment = remote / ".llmtrain" / "env"
    assert environment.stat().st_mode & 0o777 == 0o600
    assert environment.read_text() == f"HF_TOKEN={TOKEN}\nWANDB_API_KEY='a$b'\n"
    assert not (remote / ".env").exists()
    assert (remote / "data" / "it's $(x).jsonl").exists()
    assert not [*server.home.rglob("pwned"), *project.rglob("pwned")]

    assert launch("fetch", *there) == 0
    assert describe_run(project / "runs" / "kept")["state"] == "finished"
    assert (project / "runs" / "latest").resolve() == project / "runs" / "kept"
    assert not list((project / "runs" / "kept").rglob(".*"))


def test_a_detached_training_is_followed_stopped_resumed_on_two_hosts_and_evaluated(
    server: SshServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--dir", "~/detached", *server.options("one")]
    assert launch("push", *there) == 0
    long = "trainer.max_steps=1000"
    assert launch("train", "tiny.yaml", long, "output.run_id=slow", "--detach", *there, *PYTHON) == 0
    assert launch("train", "tiny.yaml", "--detach", *there, *PYTHON) == 1
    assert "slow is running there already" in capsys.readouterr().err
    following = start("logs", "--follow", *there)
    run_there = server.home / "detached" / "runs" / "slow"
    metrics = run_there / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 2)
    server.cut()
    reached = len(read_metrics(metrics))
    wait_for(lambda: len(read_metrics(metrics)) > reached + 5)
    wait_for(psutil.Process(following.pid).children)
    for ssh in psutil.Process(following.pid).children():
        ssh.kill()
    assert launch("status", "--json", *there, *PYTHON) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["name"], found["run"]["state"]) == ("running", "slow", "running")
    assert found["run"]["steps"] > 2
    assert launch("stop", *there) == 0
    assert "it has saved" in capsys.readouterr().out
    _, err = following.communicate(timeout=60)
    assert following.returncode == 75
    whole = (server.home / "detached" / ".llmtrain" / "train-0" / "log").read_text()
    assert log_in(err) == whole, "no line twice, none missing"
    assert len(steps_shown(whole)) > reached + 5

    stopped = describe_run(run_there)
    assert stopped["state"] == "preempted"
    both = ["--dir", "~/detached", *server.options("one", "two"), *PYTHON]
    assert launch("train", "--resume", "slow", "--rendezvous", "127.0.0.1:0", *both) == 2
    assert "not HOST:PORT" in capsys.readouterr().err
    process = start("train", "--resume", "slow", "trainer.micro_batch_size=2", "--json", *both)
    wait_for(lambda: len(read_metrics(metrics)) > stopped["steps"] + 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert json.loads(out)["error"]["kind"] == "preempted"
    assert describe_run(run_there)["steps"] > stopped["steps"]
    assert (run_there / "logs" / "rank_1.log").exists()

    assert launch("eval", "slow", "--steps", "1", "--json", *there, *PYTHON) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    wait_for(lambda: not processes_there(server))


def processes_there(server: SshServer) -> list[str]:
    """The shells and programs that sessions left behind."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == str(server.home):
                found.append(process.info["name"])
    return found


def test_init_makes_an_environment_by_uv_in_which_doctor_finds_all_packages(
    server: SshServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the packages that uv has in its cache, since this environment was made from the same lock file."""
    uv = shutil.which("uv") or str(Path(sys.prefix).parent / ".venv-uv" / "bin" / "uv")
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    path = f"{Path(uv).parent}:{os.environ['PATH']}"
    (project / "uv.env").write_text(f"PATH='{path}'\nUV_CACHE_DIR='{cache}'\nUV_OFFLINE=1\n")
    with TemporaryDirectory(dir=Path(cache).parent) as folder:  # beside the cache, so that files are linked
        there = ["--dir", f"{folder}/a project", *server.options("one"), "--env-file", "uv.env"]
        assert launch("init", "tiny.yaml", *there) == 0
        assert "free at" in capsys.readouterr().out
        assert (Path(folder) / "a project" / ".llmtrain" / "venv" / "bin" / "python").exists()


def test_hosts_that_do_not_share_a_folder_cannot_resume_a_run(
    server: SshServer, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"host": ["one", "two"], "dir": "~/same", "ssh_config": str(server.config)}
    nodes = nodes_of(remote_of(None, given), "train")
    check_sharing(nodes, None, resume=True)
    apart = Node(replace(nodes[1].machine, folder="~/other"), "train", 1)
    write_file(apart.machine, "shared", "another")
    assert not caplog.messages
    check_sharing([nodes[0], apart], None, resume=False)
    assert "two does not see the files of one: only ddp can save" in caplog.text
    with pytest.raises(ConfigError, match="two does not see the files of one, and a run is resumed"):
        check_sharing([nodes[0], apart], None, resume=True)


@pytest.mark.nightly  # half a minute; how the hosts are told what to do is tested in test_job.py
@pytest.mark.skipif(os.geteuid() != 0, reason="a folder of its own for one of the hosts needs root")
def test_hosts_that_do_not_share_a_folder_train_one_run_which_the_first_has(server: SshServer, project: Path) -> None:
    there = ["--dir", "~/apart", *server.options("one", "apart")]
    assert launch("push", *there) == 0
    assert (server.home / "other" / "tiny.yaml").exists()
    process = start("train", "tiny.yaml", "output.run_id=both", *there, *PYTHON, "--nproc", "1")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "apart does not see the files of one: only ddp can save" in err
    assert launch("fetch", *there, *PYTHON) == 0
    run = Path("runs") / "both"
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 20
    assert (run / "checkpoints" / "latest").exists()
    assert not (server.home / "other" / "runs" / "both" / "checkpoints").exists()
    command = [sys.executable, "-m", "llmtrain", "train", "tiny.yaml", "--nproc", "2", "output.run_id=here"]
    subprocess.run([*command, "distributed.strategy=ddp"], check=True, capture_output=True)
    assert weight_hash(run) == weight_hash(Path("runs") / "here")


def test_a_copy_that_breaks_goes_on(server: SshServer, project: Path) -> None:
    there = server.home / "large" / "runs" / "big"
    (there / "checkpoints").mkdir(parents=True)
    content = os.urandom(1 << 20) * 150
    (there / "checkpoints" / "weights").write_bytes(content)
    for name in ("config.yaml", "meta.json"):
        (there / name).write_text("{}")
    here = project / "runs" / "big"
    cuts = []

    def cut_in_the_middle() -> None:
        wait_for(lambda: any(file.stat().st_size > 1 << 20 for file in here.rglob("*weights*") if file.is_file()))
        cuts.append(server.cut())

    breaking = threading.Thread(target=cut_in_the_middle)
    breaking.start()
    assert launch("fetch", "big", "--dir", "~/large", *server.options("one")) == 0
    breaking.join()
    assert cuts[0] > 0
    assert (here / "checkpoints" / "weights").read_bytes() == content
    assert sorted(path.name for path in here.rglob("*")) == ["checkpoints", "config.yaml", "meta.json", "weights"]


def test_push_deletes_nothing_by_itself_and_only_inside_its_folder_when_told_to(
    server: SshServer, project: Path, tmp_path: Path
) -> None:
    there = ["--dir", "~/pushed", *server.options("one")]
    folder, outside = server.home / "pushed", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    for name in (".git", ".venv", "runs", "__pycache__"):
        (project / name).mkdir()
        (project / name / "big").write_text("")
    (project / "secrets.txt").write_text("HF_TOKEN=x\n")
    (project / "old.py").write_text("1")
    (project / "linked").symlink_to(outside)
    push = ["push", "tiny.yaml", "--env-file", "secrets.txt", *there]
    assert launch(*push) == 0
    assert sorted(path.name for path in folder.iterdir()) == [".llmtrain", "data", "linked", "old.py", "tiny.yaml"]
    assert (folder / "linked" / "precious").exists(), "what a link of the project points to is copied"
    (folder / "runs").mkdir()
    (folder / "runs" / "model").write_text("")
    (folder / "notes").write_text("mine")
    (folder / "to").symlink_to(outside)
    (project / "old.py").unlink()
    (project / "linked").unlink()
    assert launch(*push) == 0
    assert (folder / "old.py").exists()
    assert launch(*push, "--delete") == 0
    assert sorted(path.name for path in folder.iterdir()) == [".llmtrain", "data", "runs", "tiny.yaml"]
    assert (folder / ".llmtrain" / "replaced" / "notes").read_text() == "mine"
    assert (folder / "runs" / "model").exists()
    assert (outside / "precious").exists()


def test_who_answers_there_is_checked(server: SshServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "stranger": (2, "the host key of stranger is not known here: log in once by hand"),
        "keyless": (2, "keyless does not let you in: log in by a key"),
        "nowhere.invalid": (2, "Could not resolve hostname"),
        "127.0.0.1:1": (1, "no connection to 127.0.0.1:1"),
    }
    for host, (code, message) in told.items():
        assert launch("push", "--dir", "~/x", *server.options(host)) == code
        assert message in capsys.readouterr().err
    known = server.folder / "known hosts"
    right = known.read_text()
    known.write_text(right.partition(" ")[0] + " " + (server.folder / "user_key.pub").read_text())
    assert launch("status", "--dir", "~/x", *server.options("one")) == 2
    assert "another machine answers there, or it was reinstalled" in capsys.readouterr().err
    known.write_text(right)


@pytest.mark.parametrize("verb", ["train", "logs", "stop", "fetch"])
def test_what_was_not_pushed_or_started_yet_is_said(
    server: SshServer, project: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    words = ["tiny.yaml", *PYTHON] if verb == "train" else []
    assert launch(verb, *words, "--dir", f"~/nothing {verb}", *server.options("one")) != 0
    assert "llmtrain launch ssh push" in capsys.readouterr().err
    assert launch("attach", "--dir", f"~/nothing {verb}", *server.options("one")) == 1
    assert "no job is running on one" in capsys.readouterr().err
