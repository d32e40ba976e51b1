"""Recipes: named chains that say where they are from, run beside other chains, and are told by a command."""

import json
import re

import numpy as np
import pytest

from saap_jax.cli.main import main
from saap_jax.evaluation.perplexity import keep_digest
from saap_jax.llama.files.load import load_keep
from saap_jax.recipes import RECIPES, Recipe, register
from saap_jax.steps.chain import parse

RUN = [name for name, recipe in RECIPES.items() if not recipe.missing]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_where_it_is_from_and_is_a_chain(name):
    recipe = RECIPES[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", recipe.paper) or name in ("fast", "default", "best")
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


@pytest.fixture(scope="module")
def run(tiny_model_directory, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = [
        *("--model.name", str(tiny_model_directory), "--runs", str(runs), "--name", "run", "--ratios", "0.3"),
        *("--calibration.examples", "8", "--calibration.length", "16", "--calibration.batch-size", "2"),
        *("--evaluation.windows", "4", "--evaluation.length", "16", "--evaluation.batch-size", "2"),
    ]
    names = ("wanda", "flap", "fasp-mlp", "wanda-sp", "minitron", "shortgpt")
    assert main(["compare", *words, "--methods", *names]) == 0
    rows = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    return runs, words, {row["variant"]: row for row in rows if row.get("variant")}


@pytest.mark.slow
def test_a_run_compares_recipes_beside_other_chains(run):
    runs, _, rows = run
    assert set(rows) == {"wanda", "flap", "fasp-mlp", "wanda-sp", "minitron", "shortgpt"}
    assert {name: row["chain"] for name, row in rows.items()} == {name: parse(name).written for name in rows}
    assert len(set(rows["fasp-mlp"]["kept"]["attention"])) == 1, "heads stay"
    page = (runs / "run" / "report.html").read_text()
    assert all(name in page for name in rows)


@pytest.mark.slow
def test_saap_prune_keeps_the_same_units(run, tmp_path):
    _, words, rows = run
    for name in ("flap", "fasp-mlp", "wanda-sp"):
        out, model = str(tmp_path / name), [*words[:4], *words[8:14]]
        assert main(["prune", *model, "--ratio", "0.3", "--no-judge", "--method", name, "--out", out]) == 0
        kept = load_keep(tmp_path / name)
        for structure, counts in rows[name]["kept"].items():
            np.testing.assert_array_equal(kept[structure].sum(1), counts)
        assert keep_digest(kept) == rows[name]["keep"]


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
