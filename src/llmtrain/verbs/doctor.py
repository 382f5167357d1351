"""`doctor`: what this machine has for training, and what is in the way of it, each with its fix.

    facts (asked of the machine) ─▶ findings (judged) ─▶ can it train

Versions and secrets are looked at here; cores, devices and network in distributed/diagnosis, disks in training/disk.
Secrets are looked for and never read out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmtrain.distributed.diagnosis import (
    Finding,
    MachineFacts,
    device_findings,
    fatal,
    look_at_machine,
    network_findings,
    system_findings,
)
from llmtrain.distributed.nccl import SHOWN, SHOWN_PREFIXES, nccl_settings
from llmtrain.installing import install, install_requirements
from llmtrain.runs.metadata import hardware, installed_versions
from llmtrain.runs.stores import runs_folder
from llmtrain.tracking.redaction import redact
from llmtrain.training.disk import DiskFacts, disk_findings, look_at_disks

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY")
OTHER_PACKAGES = ("datasets", "tiktoken", "peft", "mlflow", "wandb")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", *SHOWN)
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that were found on the machine."""

    cpu: str
    machine: MachineFacts
    disks: DiskFacts
    secrets: dict[str, bool]
    """True for each one that is set in the environment; hf_login: one stored by `hf auth login`."""
    versions: dict[str, str | None]
    environment: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, those of machine and disks beside the others."""
        plain = asdict(self)
        return {**plain.pop("machine"), **plain.pop("disks"), **plain}


def doctor(root_dir: str = "runs") -> dict[str, Any]:
    """Return the facts of this machine and the findings, as plain values.

    `can_train` is false where one of the findings is fatal.
    """
    facts = gather(runs_folder(root_dir))
    findings = examine(facts)
    return {
        "can_train": not any(finding.severity == "fatal" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        **facts.as_dict(),
    }


def gather(root: Path, *, environ: Mapping[str, str] = os.environ) -> Facts:
    """Ask the machine. Makes and removes empty folders in `root`, or in the next folder above it that is there."""
    cache = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    cache = Path(os.path.expanduser(cache))  # which leaves `~` where a user has no home
    machine = look_at_machine()
    if machine.gpus:
        environ = {**environ, **nccl_settings(environ)}
    shown = [name for name in environ if name.startswith(SHOWN_PREFIXES) or name in (*ENVIRONMENT, *OF_TORCHRUN)]
    return Facts(
        cpu=hardware()["cpu"],
        machine=machine,
        disks=look_at_disks(root, cache=cache),
        secrets={name: bool(environ.get(name)) for name in SECRETS}
        | {"hf_login": Path(environ.get("HF_TOKEN_PATH") or cache / "token").is_file()},
        versions=installed_versions() | {name: _version(name) for name in OTHER_PACKAGES},
        environment={name: str(redact(environ[name])) for name in sorted(shown)},
    )


def examine(facts: Facts) -> list[Finding]:
    """Return what is in the way, the worst first."""
    found = [
        *system_findings(facts.machine, facts.environment),
        *version_findings(facts.versions),
        *device_findings(facts.machine),
        *disk_findings(facts.disks),
        *network_findings(facts.machine, facts.environment),
    ]
    return sorted(found, key=lambda finding: finding.severity != "fatal")


def version_findings(versions: Mapping[str, str | None]) -> list[Finding]:
    """Return the packages that are missing or too old."""
    found = []
    for package, oldest in (("python", OLDEST_PYTHON), ("torch", OLDEST_TORCH)):
        wanted, here = ".".join(map(str, oldest)), versions[package]
        if here is None or _numbers(here) < oldest:
            fix = f"make a virtual environment with Python {wanted}" if package == "python" else install("-U", "torch")
            found.append(fatal(f"{package} is {here or 'not installed'}, and {wanted} is needed", fix))
    for package in ("lightning-fabric", "transformers", "tokenizers", "safetensors", "pyarrow"):
        if versions[package] is None:
            found.append(fatal(f"{package} is not installed", install_requirements()))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", version)[:2])
