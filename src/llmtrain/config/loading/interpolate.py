"""`${oc.env:NAME}`, `${oc.env:NAME,default}` and `${sysconfig:stdlib}` in the strings of a config.

A string that is one `${oc.env:…}` and nothing else is read as a YAML scalar, so that a number stays a number.
`$${` stands for `${` itself. There are no references between keys.
"""

from __future__ import annotations

import os
import re
import sysconfig

from llmtrain.config.loading.tree import ConfigFault, Tree, config_error, read_scalar
from llmtrain.config.loading.walk import dotted

PATTERN = re.compile(r"\$\$\{|\$\{(?P<inside>[^{}]*)\}|\$\{")
RESOLVERS = "${oc.env:NAME}, ${oc.env:NAME,default} and ${sysconfig:stdlib}"


def interpolate(tree: Tree) -> None:
    """Replace every interpolation in the tree's strings. Raises one ConfigError for all that cannot be replaced."""
    faults: list[ConfigFault] = []
    for path, text in tree.leaves():
        if not isinstance(text, str) or "${" not in text:
            continue
        try:
            whole = PATTERN.fullmatch(text)
            if whole and text.startswith("${oc.env:"):
                written = _resolve(whole["inside"])
                value = read_scalar(written)
                if not isinstance(value, str):
                    tree.texts[path] = written
            else:
                value = PATTERN.sub(_replacement, text)
        except ValueError as error:
            faults.append(ConfigFault(tree.place_of(path), dotted(path), str(error)))
        else:
            tree.put(path, value)
    if faults:
        raise config_error(faults)


def escape(text: str) -> str:
    """Return text that `interpolate` turns back into `text`."""
    return text.replace("${", "$${")


def _replacement(match: re.Match[str]) -> str:
    if match[0] == "$${":
        return "${"
    if match["inside"] is None:
        raise ValueError("${ without its }; $${ stands for ${ itself")
    return _resolve(match["inside"])


def _resolve(inside: str) -> str:
    resolver, colon, argument = inside.partition(":")
    if not colon:
        raise ValueError(f"${{{inside}}} is not known; there are {RESOLVERS} (and $${{ for ${{ itself)")
    if resolver == "oc.env":
        name, comma, default = (part.strip() for part in argument.partition(","))
        value = os.environ.get(name)
        if value is None and not comma:
            raise ValueError(f"the environment variable {name} is not set; set it, or write ${{oc.env:{name},default}}")
        return default if value is None else value
    if resolver == "sysconfig":
        if argument not in sysconfig.get_path_names():
            raise ValueError(f"${{{inside}}}: sysconfig knows {', '.join(sysconfig.get_path_names())}")
        return sysconfig.get_path(argument)
    raise ValueError(f"${{{inside}}}: there is no resolver {resolver!r}; there are {RESOLVERS}")
