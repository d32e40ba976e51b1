"""CONTRIBUTING.md adds one of everything, in as many files as it says, and what it adds works on a tiny model."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import saap_jax
from saap_jax.cli import main
from saap_jax.data.windows import Windows
from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.observe import observe
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.llama.files.families import FAMILIES
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.spec import Constants
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.base import STEPS
from tests.helpers import dense_model, forward, random_model, random_tokens, spec_of

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
    before = [(table, dict(table)) for table in (ESTIMATORS, STEPS, FAMILIES, RECIPES)]
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
    scored = saap_jax.score_units(model, Windows(TOKENS, MASK), ["swing"])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(scored.scores("swing")[name], np.mean(gradient**4, axis=0), rtol=1e-4)


def file_of(section: str, directory: Path) -> str:
    """Write the one block of a section to a file of the name that it says; return its path."""
    ((name, code),) = blocks(section).items()
    (directory / name).write_text(code)
    return str(directory / name)


@pytest.fixture
def compared(tiny_model_directory, tmp_path):
    """Run `saap compare` with some words; return the rows by method."""

    def compare(*words: str) -> dict[str, dict]:
        options = [
            *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path), "--name", "run", "--ratios", "0.3"),
            *("--calibration.examples", "3", "--calibration.length", "16"),
            *("--evaluation.windows", "3", "--evaluation.length", "16"),
        ]
        assert main.main(["compare", words[0], *options, *words[1:]]) == 0
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return {row["variant"]: row for row in rows if row.get("variant")}

    return compare


@pytest.mark.slow
def test_a_recipe(compared, tmp_path, capsys):
    rows = compared(file_of("A recipe", tmp_path), "--methods", "thrifty", "magnitude", "minitron")
    assert set(rows) == {"thrifty", "magnitude", "minitron"}
    assert rows["thrifty"]["chain"] == "wanda > global"
    capsys.readouterr()
    assert main.main(["methods", "thrifty"]) == 0
    said = capsys.readouterr().out
    assert "global(by=score_per_parameter)" in said
    assert "The paper removes single weights." in said


@pytest.mark.slow
def test_an_allocation(compared, tmp_path):
    tapered = f"{file_of('An allocation', tmp_path)}:Tapered"
    rows = compared(f"magnitude > {{uniform,{tapered},{tapered}(power=0.0)}}")
    kept = {name: row["kept"] for name, row in rows.items()}
    assert kept[f"magnitude > {tapered}(power=0.0)"] == kept["magnitude > uniform"]
    first, *_, last = zip(*kept[f"magnitude > {tapered}"].values(), strict=True)
    assert first > last, "more of deeper layers, heads before channels"
    made = run_block("An allocation")["Tapered"]()
    np.testing.assert_allclose(made.shares(np.array([4, 4, 4, 4]), np.ones(4)), np.arange(1, 5) / 10)


@pytest.mark.slow
def test_a_refinement(tmp_path):
    chain = f"wanda > uniform > {file_of('A refinement', tmp_path)}:Jittered(6, noise=0.5)"
    model, text = dense_model(mlp=24), Windows(np.tile(TOKENS, (2, 1)), np.tile(MASK, (2, 1)))
    made = saap_jax.run_chain(model, chain, text, 0.4, batch_size=3)
    judged = made.metrics["divergences"]
    assert len(judged) == 7
    assert made.subject.removed(made.keep) >= 0.4 * made.subject.prunable
    plain = saap_jax.run_chain(model, "wanda > uniform", text, 0.4, batch_size=3).keep
    assert any((made.keep[name] != plain[name]).any() for name in plain) == (min(judged) < judged[0])
    assert min(judged) < judged[0], "one of the draws is better"


def test_a_repair(tmp_path):
    chain = f"random > uniform > {file_of('A repair', tmp_path)}:Rescaled(propagate=dense)"
    made = saap_jax.run_chain(dense_model(mlp=8), chain, Windows(TOKENS, MASK), 0.4, batch_size=2)
    corrections = made.metrics["corrections"]
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
    scored = saap_jax.score_units(read, Windows(TOKENS, MASK), ["gate_fisher", "magnitude"])
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
