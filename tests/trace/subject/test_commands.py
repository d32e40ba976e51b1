"""`saap compare FACTORY` and `saap prune FACTORY`: what they print and write, and what they refuse."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from saap_jax.cli.main import main
from saap_jax.trace.subject.saved import load_pruned
from tests.cli.test_main import refused
from tests.trace.subject.problems import stacked
from tests.trace.subject.test_compensation import mlp_problem

FILE = """
from tests.trace.subject.problems import stacked
from tests.trace.subject.test_compensation import mlp_problem
import jax.numpy as jnp
import numpy as np

def biased():
    return mlp_problem(np.float32, 64)

def problem():
    return stacked()

def old():
    return (lambda params, x: x @ params), jnp.ones((3, 4)), jnp.ones((2, 3))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_compare(here, capsys):
    words = ["compare", "mine.py:problem", "--cut", "--methods", "wanda", "gate_taylor", "ablation"]
    words += ["--ratios", "0.3"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("gate_taylor", "ablation", "dense", "Each copy (layer, expert) of a structure keeps as many units"):
        assert part in text
    run = here / "runs" / "compare"
    record = json.loads((run / "run.json").read_text())
    assert (record["kind"], record["status"]) == ("compare", "finished")
    assert record["model"]["prunable_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(stacked().params))
    best = record["best"]
    assert best["ppl"] == pytest.approx(best["ppl_masked"], rel=1e-4)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["wanda@0.3", "gate_taylor@0.3", "ablation@0.3"]
    command = ["ab", "runs/compare:wanda@0.3", "runs/compare:dense"]
    assert "got a run of a traced model, whose losses are no perplexities" in refused(capsys, command)
    assert all(row["parameters"] < record["dense"]["parameters"] and row["ratio_actual"] >= 0.3 for row in rows)
    for row in (record["dense"], *rows):
        assert row["ppl"]["loss held_out"] == pytest.approx(np.mean(row["losses"]["loss held_out"])), "no exponential"
    page = (run / "report.html").read_text()
    assert "Coupled structures: " in page  # the drawing
    assert "gate_taylor" in page
    assert "perplexity" not in page.lower()
    problem = stacked()
    function, params = load_pruned(run / "best", problem)
    loss = problem.loss(function(params, problem.held_out[0]), problem.held_out[1])
    assert float(loss) == pytest.approx(best["ppl"]["loss held_out"], rel=1e-5)
    before = (run / "metrics.jsonl").read_bytes()
    assert main(words) == 0  # a finished run is shown again
    assert (run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main([*words[:-1], "0.2", "--name", "compare"]) == 2
    assert "pass --overwrite or another --name" in capsys.readouterr().err


@pytest.mark.slow
def test_prune_compensates(here, capsys):
    """The heldout loss falls; what cannot be compensated is said."""
    words = ["prune", "mine.py:biased", "--ratio", "0.4", "--calibration.batch-size", "4"]
    losses = {}
    for method in ("none", "least_squares"):
        assert main([*words, "--method", f"magnitude,uniform,{method}", "--out", method]) == 0
        text = capsys.readouterr().out
        assert ("error of what 1 matrices write, before and after" in text) == (method != "none")
        record = json.loads((here / method / "pruned.json").read_text())
        losses[method] = record["about"]["held_out_loss"]["cut"]
        problem = mlp_problem(np.float32, 64)
        function, params = load_pruned(method, problem)
        loss = problem.loss(function(params, problem.held_out[0]), problem.held_out[1])
        np.testing.assert_allclose(loss, losses[method], rtol=1e-5)
    assert len(set(losses.values())) == 2
    assert main([*words, "--method", "magnitude > uniform", "--out", "few", "--evaluation.windows", "3"]) == 0
    capsys.readouterr()
    function, params = load_pruned("few", problem)
    loss = problem.loss(function(params, problem.held_out[0][:3]), problem.held_out[1][:3])
    np.testing.assert_allclose(
        loss, json.loads((here / "few" / "pruned.json").read_text())["about"]["held_out_loss"]["cut"], rtol=1e-5
    )
    for option, said in ((["--evaluation.in-domain", "none"], "expected some of held_out"), (["--no-judge"], "judge:")):
        assert said in refused(capsys, [*words, "--out", "more", *option])
    words = ["prune", "mine.py:problem", "--ratio", "0.4", "--out", "layered", "--method"]
    assert main([*words, "gate_taylor,bias"]) == 2
    assert "bias: expected no repair, or least_squares, for a traced model" in capsys.readouterr().err
    assert main([*words, "gate_taylor,least_squares"]) == 0
    printed = capsys.readouterr()
    assert ": it is a stream that several parts read" in printed.out + printed.err


@pytest.mark.slow
def test_the_example_of_the_documentation(here, capsys):
    text = (Path(__file__).parents[3] / "docs" / "own_model.md").read_text()
    blocks = [block.removeprefix("python\n") for block in text.split("```") if block.startswith("python\n")]
    (example,) = [block for block in blocks if "return Problem(" in block]
    (load,) = [block for block in blocks if "load_pruned(" in block]
    (here / "documented.py").write_text(example)
    method = "gate_taylor > within(multiple_of={'layers/down[1]': 4}) > uniform"
    words = ["prune", "documented.py:regression", "--method", method, "--ratio", "0.25", "--out", "small"]
    with jax.numpy_rank_promotion("allow"):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "24 -> 20 in each of 3 copies" in text
        assert "own code takes the smaller parameters, with the same outputs" in text
        assert main(words) == 2
        assert "out: expected a directory that does not exist yet, found small" in capsys.readouterr().err
        sys.path.insert(0, str(here))
        try:
            exec(load.replace("from mine", "from documented"), {})
        finally:
            sys.path.remove(str(here))
    assert capsys.readouterr().out.startswith("0.0104")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "prune"])
def test_bad_words_are_refused_in_one_line(here, capsys, command):
    option = "--method" if command == "prune" else "--methods"
    for words, message in (
        (["mine.py:old"], "expected the factory to return a saap_jax.Problem"),
        (["mine.py:problem", "other:one"], "expected at most one of each of [MODULE:FACTORY]"),
        (["mine.py:problem", option, "wanda,within(max_ratio={'nothing*': 0.5}),uniform"], "expected names of struct"),
        (["mine.py:problem", option, "block_influence"], "block_influence"),
    ):
        assert main([command, *words, "--ratio", "0.25"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (here / "models").exists()
        assert not (here / "runs").exists()
