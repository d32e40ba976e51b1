"""Published methods by name, and ours as `default`: `RECIPES` of every module of this package.

A recipe is a named chain of steps with its source and what differs from it. `saap methods` lists them; a name stands
for its chain wherever chains are written. A new one is an entry of a file here, a file that exports `RECIPES`, or a
call of `register` in a CONFIG.py.
"""

import importlib
import pkgutil
import re

from saap_jax.recipes.base import Published, Recipe

__all__ = ["RECIPES", "Published", "Recipe", "register"]

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


for _module in pkgutil.iter_modules(__path__):
    for _name, _recipe in getattr(importlib.import_module(f"{__name__}.{_module.name}"), "RECIPES", {}).items():
        register(_name, _recipe)
