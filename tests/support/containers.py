"""The pods of a run in containers of podman: their command, host names, user, read-only root and volumes as rendered.

The image holds no files: this machine's /usr, interpreter and program are bound into it, read-only.

>>> with podman_in(folder) as podman, Job(Pods(podman, run, folder / "volumes")) as job:
...     job.kill(1)  # which is then replaced
...     job.wait()
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtrain.launching.kubernetes.launch import ClusterRun, host_name
from llmtrain.launching.kubernetes.render import render
from tests.support.failure_policy import FailurePolicy

SOURCE = Path(__file__).parents[2] / "src"
SETTINGS = """[containers]
default_ulimits = ["nofile=4096:4096","nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
FOLDERS = ("proc", "sys", "dev", "etc", "tmp", "usr", "run")
LINKS = ("bin", "lib", "lib64", "sbin")
PROGRAM = "/program"
"""Place of this program in a container."""
KILLED = 137
TIMEOUT_SEC = 300


class Podman:
    """podman with a folder of its own to work in, where its monitor drops files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "containers.conf").write_text(SETTINGS)
        self.image = f"llmtrain-test-{uuid.uuid4().hex[:8]}"

    @property
    def machine(self) -> list[str]:
        """Options of `podman run` that bind what a container needs of this machine to run this program."""
        places = {"/usr", sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
        own = sorted(place for place in places if place == "/usr" or not place.startswith("/usr/"))
        return [f"--volume={self.folder / 'program'}:{PROGRAM}:ro", *(f"--volume={one}:{one}:ro" for one in own)]

    def __call__(self, *words: str, timeout_sec: float = TIMEOUT_SEC) -> str:
        """Return what podman prints. Raises RuntimeError with its message."""
        environment = {**os.environ, "CONTAINERS_CONF": str(self.folder / "containers.conf")}
        done = subprocess.run(
            ["podman", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout_sec
        )
        if done.returncode:
            raise RuntimeError(f"podman {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def make_image(self) -> None:
        """Import a root file system of empty folders, and compile this program, as an image holds it."""
        compileall.compile_dir(shutil.copytree(SOURCE, self.folder / "program"), quiet=1)
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
        self.job = render(run)[-1]
        self._pod: dict[str, Any] = self.job["spec"]["template"]["spec"]
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
        given |= {"NODE_RANK": str(index), "PYTHONPATH": PROGRAM, "OMP_NUM_THREADS": "1", **variables}
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
            *self._podman.machine,
            *(self._podman.image, sys.executable, "-m", *words),
        ).splitlines()[-1]

    def wait(self, index: int) -> int:
        """Return a pod's exit code when it has ended."""
        return int(self._podman("wait", self.names[index]))

    def stop(self) -> list[int]:
        """Send SIGTERM to all pods at once, and return their exit codes."""
        names = [self.names[index] for index in sorted(self.names)]
        self._podman("stop", *names)
        return [int(self._podman("wait", name)) for name in names]

    def kill(self, index: int) -> None:
        """End a pod as the loss of its node does."""
        self._podman("kill", self.names[index])

    def cut_network(self, index: int) -> None:
        """Let no packet reach a pod or leave it. Its connections stay open, as they do when a switch fails."""
        self._iptables(index, "--append", "INPUT", "!", "--in-interface", "lo", "--jump", "DROP")
        self._iptables(index, "--append", "OUTPUT", "!", "--out-interface", "lo", "--jump", "DROP")

    def mend_network(self, index: int) -> None:
        """Undo `cut_network`."""
        self._iptables(index, "--flush")

    def _iptables(self, index: int, *words: str) -> None:
        process = self._podman("inspect", "--format={{.State.Pid}}", self.names[index])
        subprocess.run(["nsenter", f"--target={process}", "--net", "iptables", *words], check=True)

    def probe(self, index: int, which: str) -> str:
        """Return what a probe of a pod prints. Raises RuntimeError if it fails."""
        words = self._pod["containers"][0][which]["exec"]["command"]
        return self._podman("exec", self.names[index], sys.executable, "-m", *words)

    def log(self, index: int) -> str:
        """Return what a pod has printed."""
        return self._podman("logs", self.names[index])

    def remove(self) -> None:
        """Kill all pods, those that have ended too."""
        self._podman("rm", "--force", "--time=0", *self.names.values())


class Job:
    """Starts each pod of a run, and again whenever it fails, as long as the Job's failure policy does so."""

    def __init__(self, pods: Pods, **variables: str) -> None:
        self._pods, self._policy = pods, FailurePolicy(pods.job)
        self.variables = variables
        """Of the pods that start from now on."""
        self.replaced_after_sec = 0.0
        """Seconds until there is another node for a pod whose node was lost."""
        self._is_open = True
        self._pool = ThreadPoolExecutor(pods.job["spec"]["completions"])
        numbers = range(pods.job["spec"]["completions"])
        self._kept = [self._pool.submit(self._keep, index) for index in reversed(numbers)]
        """From the last to the first, whose name is not there yet when the others start."""

    def _keep(self, index: int) -> list[int]:
        codes = []
        while self._is_open:
            self._pods.start(index, **self.variables)
            if (code := self._pods.wait(index)) == 0:
                break
            codes.append(code)
            if code == KILLED:
                time.sleep(self.replaced_after_sec)
            else:
                self._policy.judge(code)
        return codes

    @property
    def is_running(self) -> bool:
        """Whether no pod has ended for good."""
        return not any(kept.done() for kept in self._kept)

    def wait(self) -> list[list[int]]:
        """Return the codes with which each pod failed, when all have ended with 0. Raises where the Job would fail."""
        return [kept.result() for kept in reversed(self._kept)]

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._pods.remove()
        self._pool.shutdown()


@contextmanager
def podman_in(folder: Path) -> Iterator[Podman]:
    """Yield podman with the image, and remove all containers, networks and images that it made afterwards."""
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
        images = podman("images", "--format={{.Repository}}:{{.Tag}}").split()
        podman("rmi", "--force", *(image for image in images if podman.image in image))


def why_no_containers(folder: Path) -> str | None:
    """Return why this machine runs no container of a pod; None where it does."""
    if shutil.which("podman") is None:
        return "podman is not installed"
    try:
        with podman_in(folder) as podman:
            network = f"{podman.image}-trial"
            podman("network", "create", network)
            trial = [f"--network={network}", "--read-only", "--user=1000", *podman.machine, podman.image]
            podman("run", "--rm", *trial, sys.executable, "-c", "print()")
    except RuntimeError as error:
        return str(error)
    return None
