"""`doctor`: what this machine has for training, and what is in the way of it, each with its fix.

    facts (asked of the machine) ─▶ findings (judged) ─▶ can it train

Secrets are looked for and never read out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from llmtrain.distributed.engine import computes_bf16, keep_to_usable_cores, missing_for_compile
from llmtrain.distributed.nccl import (
    SHOWN,
    SHOWN_PREFIXES,
    infiniband_adapters,
    nccl_settings,
    network_faults,
    network_interfaces,
)
from llmtrain.tracking.meta import hardware, installed_versions
from llmtrain.tracking.redaction import redact
from llmtrain.training.checkpoint_shelf import probe_folder

Severity = Literal["fatal", "warning"]

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)
OLDEST_CUDA_CAPABILITY = (7, 0)
LOW_DISK_BYTES = 5_000_000_000
NO_DISK_BYTES = 200_000_000
LOW_MEMORY_BYTES = 4_000_000_000

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY")
OTHER_PACKAGES = ("datasets", "tiktoken", "peft", "mlflow", "wandb")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", *SHOWN)
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in the way, and what to do about it."""

    severity: Severity
    """fatal: nothing can be trained here; warning: something is slower, smaller or missing."""
    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class RunsFolder:
    """The file system below the folder of all runs."""

    path: str
    free_bytes: int
    writable: bool
    lacks: list[str]
    """What checkpoints would like to have: renaming of folders, links, fsync of folders."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found on the machine."""

    system: str
    """As platform.system() says it: Linux, Darwin, Windows."""
    is_wsl: bool
    cpu: str
    cores: int
    threads: int
    """That torch computes with."""
    memory_bytes: int
    gpus: list[Gpu]
    mps: bool
    cuda_built: bool
    nvidia_driver: bool
    bf16_on_cpu: bool
    missing_for_compile: str | None
    runs: RunsFolder
    cache: str
    """Folder of the Hugging Face cache."""
    cache_free_bytes: int
    secrets: dict[str, bool]
    """Whether each is set in the environment; hf_login: one stored by `hf auth login`."""
    versions: dict[str, str | None]
    interfaces: list[str]
    adapters: list[str]
    """For InfiniBand."""
    environment: dict[str, str]


def doctor(root_dir: str = "runs") -> dict[str, Any]:
    """The facts of this machine and the findings, as plain values; `can_train` is false where one of them is fatal."""
    facts = gather(Path(root_dir))
    findings = examine(facts)
    return {
        "can_train": not any(finding.severity == "fatal" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        **asdict(facts),
    }


def examine(facts: Facts) -> list[Finding]:
    """What is in the way, the worst first."""
    found = [*_of_system(facts), *_of_versions(facts), *_of_devices(facts), *_of_folders(facts), *_of_network(facts)]
    return sorted(found, key=lambda finding: finding.severity != "fatal")


def _of_system(facts: Facts) -> list[Finding]:
    found = []
    if facts.system not in ("Linux", "Darwin"):
        found.append(
            _fatal(f"{facts.system} is not supported", "on Windows install WSL2 (`wsl --install`) and work in there")
        )
    if facts.memory_bytes < LOW_MEMORY_BYTES:
        found.append(
            _warning(
                f"{_gb(facts.memory_bytes)} of memory", "train small models, and ask `llmtrain plan CONFIG` beforehand"
            )
        )
    threads = facts.environment.get("OMP_NUM_THREADS")
    if threads is not None and not facts.gpus and facts.threads < facts.cores:
        found.append(
            _warning(
                f"OMP_NUM_THREADS={threads} lets a run on the CPU use {facts.threads} of {facts.cores} cores",
                "unset it, unless several processes share the machine",
            )
        )
    return found


def _of_versions(facts: Facts) -> list[Finding]:
    found = []
    for package, oldest in (("python", OLDEST_PYTHON), ("torch", OLDEST_TORCH)):
        wanted, here = ".".join(map(str, oldest)), facts.versions[package]
        if here is None or _numbers(here) < oldest:
            fix = f"make a virtual environment with Python {wanted}" if package == "python" else "pip install -U torch"
            found.append(_fatal(f"{package} is {here or 'not installed'}, and {wanted} is needed", fix))
    for package in ("lightning", "transformers", "tokenizers", "safetensors", "pyarrow"):
        if facts.versions[package] is None:
            found.append(_fatal(f"{package} is not installed", "pip install -r requirements.txt"))
    return found


def _of_devices(facts: Facts) -> list[Finding]:
    found = []
    if facts.nvidia_driver and not facts.gpus:
        fix = "compare `nvidia-smi` with CUDA_VISIBLE_DEVICES, and the driver's version with torch's CUDA version"
        if not facts.cuda_built:
            fix = "install a build of torch for CUDA (pytorch.org/get-started)"
        found.append(_warning("there is an NVIDIA driver, but torch sees no GPU: runs go to the CPU", fix))
    for gpu in facts.gpus:
        if gpu.capability < OLDEST_CUDA_CAPABILITY:
            found.append(
                _warning(f"{gpu.name} is too old for torch.compile", "trainer.compile=false, or run.device=cpu")
            )
        elif not gpu.bf16:
            found.append(
                _warning(
                    f"{gpu.name} does not compute bf16", "trainer.precision=16-mixed is faster there than auto's 32"
                )
            )
    if not facts.gpus and not facts.mps and not facts.bf16_on_cpu:
        found.append(
            _warning(
                "this CPU does not compute bf16 natively: precision auto is 32, at less than half the speed",
                "none is needed; a CPU with AVX512-BF16 or AMX, or a GPU, is faster",
            )
        )
    if facts.missing_for_compile is not None:
        what, _, fix = facts.missing_for_compile.partition(" (")
        found.append(
            _warning(
                f"torch.compile is off, so a run takes about twice as long: {what}",
                fix.removesuffix(")") or "install it",
            )
        )
    return found


def _of_folders(facts: Facts) -> list[Finding]:
    found, runs = [], facts.runs
    if not runs.writable:
        found.append(
            _fatal(f"{runs.path} cannot be written", "give another output.root_dir, or the rights to this one")
        )
    elif runs.free_bytes < NO_DISK_BYTES:
        found.append(
            _fatal(f"{_gb(runs.free_bytes)} free at {runs.path}", "make room: a run could not save; or output.root_dir")
        )
    elif runs.free_bytes < LOW_DISK_BYTES:
        found.append(
            _warning(
                f"{_gb(runs.free_bytes)} free at {runs.path}",
                "make room, lower trainer.keep_last, or give another output.root_dir",
            )
        )
    if runs.lacks:
        found.append(
            _warning(
                f"the file system of {runs.path} lacks {', '.join(runs.lacks)}: checkpoints do without",
                "a local disk as output.root_dir survives a power cut better",
            )
        )
    if facts.cache_free_bytes < LOW_DISK_BYTES:
        found.append(
            _warning(
                f"{_gb(facts.cache_free_bytes)} free at {facts.cache}", "make room, or set HF_HOME to another disk"
            )
        )
    return found


def _of_network(facts: Facts) -> list[Finding]:
    found = network_faults(facts.environment, interfaces=facts.interfaces, adapters=facts.adapters)
    return [_warning(what, fix) for what, fix in found]


# -- asking the machine ------------------------------------------------------------------------------------------------


def gather(root: Path, *, environ: Mapping[str, str] = os.environ) -> Facts:
    """Ask the machine. Makes and removes empty folders in `root`, or in the next folder above it that is there."""
    cache = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface").expanduser()
    gpus = _gpus()
    if gpus:
        environ = {**environ, **nccl_settings(environ)}
    shown = [name for name in environ if name.startswith(SHOWN_PREFIXES) or name in (*ENVIRONMENT, *OF_TORCHRUN)]
    machine = hardware()
    keep_to_usable_cores()
    return Facts(
        system=platform.system(),
        is_wsl="microsoft" in platform.release().lower(),
        cpu=machine["cpu"],
        cores=machine["usable_cores"],
        threads=torch.get_num_threads(),
        memory_bytes=machine["memory_bytes"],
        gpus=gpus,
        mps=torch.backends.mps.is_available(),
        cuda_built=torch.version.cuda is not None,
        nvidia_driver=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists(),
        bf16_on_cpu=computes_bf16("cpu"),
        missing_for_compile=missing_for_compile(),
        runs=look_at_folder(root),
        cache=str(cache),
        cache_free_bytes=shutil.disk_usage(_existing(cache)).free,
        secrets={name: bool(environ.get(name)) for name in SECRETS}
        | {"hf_login": Path(environ.get("HF_TOKEN_PATH") or cache / "token").is_file()},
        versions=installed_versions() | {name: _version(name) for name in OTHER_PACKAGES},
        interfaces=network_interfaces(),
        adapters=infiniband_adapters(),
        environment={name: str(redact(environ[name])) for name in sorted(shown)},
    )


def look_at_folder(root: Path) -> RunsFolder:
    """What the file system at `root`, or at the next folder above it that is there, can do."""
    folder = _existing(root.absolute())
    lacks: list[str] = []
    writable = os.access(folder, os.W_OK)
    if writable:
        try:
            with TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
                lacks = probe_folder(Path(name))[1]
                if not _syncs(Path(name)):
                    lacks.append("fsync of folders")
        except OSError:
            writable = False
    return RunsFolder(
        path=str(root.absolute()), free_bytes=shutil.disk_usage(folder).free, writable=writable, lacks=lacks
    )


def _syncs(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _gpus() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            Gpu(
                name=gpu.name,
                memory_bytes=gpu.total_memory,
                capability=(gpu.major, gpu.minor),
                bf16=computes_bf16(f"cuda:{index}"),
            )
        )
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", version)[:2])


def _fatal(what: str, fix: str) -> Finding:
    return Finding(severity="fatal", what=what, fix=fix)


def _warning(what: str, fix: str) -> Finding:
    return Finding(severity="warning", what=what, fix=fix)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
