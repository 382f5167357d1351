"""What must not stand in the source: calls that run foreign code, and hosts that a lock file must not name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FORBIDDEN = {
    "torch.load": r"\btorch\.load\(",
    "pickle": r"^\s*(import|from) (pickle|dill|cloudpickle|shelve)\b|\bpickle\.(load|dump)",
    "yaml.load": r"\byaml\.(unsafe_)?load\(",
    "a shell": r"shell\s*=\s*True|\bos\.system\(",
    "extractall": r"\.extractall\(",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
}


@pytest.mark.parametrize("what", list(FORBIDDEN))
def test_the_source_does_not_use(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_rules_would_find_something() -> None:
    examples = ("torch.load(x)", "import pickle", "yaml.load(x)", "run(x, shell=True)", "tar.extractall()", "exec(x)")
    for example, pattern in zip(examples, FORBIDDEN.values(), strict=True):
        assert re.search(pattern, example, re.MULTILINE)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_requirement_is_exact_and_hashed_and_names_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    requirements = re.findall(r"^(\S+?)==([^\s;]+)(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(requirements) > 80
    assert all("--hash=sha256:" in rest for _, _, rest in requirements)
    assert "://" not in text


def test_the_plain_way_has_the_versions_of_the_lock_file() -> None:
    pins = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
    locked = set(pins.findall((ROOT / "requirements.lock").read_text()))
    plain = set(pins.findall((ROOT / "requirements.txt").read_text()))
    assert len(plain) > 50
    assert plain == locked
    assert locked < set(pins.findall((ROOT / "requirements-dev.lock").read_text()))
