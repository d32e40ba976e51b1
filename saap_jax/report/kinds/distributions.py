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

from saap_jax.report.page.blocks import Axis, Band, Block, Chart, Column, Detail, Heat, Note, Part, Strip
from saap_jax.report.page.formats import slug
from saap_jax.report.page.strips import layer_axis
from saap_jax.runtime.words import plural
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


def score_chart(by_estimator: Mapping[str, Scores], structure: str, limit: int) -> Chart | None:
    """Return a chart of a structure's scores: a line an estimator, sizes on the left, ranks by layer on the right.

    None without a finite score. Only the first `limit` estimators are shown.
    """
    found = dict(list(distributions(by_estimator, structure).items())[:limit])
    if not found:
        return None
    axis = log_axis(list(found.values()))
    layers = max(len(one.ranks) for one in found.values())
    strips = [
        Strip(name, [_sizes(axis, name, one), Heat(one.ranks.tolist(), _said(name, one))])
        for name, one in found.items()
    ]
    columns = [Column("score / middle score", axis), Column("mean rank by layer", layer_axis(layers), lines=False)]
    title = f"Scores of {structure} units"
    return Chart(f"scores-{structure}", title, "estimator", columns, strips, scale="percentile")


def score_parts(by_estimator: Mapping[str, Scores], detail: Detail, scenario: str = "") -> tuple[str, list[Block]]:
    """Return how charts of scores are read, and a chart a structure."""
    parts: list[Block] = []
    for structure in next(iter(by_estimator.values()), {}):
        if chart := score_chart(by_estimator, structure, detail.limit):
            if scenario:
                chart = chart._replace(name=f"scores-{slug(scenario)}-{structure}")
            parts.append(Part(f"{scenario}: {structure}" if scenario else structure, [chart]))
    said = (
        "Left: how widely an estimator's scores are spread, as multiples of its middle score (logarithmic; thick: the "
        "middle half of the units, thin: 90 % of them). Right: mean percentile rank of each layer's units, bright is "
        "important."
    )
    more = len(by_estimator) - detail.limit
    return said + (f" {plural(more, 'more estimator')} in scores.npz." if more > 0 else ""), parts


def _sizes(axis: Axis, name: str, one: Distribution) -> Band | Note:
    if math.isnan(one.quantiles[0]):
        return Note("", "the middle score is not above 0")
    said = ", ".join(f"{100 * q:g} % {value:.3g}" for q, value in zip(QUANTILES, one.quantiles, strict=True))
    said = f"{name}, quantiles as multiples of the middle: {said}"
    if one.not_positive:
        said += f"; {100 * one.not_positive:.3g} % are not above 0"
    return Band([math.log10(value) if value > 0 else axis.low for value in one.quantiles], said)


def _said(name: str, one: Distribution) -> str:
    ranks = " ".join("-" if math.isnan(rank) else f"{100 * rank:.0f}" for rank in one.ranks.tolist())
    return f"{name}, mean percentile rank in each layer: {ranks}"
