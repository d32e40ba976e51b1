"""`saap methods`: the steps, estimators and recipes that chains are made of, and what one of them does."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_args

from saap_jax.config.use import MethodsConfig
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.recipes.base import Recipe
from saap_jax.recipes.registry import RECIPES
from saap_jax.report.blocks import Table, text_table
from saap_jax.runtime.progress import Track, quiet
from saap_jax.steps import known as _known  # noqa: F401  the package's own steps are registered
from saap_jax.steps.base import STEPS, Kind, Step, default_of
from saap_jax.steps.score.oracles import ORACLES
from saap_jax.syntax import written


def methods(config: MethodsConfig, *, track: Track = quiet) -> list[Table]:
    """List what chains are made of; with names, what each is.

    Raises:
        ValueError: no step, estimator or recipe of a name; the nearest one is suggested.
    """
    scores: Mapping[str, Any] = {**ESTIMATORS, **ORACLES}
    if not config.names:
        steps = sorted(STEPS.items(), key=lambda each: get_args(Kind).index(each[1].kind))
        recipes = [(name, each.title, each.paper or "ours", _runs(each)) for name, each in RECIPES.items()]
        return [
            text_table("steps", ["kind", "step", "what it does"],
                       [(each.kind, name, _first(each)) for name, each in steps], words=3),
            text_table("estimators, which are scores", ["estimator", "what it does"],
                       [(name, _first(each)) for name, each in scores.items()], words=2),
            text_table("recipes", ["recipe", "method", "paper", "runs"], recipes, words=4),
        ]  # fmt: skip
    found = []
    for name in config.names:
        if name in RECIPES:
            title = RECIPES[name].title
            rows = recipe_facts(RECIPES[name])
        elif name in STEPS:
            title = f"a step ({STEPS[name].kind})"
            rows = step_facts(STEPS[name])
        elif name in scores:
            options = inspect.signature(scores[name]).parameters.values()
            title = "an estimator"
            rows = _paragraphs(scores[name])
            rows += [("option", f"{each.name} = {written(each.default)}") for each in options]
        else:
            near = difflib.get_close_matches(name, [*STEPS, *scores, *RECIPES], n=1, cutoff=0.0)[0]
            raise ValueError(f"expected a step, an estimator or a recipe, got {name!r}; did you mean {near!r}?")
        found.append(text_table(f"{name}: {title}", (), rows, words=2))
    return found


def _runs(recipe: Recipe) -> str:
    """Say how a recipe can be run."""
    if recipe.missing:
        return "no"
    return "after a chain" if recipe.repair else "yes"


def _first(made: Any) -> str:
    return (inspect.getdoc(made) or "").partition("\n")[0]


def _paragraphs(made: Any) -> list[tuple[str, str]]:
    """Lay out the paragraphs of a docstring as rows."""
    parts = [" ".join(part.split()) for part in (inspect.getdoc(made) or "").split("\n\n")]
    return [("what it does" * (not number), part) for number, part in enumerate(parts)]


def step_facts(kind: type[Step]) -> list[tuple[str, str]]:
    """Describe a step and its options."""
    docs = field_docs(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    options = [(f"{field.name} = {written(default_of(field))}", docs.get(field.name, "")) for field in fields]
    return [*_paragraphs(kind), *options]


def field_docs(kind: type) -> dict[str, str]:
    """Read the docstrings below the fields of a class and of its parts."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        lines = []
        if dataclasses.is_dataclass(each):
            lines = inspect.getsource(each).splitlines()
        for at, line in enumerate(lines[:-1]):
            name, colon, _ = line.strip().partition(":")
            if colon and name.isidentifier() and lines[at + 1].strip().startswith('"""'):
                rest = "\n".join(lines[at + 1 :]).strip().removeprefix('"""')
                found[name] = " ".join(rest.partition('"""')[0].split())
    return found


def recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Describe a recipe: its chain, where it differs from its paper, and the paper's figures."""
    rows = [("paper", recipe.paper or "none: ours")]
    if recipe.missing:
        return [*rows, ("cannot be run", recipe.missing)]
    rows += [("chain", recipe.chain), ("calibrates on", recipe.calibration)]
    rows += [("differs", said) for said in recipe.deviations]
    for figure in recipe.published:
        if figure.dense is None:
            dense = ""
        else:
            dense = f", dense {figure.dense:g}"
        about = f", {figure.about}" if figure.about else ""
        rows.append(
            ("published", f"{figure.model}, {figure.ratio:.0%}{about}: {figure.metric} {figure.value:g}{dense}")
        )
    return rows
