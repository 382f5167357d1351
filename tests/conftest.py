"""What tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from llmtrain.storage.store import forget_stores
from llmtrain.tracking import terminal
from llmtrain.tracking.logs import reset_logging
from tests.support.hub import LocalHub
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3
from tests.support.ranks import RankPool

# Set before torch is imported. Tests' tensors are tiny: a second thread only waits for the first, and on a machine that
# is busy with other things it waits very long. No network, whatever a library would like.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# readline, which pytest imports, sets these behind Python's back, for the processes that tests start.
os.unsetenv("COLUMNS")
os.unsetenv("LINES")
# Who starts tests in the background or under nohup has these ignored, and runs leave an ignored signal ignored.
for number, default in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)


# At a desk each run tries other examples; CI tries the same ones for each commit, so what fails there is the commit.
# No example has a deadline: on a machine that is busy with other things it would tell of that.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that start processes one worker of pytest-xdist, for `--dist loadgroup`: one runs at a time."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if item.get_closest_marker("processes") or fixtures & {"groups", "two_ranks", "four_ranks"}:
            item.add_marker(pytest.mark.xdist_group("processes"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what could not run on this machine in the last lines."""
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"NOT RUN: {report.nodeid}: {report.longrepr[2]}", red=True, bold=True)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """No test logs to another test's files or terminal."""
    yield
    reset_logging()
    terminal.forget_console()


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws does not depend on the tests before it. Without torch nothing is drawn, and it stays out."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with colours and of no size of its own, whatever the tests run in."""
    for name in ("CI", "KUBERNETES_SERVICE_HOST", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub on this machine, which this process takes for the real one."""
    with LocalHub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        yield server


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two warm processes that talk over gloo."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four of them."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """S3 on 127.0.0.1, one server for all tests: each makes buckets of its own."""
    with LocalS3() as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalS3]:
    """The server of S3, which the environment names."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    yield s3_server
    forget_stores()


@pytest.fixture
def lake(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalLakeFS]:
    """A server of lakeFS, which the environment names."""
    with LocalLakeFS() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        forget_stores()
        yield server
    forget_stores()
