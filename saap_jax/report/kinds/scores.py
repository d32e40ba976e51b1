"""How far estimators agree on the order of the units."""

import math

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from saap_jax.report.page.blocks import Cell, Line, Table
from saap_jax.report.page.formats import format_correlation
from saap_jax.types import STRUCTURES, Scores


def rank_agreement(scores: dict[str, Scores], structure: str) -> Float[np.ndarray, "estimators estimators"]:
    """Return Spearman's rank correlation between every two estimators over all units.

    Units count that all estimators score with a finite number. NaN where there is no correlation: fewer than two units,
    or all scores of an estimator equal.
    """
    columns = [np.asarray(by_structure[structure], np.float64).ravel() for by_structure in scores.values()]
    exists = np.all(np.isfinite(columns), axis=0)
    ranks = [rankdata(column[exists]) for column in columns]
    varies = [len(rank) > 0 and np.ptp(rank) > 0 for rank in ranks]
    result = np.eye(len(columns))
    for i in range(len(columns)):
        for j in range(i):
            defined = varies[i] and varies[j]
            result[i, j] = result[j, i] = np.corrcoef(ranks[i], ranks[j])[0, 1] if defined else np.nan
    return result


def layered(scores: dict[str, Scores]) -> bool:
    """Say whether scores are of attention and MLP, and not of a traced model's structures."""
    return all(set(STRUCTURES) <= set(by_structure) for by_structure in scores.values())


def _together(scores: dict[str, Scores]) -> np.ndarray:
    """Return the rank correlations over the units of all structures."""
    flat: dict[str, Scores] = {
        name: {"all": np.concatenate([np.ravel(values) for values in each.values()])[None]}
        for name, each in scores.items()
    }
    return rank_agreement(flat, "all")


def rank_cells(scores: dict[str, Scores]) -> list[list[float]]:
    """Return rank correlations row by row: attention units below the diagonal, MLP channels above, NaN on it."""
    both = (
        [rank_agreement(scores, structure) for structure in STRUCTURES] if layered(scores) else [_together(scores)] * 2
    )
    cells = np.tril(both[0], -1) + np.triu(both[1], 1)
    np.fill_diagonal(cells, np.nan)
    return cells.tolist()


def rank_table(scores: dict[str, Scores], scenario: str | None = None) -> Table:
    """Return rank correlations, attention units below the diagonal and MLP channels above it, each with a tint.

    A `scenario` is named in the title.
    """
    lines = []
    for place, (name, values) in enumerate(zip(scores, rank_cells(scores), strict=True)):
        cells = [Cell(f"{place + 1} {name}")]
        for other, value in enumerate(values):
            text = "·" if place == other else format_correlation(value)
            rgb = "0, 114, 178" if value > 0 else "213, 94, 0"
            cells.append(Cell(text, tint="" if math.isnan(value) else f"rgba({rgb}, {0.55 * abs(value):.2f})"))
        lines.append(Line(cells))
    of = "" if scenario is None else f" in scenario {scenario}"
    halves = "attention units below the diagonal, MLP channels above" if layered(scores) else "units of all structures"
    title = f"Spearman rank correlation of scores{of}: {halves}"
    return Table(title, ["estimator", *map(str, range(1, len(scores) + 1))], lines, matrix=True)
