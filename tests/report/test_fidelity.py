"""Fidelity: ranked, complete, and true to the numbers."""

import csv
import io

import numpy as np
import pytest

from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity, fidelity
from saap_jax.report.blocks import Figure, Table, leaves
from saap_jax.report.pages.fidelity import fidelity_blocks, fidelity_summary, fidelity_table
from saap_jax.report.render import markdown_text, table_csv
from tests.report.shown import cells, printed

LONG = "taylor_element(reduction='max')"


def invented() -> tuple[dict, dict, list[Fidelity]]:
    """Return scores of seven estimators, exact changes of 12 layers and the correlations."""
    random = np.random.default_rng(0)
    exact = {"attention": random.standard_normal((12, 3)), "mlp": 1e-4 * random.standard_t(2, (12, 30))}
    exact["mlp"][:, 10:] = np.nan
    scale = {"attention": 1.0, "mlp": 1e-4}
    noise = {"random": 50.0, "wanda": 2.0, LONG: 1.0, "a&b|<c>": 0.5, "gate_taylor": 0.2, "best": 0.0}
    scores = {
        name: {s: np.nan_to_num(e) + of * scale[s] * random.standard_normal(e.shape) for s, e in exact.items()}
        for name, of in noise.items()
    }
    scores["constant"] = {s: np.ones(e.shape) for s, e in exact.items()}
    return scores, exact, fidelity(scores, exact, resamples=50)


SCORES, EXACT, ROWS = invented()
BLOCKS = fidelity_blocks(ROWS, SCORES, EXACT)


@pytest.mark.parametrize("scope", ["attention", "mlp", "pooled"])
def test_each_estimator_has_its_row(scope):
    table = fidelity_table(ROWS, scope)
    assert len(table.header) == (2 if scope == "pooled" else 3)
    first, *others = cells(table)
    assert first[:2] == ["best *", "1.00 (1.00 to 1.00)"]
    assert others[-1][1:] == ["n/a"] * (len(table.header) - 1)
    assert all(name in printed(table, width=200) for name in SCORES)


def test_ties_and_few_units_are_said():
    tied = [row._replace(p_value=0.4) if row.estimator == "gate_taylor" else row for row in ROWS]
    assert "gate_taylor ≈" in [row[0] for row in cells(fidelity_table(tied, "mlp"))]
    assert "1 other cannot be told apart from it: gate_taylor" in " ".join(fidelity_summary(tied))
    few = [row._replace(units=5, p_value=np.nan) for row in ROWS]
    assert fidelity_table(few, "mlp").notes == [
        "* highest Spearman; without intervals and tests: 5 units, where it takes 8"
    ]


def test_csv_keeps_every_bit():
    table = next(block for block in leaves(BLOCKS) if isinstance(block, Table) and block.file == "fidelity")
    header, *lines = csv.reader(io.StringIO(table_csv(table)))
    assert header == list(Fidelity._fields)
    assert len(lines) == len(SCORES) * 3 * len(MEASURES)
    for line, row in zip(lines, ROWS, strict=True):
        assert line[:3] == list(row[:3])
        np.testing.assert_array_equal([float(cell or "nan") for cell in line[3:]], row[3:])


def test_markdown_has_all_measures_and_the_page_one_figure():
    text = markdown_text(BLOCKS)
    assert "| estimator | Spearman | Spearman in layers |" in text
    assert "| a&amp;b\\|&lt;c> " in text
    assert len([block for block in BLOCKS if isinstance(block, Figure)]) == 1
