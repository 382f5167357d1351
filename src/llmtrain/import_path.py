"""Finds what a user names by import path, `package.module:Name`: a model, data, an adapter, a sink, a metric."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError


def import_callable(path: str, *, key: str) -> Callable[..., Any]:
    """The class or function at `package.module:Name`; modules of the working folder are found too.

    `key` is where the config names it. Raises ConfigError if it cannot be imported or is not there.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the program's script has its own folder there, and not the user's
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}: {module_name} cannot be imported ({what_failed(error)}); modules are looked for among the "
            f"installed packages and in {os.getcwd()}, where the command was started"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name} has no function or class {name!r}")
    return found  # type: ignore[no-any-return]


def code_sha256(path: str) -> str | None:
    """Return a hash of the module in `path` and of the modules of the same package or folder that it imports.

    Those that these import count too, also inside functions; libraries do not. A module alone has the hash of its file.
    None if the module has no file.
    """
    first = path.partition(":")[0]
    found: dict[str, bytes] = {}
    wanted = [first]
    while wanted:
        name = wanted.pop()
        spec = None if name in found else _spec(name)
        if spec is None or not spec.origin or not os.path.isfile(spec.origin) or not _is_beside(name, first):
            continue
        found[name] = Path(spec.origin).read_bytes()
        if spec.origin.endswith(".py"):
            wanted += _imported(found[name], package=name if spec.submodule_search_locations else spec.parent or "")
    if first not in found:
        return None
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    return hashes[first] if len(hashes) == 1 else hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()


def _imported(source: bytes, *, package: str) -> Iterator[str]:
    """Yield the names of what a module of `package` imports, and of the packages that they are in."""
    with suppress(SyntaxError, ValueError):  # of a module that nothing has imported yet
        for node in ast.walk(ast.parse(source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _spec(name: str) -> ModuleSpec | None:
    """Find a module without importing it or its packages."""
    package = name.rpartition(".")[0]
    if package:
        above = _spec(package)
        places = above.submodule_search_locations if above else None
        return PathFinder.find_spec(name, list(places)) if places else None
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # the program's own __main__
        return None


def _is_beside(name: str, first: str) -> bool:
    """Return whether two modules are of one package, or stand in one folder that is not that of the libraries."""
    tops = name.partition(".")[0], first.partition(".")[0]
    if tops[0] == tops[1]:
        return True
    ours, theirs = map(_folder_of, tops)
    return ours is not None and ours == theirs and ours not in map(Path, sysconfig.get_paths().values())


def _folder_of(top: str) -> Path | None:
    spec = _spec(top)
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return None
    return Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else str(spec.origin)).parent


def what_failed(error: BaseException) -> str:
    """Return an error of the user's code in a line: its type, its message, and the file:line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    theirs = os.path.isfile(frame.filename) and not frame.filename.startswith(os.path.dirname(__file__))
    return f"{type(error).__name__}: {error}" + (f" at {frame.filename}:{frame.lineno}" if theirs else "")
