"""What words of a command stand for, told without jax: names of options, lists with commas, names of what there is.

Loading jax takes seconds. So a word that nobody knows is answered from the sources alone, which are text.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saap_jax.config.jobs import JobConfig
from saap_jax.config.method import PACKAGED_MODELS, is_factory
from saap_jax.config.packaged import packaged
from saap_jax.data.windows import parse_scenario
from saap_jax.recipes.registry import RECIPES

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
        hint, name = hints[field.name], f"{prefix}{field.name}".replace("_", "-")
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
            found += [each for each in word.split(",") if each] if numbers else [word]
            continue
        typed, equals, value = word[2:].partition("=")
        name = _known(typed.replace("_", "-"), known)
        numbers = bool(re.search(r"tuple\[(int|float)", str(known.get(name))))
        found += [f"--{name}", *value.split(",")] if numbers and value else [f"--{name}{equals}{value}"]
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
    hint = f"; did you mean --{near[0] if near[0] in known else parts[near[0]]}?" if near else ""
    raise ValueError(f"unknown option --{typed}{hint} (--help lists all)")


# --- names of methods, models and texts ----------------------------------------------------------

_MADE = re.compile(
    r'^@step\("(\w+)"|^def ([a-z]\w*)\(\s*(?:\*(?:(?!^def ).)*?)?\) -> (?:Estimator|Oracle):', re.M | re.S
)
"""A step, or the factory of an estimator, in the source of its file."""


@functools.cache
def steps_and_estimators() -> tuple[str, ...]:
    """Read the names of the package's steps, estimators and recipes."""
    package = Path(__file__).parents[1]
    files = [*package.glob("steps/**/*.py"), *package.glob("estimation/*.py")]
    made = [name for file in files for pair in _MADE.findall(file.read_text("utf-8")) for name in pair if name]
    return (*made, *RECIPES)


def check_names(config: Any) -> None:
    """Raise ValueError for a method, estimator, model or text of a configuration that there is not, as far as that
    can be told by its name alone."""
    if isinstance(config, JobConfig) and "saap_jax.steps.chain" not in sys.modules:  # else it knows more
        for name in ("methods", "method", "estimators"):
            value = getattr(config, name, ())
            for text in (value,) if isinstance(value, str) else value:
                _check_chain(text)
    for model in _models(config):
        plain = re.fullmatch(r"[\w.-]+", model) and not is_factory(model) and not Path(model).exists()
        if plain and model not in PACKAGED_MODELS:
            near = difflib.get_close_matches(model, PACKAGED_MODELS, 1)
            raise ValueError(
                f"{model}: no such file or directory, and not a model name (expected {' or '.join(PACKAGED_MODELS)}, a "
                f".gguf file, a directory or a hub name 'org/name'){f'; did you mean {near[0]}?' if near else ''}"
            )
    if not getattr(getattr(config, "model", None), "traced", False):
        for text in getattr(getattr(config, "calibration", None), "scenarios", ()):
            parse_scenario(text)


def _models(config: Any) -> Iterator[str]:
    model = getattr(config, "model", "")
    if hasattr(config, "target"):  # of `plan`, which knows models by their sizes
        return
    yield from (getattr(model, "name", model), *getattr(config, "models", ()), getattr(config, "dense", ""))


def _check_chain(text: str) -> None:
    outside, count = re.sub(r"^\s*[\w.+-]+\s*=(?!=)", "", text), 1
    while count:  # options in brackets are their step's
        outside, count = re.subn(r"\([^()]*\)", "", outside)
    words = re.findall(r"(?<![\w.])[A-Za-z_][\w-]*", outside) if ".py" not in outside else []
    groups = ("saap_jax.steps", "saap_jax.estimators")
    for word in words:
        known = (*steps_and_estimators(), "none")
        if word in known or any(importlib.metadata.entry_points(group=group, name=word) for group in groups):
            continue
        near = repr(difflib.get_close_matches(word, [*known, *packaged()], 1, cutoff=0.0)[0])
        meant = f"--model {text}" if text in PACKAGED_MODELS or os.path.exists(text) else near
        raise ValueError(
            f"unknown step {word!r}; did you mean {meant}? `saap methods` lists steps, estimators and recipes"
        )
