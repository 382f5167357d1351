"""The command: see the package, and docs/performance.md.

python -m benchmarks.gpu                        the document on stdout, a table on stderr; exit 1 if a check failed
python -m benchmarks.gpu --smoke                the logic alone, with tiny sizes on a CPU
python -m benchmarks.gpu --collect [NAME …]     wheels for a machine without network, in artifacts/wheels
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.document import Recorder
from benchmarks.gpu.parent import GRACE_SECONDS, BenchSection, run_sections, table_of
from benchmarks.gpu.wheels import ROOT, WHEELS, collect, install_missing

TOTAL_SECONDS = 560.0
SHARES = {
    "ceilings": 15,
    "correctness": 135,
    "torchrun": 50,
    "attention": 65,
    "speeds": 120,
    "tuning": 75,
    "peers": 100,
}
"""Seconds of each section, in their order."""
WITH_CHECKS = ("correctness", "torchrun")


def main() -> int:
    """Parse, and do one of: collect wheels, run one section, run all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all sections together")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="SECTION")
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts" / "gpu.json")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="folder of the wheels")
    parser.add_argument("--collect", nargs="*", metavar="NAME", help="download wheels; NAMES besides the usual ones")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.collect is not None:
        print(json.dumps(collect(arguments.wheels, arguments.collect)))
        return 0
    if arguments.section is not None:
        run_one(arguments.section, smoke=arguments.smoke, work=arguments.work, file=arguments.out)
        return 0
    return run_all(arguments)


def run_one(name: str, *, smoke: bool, work: Path, file: Path) -> None:
    """Run a section in this process."""
    from benchmarks.gpu.setting import Setting

    section = importlib.import_module(f"benchmarks.gpu.{name}")
    section.measure(Setting(smoke=smoke, work=work, recorder=Recorder(file, name)))


def run_all(arguments: argparse.Namespace) -> int:
    """Run the sections, print what they found, and return the exit code."""
    until = time.monotonic() + arguments.seconds - GRACE_SECONDS  # the last section may need them to end
    if not arguments.smoke and not _has_gpu():
        print("no CUDA device here: --smoke runs the kit with tiny sizes on a CPU", file=sys.stderr)
        return 2
    out = arguments.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        installed = Path(work) / "packages"
        found = install_missing(arguments.wheels, installed)
        words = ["--work", work, "--out", str(out), *(["--smoke"] if arguments.smoke else [])]
        sections = [
            BenchSection(
                name=name,
                seconds=SHARES[name] * arguments.seconds / TOTAL_SECONDS,
                command=[sys.executable, "-m", "benchmarks.gpu", "--section", name, *words],
                has_checks=name in WITH_CHECKS,
            )
            for name in SHARES
            if name in arguments.only
        ]
        document = run_sections(
            sections,
            out,
            seconds=until - time.monotonic(),
            environment=_environment(installed, work=work, smoke=arguments.smoke),
            header={"benchmark": "gpu", "smoke": arguments.smoke, "installed_from_wheels": found},
        )
    print(json.dumps(document))
    print(table_of(document), file=sys.stderr)
    return 0 if document["passed"] else 1


def _environment(installed: Path, *, work: str, smoke: bool) -> dict[str, str]:
    """Return the environment of the sections, which find the project wherever it lies."""
    paths = [str(installed), str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": work,
    }
    if smoke:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return environment


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    raise SystemExit(main())
