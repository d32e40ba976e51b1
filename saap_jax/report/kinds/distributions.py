"""How the scores of an estimator are distributed, comparable between estimators: by size and by rank.

Scores of two estimators have different units, so sizes are shown as multiples of the estimator's own middle score, on a
logarithmic axis, and layers by the mean percentile rank of their units: 0 lowest, 1 highest of the structure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from saap_jax.report.page.strips import Axis, Column, Strip, band, chart, heat, layer_axis
from saap_jax.types import Scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_LONGEST = 4
"""Powers of ten that the axis reaches at most to either side of the middle."""


class Distribution(NamedTuple):
    """What is shown of one estimator's scores of one structure."""

    units: int
    quantiles: tuple[float, ...]
    """At `QUANTILES`, as multiples of the middle score; NaN where that is not above 0."""
    not_positive: float
    """Share of the units whose score is not above 0."""
    ranks: Float[np.ndarray, "layers"]
    """Mean percentile rank of each layer's units; NaN where it has none."""


def distribution(scores: Float[np.ndarray, "layers units"]) -> Distribution | None:
    """Return the distribution of one structure's scores, None where there is no finite one."""
    values = np.asarray(scores, np.float64)
    exists = np.isfinite(values)
    if not exists.any():
        return None
    found = values[exists]
    middle = float(np.median(found))
    quantiles = np.quantile(found, QUANTILES) / middle if middle > 0 else np.full(len(QUANTILES), np.nan)
    ranks = np.full(values.shape, np.nan)
    ranks[exists] = (rankdata(found) - 0.5) / len(found)
    counts = exists.sum(axis=1)
    means = np.where(exists, ranks, 0).sum(axis=1) / np.maximum(counts, 1)
    return Distribution(
        units=len(found),
        quantiles=tuple(map(float, quantiles)),
        not_positive=float(np.mean(found <= 0)),
        ranks=np.where(counts > 0, means, np.nan),
    )


def distributions(by_estimator: Mapping[str, Scores], structure: str) -> dict[str, Distribution]:
    """Return the distributions of all estimators that score a structure."""
    found = {
        name: distribution(np.asarray(scores[structure]))
        for name, scores in by_estimator.items()
        if structure in scores
    }
    return {name: one for name, one in found.items() if one is not None}


def log_axis(found: Sequence[Distribution]) -> Axis:
    """Return an axis of powers of ten, as log10 of the multiple of the middle, that holds the quantiles of all."""
    ends = [math.log10(q) for one in found for q in one.quantiles if q > 0]
    low = max(math.floor(min([*ends, -1.0])), -_LONGEST)
    high = min(math.ceil(max([*ends, 1.0])), _LONGEST)
    step = 1 if high - low <= 4 else 2
    ticks = [(float(power), f"{10.0**power:g}") for power in range(low, high + 1) if power % step == 0]
    return Axis(float(low), float(high), ticks)


def score_chart(by_estimator: Mapping[str, Scores], structure: str, limit: int) -> str:
    """Return a chart of a structure's scores: a line an estimator, sizes on the left, ranks by layer on the right.

    Empty without a finite score. Only the first `limit` estimators are shown.
    """
    found = dict(list(distributions(by_estimator, structure).items())[:limit])
    if not found:
        return ""
    axis = log_axis(list(found.values()))
    layers = max(len(one.ranks) for one in found.values())
    strips = [
        Strip(name, [_sizes(axis, name, one), heat(one.ranks.tolist(), _said(name, one))])
        for name, one in found.items()
    ]
    columns = [Column("score / middle score", axis), Column("mean rank by layer", layer_axis(layers), lines=False)]
    return chart("estimator", columns, strips)


def _sizes(axis: Axis, name: str, one: Distribution) -> str:
    if math.isnan(one.quantiles[0]):
        return "<small>the middle score is not above 0</small>"
    said = ", ".join(f"{100 * q:g} % {value:.3g}" for q, value in zip(QUANTILES, one.quantiles, strict=True))
    said = f"{name}, quantiles as multiples of the middle: {said}"
    if one.not_positive:
        said += f"; {100 * one.not_positive:.3g} % are not above 0"
    logs = [math.log10(value) if value > 0 else axis.low for value in one.quantiles]
    return band(axis, logs, said)


def _said(name: str, one: Distribution) -> str:
    ranks = " ".join("-" if math.isnan(rank) else f"{100 * rank:.0f}" for rank in one.ranks.tolist())
    return f"{name}, mean percentile rank in each layer: {ranks}"
