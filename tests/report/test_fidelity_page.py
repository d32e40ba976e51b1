"""The page of a fidelity run: true to the correlations, made for unfinished runs too."""

import base64
import math

import numpy as np
import pytest

from saap_jax.estimation.ablation import Unit, changes_to_lines
from saap_jax.evaluation.rank_correlation import Fidelity
from saap_jax.report.kinds.fidelity import (
    correlation_chart,
    fidelity_files,
    fidelity_summary,
    read_fidelity,
)
from saap_jax.report.page.strips import chart_html
from saap_jax.report.write import render_report
from saap_jax.runs.changes import read_changes
from saap_jax.runs.directory import RunDirectory
from tests.report.test_fidelity import EXACT, ROWS, SCORES
from tests.report.test_html import Page


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run as `saap fidelity` keeps it."""
    run = RunDirectory.open(tmp_path / "judged", {"channels_per_layer": 4})
    run.save_json("fidelity", [row._asdict() for row in ROWS])
    arrays = {f"s/{name}/{part}": values for name, of in SCORES.items() for part, values in of.items()}
    run.save_arrays("scores", {key: np.asarray(values, np.float64) for key, values in arrays.items()})
    changes = [
        (Unit(part, layer, number), float(values[layer, number]))
        for part, values in EXACT.items()
        for layer, number in np.argwhere(np.isfinite(values)).tolist()
    ]
    run.claim("ablation.jsonl").write_text(changes_to_lines(changes))
    for name, text in fidelity_files(ROWS, SCORES, EXACT).items():
        run.save_text(name, text)
    run.update(kind="fidelity", status="finished")
    return run


def test_reads_what_the_run_keeps(run, tmp_path):
    assert [row[:4] for row in read_fidelity(run.path)] == [row[:4] for row in ROWS]
    assert read_fidelity(tmp_path) == []
    scores, exact = read_changes(run.path)
    for part, values in EXACT.items():
        np.testing.assert_array_equal(exact[part], values)
        assert not np.array_equal(scores["best"][part], scores["random"][part])
        for name in SCORES:
            np.testing.assert_array_equal(scores[name][part], SCORES[name][part])
    (run.path / "ablation.jsonl").unlink()
    assert read_changes(run.path) == ({}, {})


@pytest.mark.slow
def test_shows_chart_table_drawing_and_csv(run):
    text = render_report(run.path)
    page = Page(text)
    charts = [attrs for attrs in page.of("table") if attrs.get("class") == "chart numbered"]
    assert len(charts) == 3
    assert any(attrs.get("aria-label") == "Scores against exact changes" for attrs in page.of("svg"))
    (link,) = [attrs for attrs in page.of("a") if "download" in attrs]
    content = base64.b64decode(link["href"].partition("base64,")[2])
    assert (link["download"], content) == ("fidelity.csv", (run.path / "fidelity.csv").read_bytes())


@pytest.mark.slow
def test_files_and_page_are_of_the_same_blocks(run):
    text = render_report(run.path)
    drawn = (run.path / "fidelity.svg").read_text().partition("<desc>")[2].rstrip()
    assert drawn in text
    assert drawn.replace("Spearman", "Kendall") not in text, "negative control"
    markdown = (run.path / "fidelity.md").read_text()
    assert markdown.count("\n| best ") == 3


def test_the_summary_names_the_best():
    said = fidelity_summary(ROWS)
    assert said[0].startswith("On attention units (36 measured), best agrees best with the exact change of the loss")
    assert len(said) == 3
    assert fidelity_summary([]) == ["Nothing is measured yet."]


def test_the_chart_is_hollow_where_the_interval_holds_zero():
    rows = [Fidelity(name, "mlp", m, 9, value, low, 0.9) for name, value, low in (("a", 0.5, 0.2), ("b", 0.4, -0.1))
            for m in ("spearman", "kendall")]  # fmt: skip
    drawn = chart_html(correlation_chart(rows, "mlp", 20))
    assert drawn.index("point") < drawn.index("open")
    assert "open" not in chart_html(correlation_chart(rows[:2], "mlp", 20))
    constant = [Fidelity("c", "mlp", "spearman", 9, math.nan, math.nan, math.nan)]
    assert "circle" not in chart_html(correlation_chart(constant, "mlp", 20))


def test_a_run_that_has_only_begun(tmp_path):
    run = RunDirectory.open(tmp_path / "begun", {"channels_per_layer": 4}).begin()
    assert "Nothing is measured yet." in render_report(run.path)


def test_other_fields_are_refused(run):
    run.save_json("fidelity", [{"estimator": "a"}])
    with pytest.raises(
        ValueError, match=r"fidelity.json: \[0\]: expected a field scope, got estimator; the file was changed"
    ):
        render_report(run.path)
