"""`saap recipes`: the published methods that `saap compare --recipes` runs, and what each is made of."""

import dataclasses

from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.method import FusionConfig
from saap_jax.config.search import SearchConfig
from saap_jax.recipes import Recipe
from saap_jax.runs.commands import options


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
