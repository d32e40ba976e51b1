"""Recipes: named chains that say where they are from, run beside other chains, and are told by a command."""

import re

import pytest

from saap_jax.cli.main import main
from saap_jax.recipes.base import Recipe
from saap_jax.recipes.registry import RECIPES, register
from saap_jax.steps.chain import parse

RUN = [name for name, recipe in RECIPES.items() if not recipe.missing and not recipe.repair]
REPAIRS = [name for name, recipe in RECIPES.items() if recipe.repair]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in REPAIRS])
def test_every_recipe_says_where_it_is_from_and_is_a_chain(name):
    recipe = RECIPES[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", recipe.paper) or name in ("fast", "default", "homogeneous")
    assert recipe.calibration
    assert all(said.endswith(".") for said in recipe.deviations)
    for figure in recipe.published:
        assert 0 < figure.ratio < 1
        assert figure.value > 0
        assert "ppl" not in figure.metric or re.search(r"ppl@\d+", figure.metric)
    if recipe.missing:
        with pytest.raises(ValueError, match=re.escape(f"{name} cannot be run: {recipe.missing}")):
            parse(name)
        return
    chain = parse(name)
    assert chain.name == name
    assert chain.steps == parse(recipe.chain).steps == parse(chain.written).steps


@pytest.mark.parametrize("name", REPAIRS)
def test_repairs_follow_any_chain_and_none_alone(name):
    chain = parse(f"wanda > uniform > {name}")
    assert chain.steps == parse(f"wanda > uniform > {RECIPES[name].chain}").steps
    assert {step.kind for step in chain.steps[2:]} == {"repair", "text"}
    assert parse(f"modegpt-mlp > {name}").steps[: len(parse("modegpt-mlp").steps)] == parse("modegpt-mlp").steps
    with pytest.raises(ValueError, match=f"{name} only repairs: expected a chain before it, such as wanda > {name}"):
        parse(name)


@pytest.mark.parametrize("name", ["fast", "default", "homogeneous"])
def test_ours_say_what_was_chosen_on_a_model(name):
    """As options, which are as usual: what stands in their chains without them is the same chain."""
    said = "least_squares(noise=8, blend=0.3)"
    chain = RECIPES[name].chain.replace("reconstruct", RECIPES["reconstruct"].chain)
    assert said in chain
    assert parse(chain.replace(said, "least_squares")).written == parse(name).written
    assert parse(chain.replace(said, "least_squares(noise=4)")).written != parse(name).written, "control"


def test_what_differs_between_recipes_is_told_apart():
    assert len({parse(name).written for name in RUN}) == len(RUN)


def test_a_recipe_has_a_chain_or_a_reason_and_a_name_of_its_own():
    about = {"title": "nothing", "paper": "arXiv:0000.00000", "calibration": "none"}
    for given in ({}, {"chain": "wanda", "missing": "it rotates"}):
        with pytest.raises(ValueError, match="recipe 'nothing': expected a chain, or why it cannot be run"):
            Recipe(**about, **given)
    for name, said in (("flap", "'flap' exists already"), ("A b", "expected a name of small letters, digits and hyph")):
        with pytest.raises(ValueError, match=said):
            register(name, Recipe(**about, chain="wanda"))


def test_a_command_tells_a_recipe_with_its_chain_and_deviations(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES)
    assert main(["methods", "flap"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("fluctuation(standardize=True)", "bias(propagate=dense, tokens=equal)", "WikiText-2 ppl@128 14.62"):
        assert part in said
    assert all(each in said for each in RECIPES["flap"].deviations)
    assert main(["methods", "flop"]) == 2
    assert "did you mean 'flap'?" in capsys.readouterr().err
