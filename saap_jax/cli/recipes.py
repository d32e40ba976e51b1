"""`saap recipes`: the published methods that `saap compare --recipes` runs, and what each is made of."""

import dataclasses

from saap_jax.cli.blocks import show_blocks, show_facts
from saap_jax.cli.console import show_lines
from saap_jax.cli.failures import UsageError
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.method import FusionConfig
from saap_jax.config.search import SearchConfig
from saap_jax.recipes import Recipe, recipe_named, recipes
from saap_jax.report.page.blocks import text_table
from saap_jax.runs.commands import options

USAGE = """\
usage: saap recipes [NAME ...]

List the published methods that `saap compare --recipes NAME ...` (or `all`) runs beside other variants; with names,
print what each is made of, where it differs from its paper, and what the paper reports."""


def run(words: list[str]) -> None:
    """Run `saap recipes`.

    Raises:
        UsageError: an option.
        ValueError: no such recipe.
    """
    if set(words) & {"-h", "--help"}:
        show_lines(USAGE)
        return
    if wrong := [word for word in words if word.startswith("-")]:
        raise UsageError(f"recipes: expected names of recipes and no options, got {' '.join(wrong)}")
    if not words:
        rows = [(name, each.title, each.paper, "no" if each.missing else "yes") for name, each in recipes().items()]
        table = text_table("recipes", ["name", "method", "paper", "runs"], rows, words=4)
        return show_blocks(table)
    for name, recipe in {name: recipe_named(name) for name in words}.items():
        show_facts(f"{name}: {recipe.title}", facts(recipe))


def facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return what a recipe is made of, each with what it is."""
    parts = {"search": SearchConfig(), "fusion": FusionConfig(), "compensation": CompensationConfig()}
    words = [
        word
        for name, usual in parts.items()
        for word in options(dataclasses.asdict(getattr(recipe, name)), usual, f"{name}.")
    ]
    rows = [("paper", recipe.paper)]
    if recipe.missing:
        return [*rows, ("cannot be run", recipe.missing)]
    rows += [("estimator", recipe.estimator), ("options", " ".join(words) or "none")]
    rows += [("calibrates on", recipe.calibration), *(("differs", said) for said in recipe.deviations)]
    for figure in recipe.published:
        dense = "" if figure.dense is None else f", dense {figure.dense:g}"
        about = f", {figure.about}" if figure.about else ""
        rows.append(
            ("published", f"{figure.model}, {figure.ratio:.0%}{about}: {figure.metric} {figure.value:g}{dense}")
        )
    return rows
