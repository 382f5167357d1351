"""Packages that a machine without network lacks, as wheels that travel with the project.

    --collect FOLDER [NAME …]   where there is a network: pip downloads NAMES, in the versions of requirements-dev.lock
    install_missing             on the other machine: those that it lacks or has older, into a folder for sys.path

That machine has torch, transformers, peft and lightning, with what these need; so each wheel comes by itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "artifacts" / "wheels"
NAMES = (
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "ruamel-yaml",
    "lightning-fabric",
    "lightning-utilities",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "nvidia-ml-py",
    "pyarrow",
)
"""Packages besides torch, transformers, peft and what these bring. `trl` and `datasets` are for a peer."""
TARGET = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")


def collect(folder: Path, names: Sequence[str] = ()) -> list[str]:
    """Download the wheels of NAMES and `names` into `folder`; return the requirements."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE))
    pins = {_normal(name): pinned for name, pinned in pins.items()}
    wanted = [_normal(name) for name in (*NAMES, *names)]
    requirements = [f"{name}=={pins[name]}" if name in pins else name for name in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [*TARGET, "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", *platforms, "--dest", str(folder)]
    subprocess.run([*_pip(), "download", "--quiet", *options, *requirements], check=True)
    return requirements


def install_missing(wheels: Path, into: Path) -> list[str]:
    """Install into `into` those of the folder `wheels` that are not here, or older; return their names."""
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _is_here(*wheel.name.split("-")[:2])]
    if missing:
        options = ["--no-index", "--no-deps", "--target", str(into)]
        subprocess.run([*_pip(), "install", "--quiet", *options, *map(str, missing)], check=True, stdout=sys.stderr)
    return [wheel.name.partition("-")[0] for wheel in missing]


def _is_here(name: str, wanted: str) -> bool:
    """Return whether a package is here in this version or a newer one."""
    from packaging.version import Version  # transformers brings it

    try:
        return Version(version(name)) >= Version(wanted)
    except PackageNotFoundError:
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip() -> list[str]:
    """Return the command of a pip; any will do, since the wheels' platform is given."""
    for command in ([sys.executable], *([found] for name in ("python3", "python") if (found := shutil.which(name)))):
        if not subprocess.run([*command, "-m", "pip", "--version"], capture_output=True).returncode:
            return [*command, "-m", "pip"]
    raise SystemExit("wheels need pip, and no Python here has it: install python3-pip")
