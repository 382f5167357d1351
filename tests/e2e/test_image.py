"""deploy/Dockerfile, built by podman on a Debian made by debootstrap, and the image that comes out of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain import __version__
from llmtrain.runs.events import read_events
from tests.support.containers import Podman, podman_in, why_no_containers
from tests.support.tiny_run import SYNTHETIC, write_config

# debootstrap and the build take two minutes on two busy cores, and need a network. What CI checks without them is in
# tests/unit/deploy: hadolint's rules, what is copied, the lock file of the CPU image.
pytestmark = [pytest.mark.slow, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]
CONTEXT = ("requirements.lock", "requirements-dev.lock", "pyproject.toml", "README.md", "LICENSE", "deploy", "src")
SMALL = ("click", "psutil", "pyyaml")
"""Packages of the small lock file. With the others' packages the build takes many minutes."""
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
VARIABLES = {"SSL_CERT_FILE": CERTIFICATES, "PIP_CERT": CERTIFICATES, "PIP_BREAK_SYSTEM_PACKAGES": "1"}
"""What makes Debian's Python into one of which the Dockerfile's commands work behind this machine's proxy."""
WAIT_SEC = 240
BUILD_SEC = 3600


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """podman with an image `…-base`: Debian with Python and pip, and this machine's certificates."""
    folder = tmp_path_factory.mktemp("image") / "work"
    if (reason := why_no_containers(folder.with_name("trial"))) is not None:
        pytest.skip(f"the image: {reason}")
    if shutil.which("debootstrap") is None:
        pytest.skip("the image: debootstrap is not installed")
    with podman_in(folder) as podman:
        root = folder / "debian"
        packages = "--include=python3,python3-pip,python3-venv"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True)
        (root / CERTIFICATES.removeprefix("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CERTIFICATES, root / CERTIFICATES.removeprefix("/"))
        subprocess.run(["tar", "--create", "--file=debian.tar", f"--directory={root}", "."], cwd=folder, check=True)
        shutil.rmtree(root)
        variables = [f"--change=ENV {name}={value}" for name, value in VARIABLES.items()]
        podman("import", *variables, "debian.tar", f"{podman.image}-base")
        yield podman


def build(podman: Podman, context: Path, *arguments: str) -> str:
    """Return the name of the image that the Dockerfile makes of a folder."""
    image = f"{podman.image}-built"
    given = [f"--build-arg={argument}" for argument in (f"BASE=localhost/{podman.image}-base", *arguments)]
    words = ["--format=docker", "--network=host", "--pull=never", "--layers=false", "--file=deploy/Dockerfile"]
    podman("build", *words, *given, f"--tag={image}", str(context), timeout_sec=BUILD_SEC)
    return image


def small_context(folder: Path) -> Path:
    """Return a folder with what the image is built from, and a lock file of a few packages."""
    for name in (".dockerignore", *CONTEXT):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    entries = re.findall(r"^\S.*\n(?: .*\n)*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    kept = [entry for entry in entries if entry.partition("==")[0] in SMALL]
    assert len(kept) == len(SMALL)
    (folder / "requirements.lock").write_text("".join(kept))
    return folder


@pytest.mark.parametrize("lock", ["small", "whole"])
def test_the_image_trains_as_user_1000_on_a_read_only_root_and_saves_when_it_is_stopped(
    podman: Podman, lock: str, tmp_path: Path
) -> None:
    if lock == "small":  # the other packages are this machine's
        (tmp_path / "context").mkdir()
        image = build(podman, small_context(tmp_path / "context"), "EXTRAS=", f"VERSION={__version__}")
        packages = sysconfig.get_path("purelib")
        more = [f"--volume={packages}:{packages}:ro", f"--env=PYTHONPATH={packages}"]
    else:
        image, more = build(podman, ROOT, f"VERSION={__version__}"), []
    runs, data = tmp_path / "runs", tmp_path / "data"
    for folder in (runs, data):
        folder.mkdir()
        folder.chmod(0o777)
    write_config(data / "tiny.yaml", SYNTHETIC)
    safe = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", f"--label={podman.image}", *more]
    assert podman("run", "--rm", *safe, image, "version").startswith(f"llmtrain {__version__}")
    slow = "--env=LLMTRAIN_FAULTS=sleep@step:0.5"
    words = ["train", "data/tiny.yaml", "output.run_id=one", "trainer.max_steps=500", "trainer.save_every_steps=1"]
    name = podman("run", "--detach", *safe, slow, f"--volume={runs}:/runs", f"--volume={data}:/data", image, *words)
    deadline = time.monotonic() + WAIT_SEC
    while not read_events(runs / "one" / "events.jsonl"):
        assert time.monotonic() < deadline, podman("logs", name)
        time.sleep(0.1)
    assert podman("exec", name, "id", "--user") == "1000"
    assert podman("exec", name, "cat", "/proc/1/comm") == "tini"
    with pytest.raises(RuntimeError, match="Read-only file system"):
        podman("exec", "--user=0", name, "touch", "/opt/llmtrain/x")
    podman("healthcheck", "run", name)  # raises if it is not healthy
    podman("stop", name)
    assert podman("wait", name) == "75", podman("logs", name)
    assert (runs / "one" / "checkpoints" / "latest").exists()
    assert {path.owner() for path in runs.rglob("*.safetensors")} == {Path(runs / "one").owner()}
    labels = podman("inspect", "--format={{json .Config.Labels}}", image)
    assert f'"org.opencontainers.image.version":"{__version__}"' in labels
