"""`saap methods`: the steps, estimators and recipes that chains are made of, and what one of them does."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from saap_jax.cli.blocks import show_blocks, show_facts
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.recipes import RECIPES, Recipe
from saap_jax.report.blocks import text_table
from saap_jax.steps import known as _known  # noqa: F401  the package's own steps are registered
from saap_jax.steps.base import STEPS, Step, default_of, literal
from saap_jax.steps.score.oracles import ORACLES

KINDS = ("score", "limits", "allocation", "refinement", "repair")


def show_methods(names: tuple[str, ...]) -> None:
    """List what chains are made of; with names, what each is.

    Raises:
        ValueError: no step, estimator or recipe of a name; the nearest one is suggested.
    """
    scores: Mapping[str, Any] = {**ESTIMATORS, **ORACLES}
    if not names:
        steps = sorted(STEPS.items(), key=lambda each: KINDS.index(each[1].kind))
        rows = [(each.kind, name, _first(each)) for name, each in steps]
        show_blocks(text_table("steps", ["kind", "step", "what it does"], rows, words=3))
        rows = [(name, _first(each)) for name, each in scores.items()]
        show_blocks(text_table("estimators, which are scores", ["estimator", "what it does"], rows, words=2))
        rows = [(name, each.title, each.paper, "no" if each.missing else "yes") for name, each in RECIPES.items()]
        show_blocks(text_table("recipes", ["recipe", "method", "paper", "runs"], rows, words=4))
    for name in names:
        if name in RECIPES:
            show_facts(f"{name}: {RECIPES[name].title}", recipe_facts(RECIPES[name]))
        elif name in STEPS:
            show_facts(f"{name}: a step ({STEPS[name].kind})", step_facts(STEPS[name]))
        elif name in scores:
            show_facts(f"{name}: an estimator", estimator_facts(scores[name]))
        else:
            near = difflib.get_close_matches(name, [*STEPS, *scores, *RECIPES], n=1, cutoff=0.0)[0]
            raise ValueError(f"expected a step, an estimator or a recipe, got {name!r}; did you mean {near!r}?")


def _first(made: Any) -> str:
    return (inspect.getdoc(made) or "").partition("\n")[0]


def _paragraphs(made: Any) -> list[tuple[str, str]]:
    """Return the paragraphs of a docstring as rows."""
    parts = [" ".join(part.split()) for part in (inspect.getdoc(made) or "").split("\n\n")]
    return [("what it does" * (not number), part) for number, part in enumerate(parts)]


def step_facts(kind: type[Step]) -> list[tuple[str, str]]:
    """Return what a step does, and its options with what they mean."""
    docs, fields = field_docs(kind), [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    options = [(f"{field.name} = {literal(default_of(field))}", docs.get(field.name, "")) for field in fields]
    return [*_paragraphs(kind), *options]


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and of those that it is made of."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        lines = inspect.getsource(each).splitlines() if dataclasses.is_dataclass(each) else []
        for at, line in enumerate(lines[:-1]):
            name, colon, _ = line.strip().partition(":")
            if colon and name.isidentifier() and lines[at + 1].strip().startswith('"""'):
                rest = "\n".join(lines[at + 1 :]).strip().removeprefix('"""')
                found[name] = " ".join(rest.partition('"""')[0].split())
    return found


def estimator_facts(factory: Any) -> list[tuple[str, str]]:
    """Return what an estimator does, and its hyper-parameters."""
    options = inspect.signature(factory).parameters.values()
    return _paragraphs(factory) + [("option", f"{each.name} = {literal(each.default)}") for each in options]


def recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return what a recipe is made of, where it differs from its paper, and what the paper reports."""
    rows = [("paper", recipe.paper)]
    if recipe.missing:
        return [*rows, ("cannot be run", recipe.missing)]
    rows += [("chain", recipe.chain), ("calibrates on", recipe.calibration)]
    rows += [("differs", said) for said in recipe.deviations]
    for figure in recipe.published:
        dense = "" if figure.dense is None else f", dense {figure.dense:g}"
        about = f", {figure.about}" if figure.about else ""
        rows.append(
            ("published", f"{figure.model}, {figure.ratio:.0%}{about}: {figure.metric} {figure.value:g}{dense}")
        )
    return rows
