"""What words of a command stand for: options by other names that people type, and lists with commas."""

import dataclasses
import difflib
import re
import typing
from typing import Any

SAME = (
    ("model", "model.name"),
    ("methods", "method", "method.name", "recipes", "recipe"),
    ("ratio", "ratios"),
    ("seeds", "seed", "calibration.seed"),
)
"""Names of one thing: where a command has another one of them than was typed, that one is meant."""

MEANT = {"estimators": "methods", "sparsity": "ratio", "output": "out", "output-dir": "out", "dataset": "scenarios"}
"""What people type, and what it is called here."""


def options_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """List the options of a configuration: the type of each by its name, with dots and hyphens.

    >>> from saap_jax.config.use import PlanConfig
    >>> [name for name in options_of(PlanConfig) if name.startswith("mesh.")][:2]
    ['mesh.data', 'mesh.fsdp']
    """
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = f"{prefix}{field.name}".replace("_", "-")
        for each in getattr(hint, "__metadata__", ()):  # a name of its own, which tyro takes too
            name = getattr(each, "name", None) or name
        if dataclasses.is_dataclass(hint):
            found |= options_of(hint, f"{name}.")
        else:
            found[name] = hint
    return found


def named_well(words: list[str], known: dict[str, Any]) -> list[str]:
    """Write options by the names that a command has for them, and lists with commas word by word.

    >>> from saap_jax.config.jobs import CompareConfig
    >>> named_well(["--ratio", "0.2,0.5", "--model.name=m"], options_of(CompareConfig))
    ['--ratios', '0.2', '0.5', '--model=m']

    Raises:
        ValueError: an option that there is not; the one that may be meant is named.
    """
    found: list[str] = []
    numbers = False
    for word in words:
        if not word.startswith("--") or word == "--":
            if numbers:
                found += [each for each in word.split(",") if each]
            else:
                found += [word]
            continue
        typed, equals, value = word[2:].partition("=")
        name = _known(typed.replace("_", "-"), known)
        numbers = bool(re.search(r"tuple\[(int|float)", str(known.get(name))))
        if numbers and value:
            found += [f"--{name}", *value.split(",")]
        else:
            found += [f"--{name}{equals}{value}"]
    return found


def _known(typed: str, known: dict[str, Any]) -> str:
    """Find the option that a name stands for, as it is written: `no-` before the last part of one that can be off."""
    if typed in known or re.sub(r"(^|\.)no-", r"\1", typed) in known or typed.startswith(("help", "tyro-")):
        return typed
    others = [name for group in SAME if typed in group for name in group if name in known]
    if others:
        return others[0]
    parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = [other for other in (MEANT.get(typed, ""), MEANT.get(typed, "") + "s") if other in {*known, *parts}]
    near = near or difflib.get_close_matches(typed, [*known, *parts], 1)
    hint = ""
    if near:
        hint = f"; did you mean --{near[0] if near[0] in known else parts[near[0]]}?"
    raise ValueError(f"unknown option --{typed}{hint} (--help lists all)")
