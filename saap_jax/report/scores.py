"""A table of scores: how far estimators agree on the order of the units."""

import numpy as np
from rich.table import Table
from scipy.stats import rankdata

from saap_jax.types import Scores


def rank_agreement(scores: dict[str, Scores], structure: str) -> np.ndarray:
    """Return Spearman's rank correlation between every two estimators over all units, `[estimators, estimators]`."""
    columns = [np.asarray(by_structure[structure], np.float64).ravel() for by_structure in scores.values()]
    exists = np.all(np.isfinite(columns), axis=0)
    result = np.eye(len(columns))
    for i, first in enumerate(columns):
        for j, second in enumerate(columns[:i]):
            ranks = [rankdata(column[exists]) for column in (first, second)]
            constant = min(np.ptp(rank) for rank in ranks) == 0
            result[i, j] = result[j, i] = np.nan if constant else np.corrcoef(ranks)[0, 1]
    return result


def rank_table(scores: dict[str, Scores]) -> Table:
    """Return a table of rank correlations, attention units below the diagonal and MLP channels above it."""
    attention, mlp = (rank_agreement(scores, structure) for structure in ("attention", "mlp"))
    names = list(scores)
    table = Table(
        title="Spearman rank correlation of scores: attention units below the diagonal, MLP channels above",
        title_justify="left",
    )
    table.add_column("estimator", overflow="fold")
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right")
    for i, name in enumerate(names):
        cells = ["·" if i == j else f"{(attention if j < i else mlp)[i, j]:.2f}" for j in range(len(names))]
        table.add_row(f"{i + 1} {name}", *cells)
    return table
