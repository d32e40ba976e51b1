"""CONTRIBUTING.md adds one of everything, in as many files as it says, and what it adds works on a tiny model."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.registries import ALLOCATIONS, CORRECTIONS

import saap_jax
from saap_jax.cli import main
from saap_jax.config import SearchConfig
from saap_jax.data import Windows
from saap_jax.estimation import ACTIVATION_MOMENTS, ESTIMATORS, GATE_GRADIENT, observe
from saap_jax.llama import Constants, load_model, save_model
from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.segments import existing_units
from saap_jax.recipes import RECIPES
from saap_jax.surgery import compensate
from tests.helpers import dense_model, forward, random_keep, random_model, random_tokens, spec_of

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
TOKENS = random_tokens(6, 8)
MASK = np.ones(TOKENS.shape, bool)


def blocks(section: str) -> dict[str, str]:
    """Return the code of a section by the file that it is for."""
    codes = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    return {code.split("\n")[0].removeprefix("# "): code for code in codes}


def run_block(section: str) -> dict:
    """Run the one block of a section; return its names."""
    (code,) = blocks(section).values()
    namespace: dict = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def tables():
    """Forget afterwards what was registered."""
    before = [(table, dict(table)) for table in (ESTIMATORS, ALLOCATIONS, CORRECTIONS, FAMILIES, RECIPES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


def test_it_takes_as_many_files_as_the_table_says():
    rows = re.findall(r"^\| \[.+?\]\(#(.+?)\) \| (\d+) \|", PAGE, re.M)
    said = {anchor.replace("-", " "): int(count) for anchor, count in rows}
    assert said == {section.lower(): len(blocks(section)) for section in SECTIONS}


@pytest.mark.slow
def test_an_estimator():
    run_block("An estimator")
    model = dense_model()
    moments = observe(model, [(TOKENS, MASK)], frozenset({ACTIVATION_MOMENTS})).of(ACTIVATION_MOMENTS)
    scored = saap_jax.score_units(model, Windows(TOKENS, MASK), ["loudness", "loudness(root=True)"])
    for name, square in moments.square.items():
        np.testing.assert_allclose(scored.scores("loudness")[name], np.sum(square, axis=-1), rtol=1e-5)
        np.testing.assert_allclose(scored.scores("loudness(root=True)")[name] ** 2, np.sum(square, axis=-1), rtol=1e-5)


@pytest.mark.slow
def test_a_statistic():
    run_block("A statistic")
    model = dense_model()
    gradients = observe(model, [(TOKENS, MASK)], frozenset({GATE_GRADIENT})).of(GATE_GRADIENT)
    scored = saap_jax.score_units(model, Windows(TOKENS, MASK), ["swing"], stability=False)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(scored.scores("swing")[name], np.mean(gradient**4, axis=0), rtol=1e-4)


@pytest.mark.slow
def test_a_recipe(tiny_model_directory, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(blocks("A recipe")["recipe.py"])
    words = [
        *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path), "--name", "run", "--ratios", "0.3"),
        *("--calibration.examples", "3", "--calibration.length", "16", "--estimation.estimators", "magnitude"),
        *("--evaluation.windows", "3", "--evaluation.length", "16", "--recipes", "thrifty", "minitron"),
    ]
    assert main.main(["compare", str(tmp_path / "recipe.py"), *words]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row.get("recipe") for row in rows} == {None, "thrifty", "minitron"}
    assert main.main(["recipes", "thrifty"]) == 0
    said = capsys.readouterr().out
    assert "--search.allocation global" in said
    assert "The paper removes single weights." in said


@pytest.mark.slow
def test_an_allocation(tiny_model_directory, tmp_path, capsys):
    (tmp_path / "tapered.py").write_text(blocks("An allocation")["tapered.py"])
    words = [
        *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path), "--name", "run", "--ratios", "0.3"),
        *("--calibration.examples", "3", "--calibration.length", "16", "--estimation.estimators", "magnitude"),
        *("--evaluation.windows", "3", "--evaluation.length", "16", "--grid.allocations", "tapered", "uniform"),
    ]
    assert main.main(["compare", str(tmp_path / "tapered.py"), *words]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["search"]["allocation"] == "tapered"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line).get("allocation") for line in lines} >= {"tapered", "uniform"}
    size = np.array([4, 4, 4, 4])
    np.testing.assert_allclose(ALLOCATIONS["tapered"].budgets(size), np.arange(1, 5) / 10)
    assert main.main(["compare", "--search.allocation", "tapred"]) == 2
    assert "did you mean 'tapered'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs a ranking"):
        SearchConfig(allocation="tapered", depth=True)


def test_a_correction():
    run_block("A correction")
    model = dense_model(mlp=8)
    keep = random_keep(existing_units(model.segments), 0.5)
    config = CompensationConfig(method="rescaled", propagate="dense")
    batches = list(zip(np.split(TOKENS, 3), np.split(MASK, 3), strict=True))
    corrections = compensate(model, keep, batches, config).corrections
    assert corrections
    assert all(each.corrected <= each.error * (1 + 1e-5) for each in corrections)
    assert any(each.corrected < 0.99 * each.error for each in corrections)


@pytest.mark.slow
def test_a_family(tmp_path):
    run_block("A family")
    model = random_model(spec_of((2, 6), (2, 6), constants=Constants(family="olive", sliding_window=3)))
    assert model.segments[0].attention.query_bias is not None
    assert model.segments[0].attention.query_norm is not None
    saved = save_model(model, tmp_path / "olive")
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"], config["sliding_window"]) == ("olive", True, 3)
    read = load_model(saved)
    np.testing.assert_array_equal(forward(read, TOKENS), forward(model, TOKENS))
    scored = saap_jax.score_units(read, Windows(TOKENS, MASK), ["gate_fisher", "magnitude"], stability=False)
    assert all(np.isfinite(scores).all() for scores in jax.tree.leaves(scored.scores("magnitude")))


def test_a_command(tiny_model_directory, monkeypatch, capsys):
    monkeypatch.setattr(main, "COMMANDS", dict(main.COMMANDS))
    for file, code in blocks("A command").items():
        name = file.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        if name == main.__name__:
            vars(module).update(vars(main))
        else:
            monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, file, "exec"), vars(module))
    assert main.main(["units", str(tiny_model_directory)]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown
    assert "mlp" in shown
    assert main.main(["units", "--modle", "x"]) == 2
