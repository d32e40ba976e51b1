"""Published methods by name, one file each: `RECIPES` of every module of this package.

A recipe says which parts of the library make the method: the estimator, how the budget is shared, what is left alone,
whether scores are estimated again, and how the rest is corrected. `saap recipes` lists them, `saap compare --recipes`
runs them beside other variants on the same text. A new one is a file here that exports `RECIPES = {NAME: Recipe(...)}`,
or a call of `register` in a CONFIG.py.
"""

import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from saap_jax.recipes.base import Published, Recipe

__all__ = ["Published", "Recipe", "find_recipes", "recipe_named", "recipes", "register"]

ALL = "all"
"""Stands for every recipe that can be run."""


RECIPES: dict[str, Recipe] = {}
"""Those that were added by `register`."""


def register(name: str, recipe: Recipe) -> Recipe:
    """Add a recipe, so that `--recipes` and `saap recipes` know it.

    Raises:
        ValueError: the name is none, or is taken by another recipe.
    """
    if recipes().get(name, recipe) is not recipe:
        raise ValueError(f"recipes: {name!r} exists already; choose another name")
    RECIPES[_checked(name)] = recipe
    return recipe


def recipes() -> Mapping[str, Recipe]:
    """Return every recipe by name, in the order of the names.

    Raises:
        ValueError: a file of this package with a name that is none, or that another has.
    """
    return MappingProxyType(dict(sorted((_files() | RECIPES).items())))


@functools.cache
def _files() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        for name, recipe in getattr(importlib.import_module(f"{__name__}.{module.name}"), "RECIPES", {}).items():
            if name in found:
                raise ValueError(f"recipes: expected each name once, got {name!r} again in {module.name}.py")
            found[_checked(name)] = recipe
    return found


def _checked(name: str) -> str:
    if name == ALL or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"recipes: expected a name of small letters, digits and hyphens, got {name!r}")
    return name


def recipe_named(name: str) -> Recipe:
    """Return a recipe, also one that cannot be run.

    Raises:
        ValueError: an unknown name; the nearest one is suggested.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, [ALL, *known], n=1, cutoff=0.0)[0]
        raise ValueError(f"recipes: unknown recipe {name!r}; did you mean {near!r}? `saap recipes` lists them")
    return known[name]


def find_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """Return recipes that can be run, by name; `all` stands for every one.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), one that cannot be run, or one that is named twice.
    """
    known, asked = recipes(), list(names)
    found: dict[str, Recipe] = {}
    for name in asked:
        if name != ALL and (missing := recipe_named(name).missing):
            raise ValueError(f"recipes: {name} cannot be run: {missing}")
        if asked.count(name) > 1:
            raise ValueError(f"recipes: expected each name once, got {name!r} {asked.count(name)} times")
        new = [each for each in known if not known[each].missing] if name == ALL else [name]
        found |= {each: known[each] for each in new}
    return found
