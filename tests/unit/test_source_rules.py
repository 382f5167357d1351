"""What must not stand in the source: calls that run foreign code, and hosts that a lock file must not name."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
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
COUNTS_CORES = re.compile(r"\b(process_)?cpu_count\b|\bsched_getaffinity\b|\bcpu_affinity\b")


@pytest.mark.parametrize("what", list(FORBIDDEN))
def test_the_source_does_not_use(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_cores_are_counted_in_one_file() -> None:
    """Others would count those of the machine, where affinity or a quota leaves this process fewer."""
    found = {path.name for path in SOURCES if COUNTS_CORES.search(path.read_text(encoding="utf-8"))}
    assert found == {"limits.py"}


def test_the_rules_would_find_something() -> None:
    examples = ("torch.load(x)", "import pickle", "yaml.load(x)", "run(x, shell=True)", "tar.extractall()", "exec(x)")
    for example, pattern in zip(examples, FORBIDDEN.values(), strict=True):
        assert re.search(pattern, example, re.MULTILINE)


MAX_FILE_LINES = 500
MAX_VERB_LINES = 150
MAX_FUNCTION_LINES = 60
MAX_STORY_LINES = 100
"""Of the training loop and the verbs, which are read from top to bottom."""
MAX_PARAMETERS = 8
STORIES = {"llmtrain/training/loop.py"}


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_are_short_enough_to_read() -> None:
    found = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT / "src"))
        is_verb = name.startswith("llmtrain/verbs/")
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > (MAX_VERB_LINES if is_verb else MAX_FILE_LINES):
            found.append(f"{name} has {num_lines} lines")
        longest = MAX_STORY_LINES if is_verb or name in STORIES else MAX_FUNCTION_LINES
        for function in functions_of(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > longest:
                found.append(f"{name}: {function.name} has {length} lines")
    assert found == []


def test_functions_have_few_parameters() -> None:
    """Of the command line each option is a parameter, so its functions may have more."""
    found = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT / "src"))
        if name.startswith("llmtrain/cli/"):
            continue
        for function in functions_of(path):
            given = function.args
            names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            if len(set(names) - {"self", "cls"}) > MAX_PARAMETERS:
                found.append(f"{name}: {function.name} has {len(names)} parameters")
    assert found == []


def test_a_name_of_a_class_means_one_thing() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT / "src")))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


NO_BEGINNINGS = frozenset(
    (
        "As",
        "By",
        "For",
        "From",
        "How",
        "In",
        "Of",
        "On",
        "That",
        "To",
        "What",
        "When",
        "Where",
        "Whether",
        "Which",
        "Who",
    )
)
"""First words of a docstring that leave its reader without a verb or a noun that names the thing."""


def docstrings_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, those of attributes and constants too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield statement.lineno, str(statement.value.value).strip()


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "deploy").rglob("*.py")]
        for line, text in docstrings_of(path)
        if text.split(maxsplit=1)[0] in NO_BEGINNINGS
    ]
    assert found == []


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
