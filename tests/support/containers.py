"""The pods of a run in containers of podman: their command, host names, user, read-only root and volumes as rendered.

The image holds no files: this machine's /usr and interpreter are bound into it, read-only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.launching.kubernetes.launch import ClusterRun, host_name
from llmtrain.launching.kubernetes.render import render

SOURCE = Path(__file__).parents[2] / "src"
SETTINGS = """[containers]
default_ulimits = ["nofile=4096:4096","nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
FOLDERS = ("proc", "sys", "dev", "etc", "tmp", "usr", "run")
LINKS = ("bin", "lib", "lib64", "sbin")
TIMEOUT_SEC = 300


class Podman:
    """podman with a folder of its own to work in, where its monitor drops files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "containers.conf").write_text(SETTINGS)
        self.image = f"llmtrain-test-{uuid.uuid4().hex[:8]}"

    def __call__(self, *words: str) -> str:
        """Return what podman prints. Raises RuntimeError with its message."""
        environment = {**os.environ, "CONTAINERS_CONF": str(self.folder / "containers.conf")}
        done = subprocess.run(
            ["podman", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SEC
        )
        if done.returncode:
            raise RuntimeError(f"podman {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def make_image(self) -> None:
        """Import a root file system of empty folders."""
        with tarfile.open(self.folder / "root.tar", "w") as tar:
            for name in FOLDERS:
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            for name in LINKS:
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
                tar.addfile(entry)
        self("import", "root.tar", self.image)


class Pods:
    """The pods of one run, on a network of their own."""

    def __init__(self, podman: Podman, run: ClusterRun, folder: Path) -> None:
        self._podman, self._run, self._folder = podman, run, folder
        self._pod: dict[str, Any] = render(run)[-1]["spec"]["template"]["spec"]
        self.names: dict[int, str] = {}
        self._network = f"{podman.image}-{run.name}"
        for name in ("runs", "data", "models", "cache", "config"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0o777)
        (folder / "config" / run.config_file).write_text(run.config_text)
        podman("network", "create", self._network)

    def start(self, index: int, **variables: str) -> None:
        """Start a pod, in the place of an earlier one of that number."""
        container = self._pod["containers"][0]
        given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        given |= {"NODE_RANK": str(index), "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **variables}
        host = host_name(self._run.name, kind=self._run.settings.kind, index=index)
        words = [word.replace("$(NODE_RANK)", str(index)) for word in container["command"]]
        temporary = self._folder / f"tmp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        temporary.chmod(0o777)
        volumes = {f"/{name}": self._folder / name for name in ("runs", "data", "models", "cache")}
        volumes |= {"/tmp": temporary, "/etc/llmtrain": self._folder / "config"}
        security = self._pod["securityContext"]
        self.names[index] = self._podman(
            *("run", "--detach", f"--label={self._podman.image}", f"--hostname={host}", f"--network={self._network}"),
            f"--network-alias={host}.{self._run.name}",
            f"--stop-timeout={self._pod['terminationGracePeriodSeconds']}",
            *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            f"--workdir={container['workingDir']}",
            *(f"--env={name}={value}" for name, value in given.items()),
            *(f"--volume={here}:{place}" for place, here in volumes.items()),
            *(f"--volume={place}:{place}:ro" for place in _interpreter()),
            *(self._podman.image, sys.executable, "-m", *words),
        ).splitlines()[-1]

    def wait(self, index: int) -> int:
        """Return a pod's exit code when it has ended."""
        return int(self._podman("wait", self.names[index]))

    def stop(self) -> list[int]:
        """Send SIGTERM to all pods at once, and return their exit codes."""
        self._podman("stop", *self.names.values())
        return [self.wait(index) for index in sorted(self.names)]

    def kill(self, index: int) -> None:
        """End a pod as the loss of its node does."""
        self._podman("kill", self.names[index])

    def probe(self, index: int, which: str) -> str:
        """Return what a probe of a pod prints. Raises RuntimeError if it fails."""
        words = self._pod["containers"][0][which]["exec"]["command"]
        return self._podman("exec", self.names[index], sys.executable, "-m", *words)

    def log(self, index: int) -> str:
        """Return what a pod has printed."""
        return self._podman("logs", self.names[index])


def _interpreter() -> list[str]:
    """Return the folders that a container needs to run this program."""
    places = {"/usr", str(SOURCE), sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
    return sorted(place for place in places if place == "/usr" or not place.startswith("/usr/"))


@contextmanager
def podman_in(folder: Path) -> Iterator[Podman]:
    """Yield podman with the image, and remove all containers and networks of it afterwards."""
    podman = Podman(folder)
    podman.make_image()
    try:
        yield podman
    finally:
        if names := podman("ps", "--all", "--quiet", "--filter", f"label={podman.image}").split():
            podman("rm", "--force", "--time=0", *names)
        for network in podman("network", "ls", "--format={{.Name}}").split():
            if network.startswith(podman.image):
                podman("network", "rm", network)
        podman("rmi", "--force", podman.image)


def why_no_containers(folder: Path) -> str | None:
    """Return why this machine runs no container of a pod; None where it does."""
    if shutil.which("podman") is None:
        return "podman is not installed"
    try:
        with podman_in(folder) as podman:
            network = f"{podman.image}-trial"
            podman("network", "create", network)
            places = [f"--volume={place}:{place}:ro" for place in _interpreter()]
            trial = [f"--network={network}", "--read-only", "--user=1000", *places, podman.image]
            podman("run", "--rm", *trial, sys.executable, "-c", "print()")
    except RuntimeError as error:
        return str(error)
    return None
