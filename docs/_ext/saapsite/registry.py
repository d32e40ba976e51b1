"""What registries say of estimators, steps and recipes, as Markdown. Needs no Sphinx."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, get_args

from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.jobs.methods import recipe_facts, step_facts
from saap_jax.recipes.base import Recipe
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.base import STEPS, Kind, Step
from saap_jax.steps.score.oracles import ORACLES

_PARTS = re.compile(r"(?:(?P<source>Sources?): )|(?P<deviation>Deviations?: )|(?P<end>Raises:)")
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_FORMULA = re.compile(r"^\$\$$.+?^\$\$ \(formula-([a-z-]+)\)$", re.M | re.S)
_ROW = re.compile(r"^```\{estimator\} (\w+)\n(?::source: (.+)\n)?(?::deviation: (.+)\n)?```$", re.M)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the code says of an estimator."""

    needs: tuple[str, ...]
    """Names of the statistics of its pass; none of what makes passes of its own, or looks at no text."""
    passes: bool
    """Whether it makes passes of its own."""
    options: tuple[tuple[str, str, str], ...]
    """Hyper-parameters: name, what it takes, default."""
    source: str
    deviation: str


def factories() -> dict[str, Callable[..., Any]]:
    """Return the factory of each estimator that is registered, and of each that judges by passes of its own."""
    return {**ESTIMATORS, **ORACLES}


def facts(name: str) -> Facts:
    """Return what the code says of an estimator.

    Raises:
        KeyError: none of that name.
    """
    factory = factories()[name]
    needs = () if name in ORACLES else tuple(sorted(each.name for each in factory().needs))
    options = tuple(
        (each.name, _taken(each.annotation), repr(each.default))
        for each in inspect.signature(factory).parameters.values()
    )
    return Facts(needs, name in ORACLES, options, *cited(factory.__doc__ or ""))


def cited(docstring: str) -> tuple[str, str]:
    """Return the source that a docstring names, and its deviations from it; empty where it says nothing.

    >>> cited("Score it. Source: Wanda, equation 1. Deviation: units.")
    ('Wanda, equation 1.', 'units.')
    >>> cited("Score it.")
    ('', '')
    """
    text = " ".join(docstring.split())
    starts = [*_PARTS.finditer(text)]
    parts = {"source": "", "deviation": ""}
    for start, end in zip(starts, [*(each.start() for each in starts[1:]), len(text)], strict=False):
        if (name := start.lastgroup) in parts:
            parts[name] = text[start.end() : end].strip()
    return parts["source"], parts["deviation"]


def estimator_rows(name: str, source: str = "", deviation: str = "") -> Iterator[tuple[str, str]]:
    """Yield what a page says of an estimator, in Markdown: words given here come before the docstring's."""
    said = facts(name)
    if said.passes:
        yield "Looks at", "the examples, in forward passes of its own"
    else:
        yield "Statistics", ", ".join(f"`{each}`" for each in said.needs) or "none"
    if said.options:
        listed = (f"`{option}={default}` ({taken})" for option, taken, default in said.options)
        yield "Hyper-parameters", "; ".join(listed)
    given = linked(source or said.source)
    yield "Source", given[:1].upper() + given[1:]
    if given := linked(deviation or said.deviation):
        yield "Deviation", given[:1].upper() + given[1:]


def recipe_rows() -> Iterator[tuple[str, Recipe, list[tuple[str, str]]]]:
    """Yield each recipe with its facts, as `saap methods NAME` shows them; those that can be run first."""
    for name, recipe in sorted(RECIPES.items(), key=lambda item: bool(item[1].missing)):
        yield name, recipe, [(label, linked(text)) for label, text in recipe_facts(recipe)]


def step_rows() -> Iterator[tuple[str, type[Step], list[tuple[str, str]]]]:
    """Yield each step of chains with its options, as `saap methods NAME` shows them, in the order of a chain."""
    for name, kind in sorted(STEPS.items(), key=lambda item: get_args(Kind).index(item[1].kind)):
        yield name, kind, step_facts(kind)


def linked(text: str) -> str:
    """Make links of the papers that a text names."""
    return _PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def missing_rows(page: str) -> list[str]:
    """Return a line for each estimator without formula, row or source on a page of formulas, and for rows of no one."""
    known, formulas = factories(), _FORMULA.findall(page)
    rows = {name: source for name, source, _ in _ROW.findall(page)}
    found = [f"{name}: expected an estimator, got a row of none" for name in rows if name not in known]
    for name in known:
        if name not in rows:
            found.append(f"{name}: expected an estimator block, found none")
        elif not (facts(name).source or rows[name]):
            found.append(f"{name}: expected a source in its docstring or its block, found none")
        if name.replace("_", "-") not in formulas:
            found.append(f"{name}: expected a formula labelled formula-{name.replace('_', '-')}, found none")
    return found


def _taken(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(annotation))
    kinds = typing.get_args(annotation) or (annotation,)
    return " or ".join("none" if each is type(None) else each.__name__ for each in kinds)
