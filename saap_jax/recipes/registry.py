"""Published methods by name, and ours as `default`: `RECIPES` of every file of this package.

A recipe is a named chain of steps with its source and what differs from it. `saap methods` lists them; a name stands
for its chain wherever chains are written. A new one is an entry of a file here, a file that exports `RECIPES`, or a
call of `register` in a CONFIG.py.
"""

import importlib
import re

from saap_jax.recipes.base import Recipe

RECIPES: dict[str, Recipe] = {}
"""Every recipe by name."""


def register(name: str, recipe: Recipe) -> Recipe:
    """Add a recipe.

    Raises:
        ValueError: the name is none, or is taken by another recipe.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"recipe: expected a name of small letters, digits and hyphens, got {name!r}")
    if RECIPES.get(name, recipe) is not recipe:
        raise ValueError(f"recipe: {name!r} exists already; choose another name")
    RECIPES[name] = recipe
    return recipe


FILES = ("activations", "blocks", "default", "derivatives", "missing", "reconstruction", "saap", "widths")
"""The files of this package that have `RECIPES`, in the order in which they are listed."""

for _file in FILES:
    for _name, _recipe in importlib.import_module(f"saap_jax.recipes.{_file}").RECIPES.items():
        register(_name, _recipe)
