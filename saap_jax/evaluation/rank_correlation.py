"""How faithful is an estimator? Rank correlation of its scores with the exact change of the loss (`ablation`).

Spearman's ρ comes from the signs of all pairs, s_ij = sign(a_i - a_j), t_ij = sign(b_i - b_j), and from how often
each unit counts, c_i (1 in the sample itself; in a bootstrap resample, how often it was drawn):

    r_i = ½ Σ_j c_j s_ij, the centred mid-rank of a_i; q_i the same of b
    ρ = Σ_i c_i r_i q_i / √(Σ_i c_i r_i² · Σ_i c_i q_i²)

so that a thousand resamples are a few matrix products. All sums are of whole and half numbers and exact: equal rankings
give 1, reversed ones -1. A constant ranking has no correlation: NaN.

Whether another estimator is as good as the one that agrees best is told from the differences of their correlations in
the same resamples.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.resample import LEVEL, counts, holm, resamples_for, sureness
from saap_jax.types import Scores

MEASURES = ("spearman", "spearman_in_layers")
"""Correlation over all units of a scope, and the mean of the correlations within each layer."""


class Fidelity(NamedTuple):
    """One rank correlation of an estimator with the oracle, and its bootstrap interval; NaN where there is none.

    A scope is the units of a structure, or `pooled`, those of all: meant for scores that are comparable between them.

    There is no interval of fewer than `FEWEST` units (within layers: layers), nor where the exact changes are those of
    fewer windows.
    """

    estimator: str
    scope: str
    measure: str
    units: int
    value: float
    low: float
    high: float
    p_value: float = math.nan
    """Of "as good as the highest of its scope and measure", adjusted for the number of others (Holm)."""
    windows: int = 0
    """Windows by which the changes of the loss were measured; 0 where that was not recorded."""

    @property
    def tied(self) -> bool:
        """True where it cannot be told apart from the highest."""
        return self.p_value >= LEVEL


def fidelity(
    scores: dict[str, Scores],
    exact: Scores,
    *,
    windows: int = 0,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Fidelity]:
    """Correlate every estimator with the exact changes, on the units where these are finite.

    Intervals are percentiles of a bootstrap over units; for the mean within layers, over layers, since three attention
    units of a layer are too few to draw from. All estimators see the same resamples. The mean within layers leaves out
    layers without a correlation (fewer than two units, or all scores equal); `pooled` has none.

    Args:
        scores: {estimator: {structure: [layers, units]}}.
        exact: {structure: [layers, units]}, NaN where a unit was not measured.
        windows: of how many windows of text the changes are; 0 where that is not known.
        resamples: at least; more where there are many estimators to be told apart.

    Raises:
        ValueError: shapes that differ, or a score that is NaN where the change was measured.
    """
    rows = []
    resamples = resamples_for(len(scores) - 1, resamples)
    for scope in (*exact, "pooled"):
        names = tuple(exact) if scope == "pooled" else (scope,)
        measured = {name: np.isfinite(np.asarray(exact[name], np.float64)) for name in names}
        layers = np.concatenate([np.nonzero(measured[name])[0] for name in names])
        truth = np.concatenate([np.asarray(exact[name], np.float64)[where] for name, where in measured.items()])
        found: dict[str, list[Resampled]] = {}
        for estimator, by_structure in scores.items():
            values = _measured(estimator, by_structure, measured)
            random = np.random.default_rng(seed)  # anew: every estimator meets the same resamples
            own = [bootstrap(values, truth, resamples, random)]
            own += [NONE if scope == "pooled" else bootstrap_layers(values, truth, layers, resamples, random)]
            if windows:  # neither does it say more than the windows do
                own = [each._replace(size=min(each.size, windows)) for each in own]
            found[estimator] = own
        compared = [_against_highest({name: own[place] for name, own in found.items()}) for place in range(2)]
        rows += [
            Fidelity(estimator, scope, name, len(truth), own.value, *own.interval, p_values[estimator], windows)
            for estimator, each in found.items()
            for name, own, p_values in zip(MEASURES, each, compared, strict=True)
        ]
    return rows


class Resampled(NamedTuple):
    """A correlation, and what it is in resamples."""

    value: float
    drawn: Float[np.ndarray, "resamples"]
    size: int
    """Units or layers that a resample is drawn from."""

    @property
    def interval(self) -> tuple[float, float]:
        """The percentile interval; resamples without a correlation (one unit only) are left out."""
        if math.isfinite(self.value):
            drawn = self.drawn[np.isfinite(self.drawn)]
        else:
            drawn = np.empty(0)
        low, high, _ = sureness(drawn, self.size).tolist()
        return low, high


NONE = Resampled(math.nan, np.empty(0), 0)


def _against_highest(found: Mapping[str, Resampled]) -> dict[str, float]:
    """Compute Holm's p-value of each estimator against the one of the highest correlation; NaN of that one itself."""
    known = {name: own for name, own in found.items() if math.isfinite(own.value)}
    highest = max(known, key=lambda name: known[name].value, default="")
    p_values = dict.fromkeys(found, math.nan)
    for name in known.keys() - {highest}:
        difference = known[highest].drawn - known[name].drawn
        size = min(known[highest].size, known[name].size)
        p_values[name] = float(sureness(difference[np.isfinite(difference)], size)[2])
    return dict(zip(p_values, holm([*p_values.values()]).tolist(), strict=True))


def correlations(
    a: Float[np.ndarray, "units"], b: Float[np.ndarray, "units"], counts: Float[np.ndarray, "resamples units"]
) -> Float[np.ndarray, "resamples"]:
    """Compute Spearman's ρ of two samples in which unit i occurs `counts[:, i]` times.

    >>> a = np.array([3.0, 1.0, 2.0])
    >>> correlations(a, 2 * a, np.ones((1, 3))).item(), correlations(a, -a, np.ones((1, 3))).item()
    (1.0, -1.0)
    """
    s, t = ((above := x[:, None] > x[None]).astype(np.float64) - above.T for x in (a, b))  # of infinite values too
    r = counts @ s.T / 2
    q = counts @ t.T / 2
    products = np.sum(counts * r * q, axis=1)
    scale = np.sqrt(np.sum(counts * r * r, axis=1) * np.sum(counts * q * q, axis=1))
    return np.divide(products, scale, out=np.full(products.shape, np.nan), where=scale > 0)


def bootstrap(
    a: Float[np.ndarray, "units"], b: Float[np.ndarray, "units"], resamples: int, random: np.random.Generator
) -> Resampled:
    """Compute ρ, also in resamples of the units."""
    if not (units := len(a)):
        return NONE
    drawn = correlations(a, b, counts(units, resamples, random).astype(np.float64))
    return Resampled(correlations(a, b, np.ones((1, units))).item(), drawn, units)


def bootstrap_layers(
    a: Float[np.ndarray, "units"],
    b: Float[np.ndarray, "units"],
    layers: np.ndarray,
    resamples: int,
    random: np.random.Generator,
) -> Resampled:
    """Compute the mean of ρ within layers, also in resamples of the layers; `layers` says which layer each unit is
    of."""
    within = [np.flatnonzero(layers == layer) for layer in np.unique(layers)]
    every = np.array([correlations(a[of], b[of], np.ones((1, len(of)))).item() for of in within])
    defined = every[np.isfinite(every)]
    if not len(defined):
        return NONE
    mean = float(np.mean(defined))
    drawn = every[random.integers(len(every), size=(resamples, len(every)))]  # the same layers for all estimators
    known = np.isfinite(drawn)
    means = np.where(known, drawn, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return Resampled(mean, np.where(known.any(axis=1), means, mean), len(defined))


def _measured(estimator: str, scores: Scores, measured: dict[str, np.ndarray]) -> Float[np.ndarray, "units"]:
    """Collect the scores of the units whose change was measured; raise ValueError where there is none."""
    found = []
    for name, where in measured.items():
        values = np.asarray(scores[name], np.float64)
        if values.shape != where.shape or np.isnan(values[where]).any():
            raise ValueError(
                f"fidelity: expected scores of {estimator} for {name} of {where.shape} and none NaN where a change was "
                f"measured, got {values.shape}; scores and changes must be of the same model"
            )
        found.append(values[where])
    return np.concatenate(found)
