"""Stage 2c: how stable is importance over examples and over scenarios? Sees scores, no model.

NaN marks units that a layer does not have; it stays NaN.
"""

from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from saap_jax.checks import check_value
from saap_jax.steps.score.fusion import PerExample
from saap_jax.types import Scores

ScenarioReduction = Literal["mean", "max", "min_rank"]


def fluctuation_of(per_example: PerExample) -> Scores:
    """Measure the variation of a unit's importance, relative to its size.

    F(u) = Std_n I_n(u) / Mean_n I_n(u), float64, at least 0, without a unit; 0 where all I_n(u) are equal, and so
    where they are 0. Std is that of the population (divisor n).

    Args:
        per_example: I_n(u) >= 0, `[examples or scenarios, layers, units]` a structure, two or more of them.

    Raises:
        ValueError: fewer than two examples, or a negative score, of which a relative change says nothing.

    Source: SAAP (arXiv:2412.15127), adaptive structure search.
    """
    fluctuation: Scores = {}
    for name, given in per_example.items():
        values = np.asarray(given, np.float64)
        if len(values) < 2:
            raise ValueError(f"stability: expected scores of {name} for two examples or more, got {len(values)}")
        wrong = np.argwhere(values < 0)
        if len(wrong):
            example, layer, unit = wrong[0]
            raise ValueError(
                f"stability: expected scores of at least 0, got {values[tuple(wrong[0])]:.4g} for {name} unit {unit} "
                f"in layer {layer} on example {example}; use an estimator of absolute values"
            )
        std = values.std(axis=0)
        mean = values.mean(axis=0)
        # Rounding gives equal values a std above 0.
        varies = values.max(axis=0) > values.min(axis=0)
        relative = np.divide(std, mean, out=np.zeros_like(mean), where=varies)
        fluctuation[name] = np.where(np.isnan(mean), np.nan, relative)
    return fluctuation


def stability_indicator(per_example: PerExample) -> Scores:
    """Standardise the fluctuation of importance over examples (or scenarios) within its layer and structure.

    ASI(u) = (F(u) - mean_l F) / std_l F over the units of a layer l and one structure (divisor n); 0 where all are
    equal. Larger = less stable.

    Source: SAAP (arXiv:2412.15127), adaptive stability indicator. Deviation: the structures of a layer are
    standardised apart, for a head sums over many more weights than a channel and so varies less.
    """
    return {name: standardised(values) for name, values in fluctuation_of(per_example).items()}


def standardised(values: Float[Array | np.ndarray, "layers units"]) -> Float[np.ndarray, "layers units"]:
    """Return (x - mean) / std of each row, with divisor n in std; 0 where a row's values are all equal.

    >>> standardised(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    # NaN marks what is no unit: it has no part in any sum, and stays.
    values = np.asarray(values, np.float64)
    exists = ~np.isnan(values)
    count = exists.sum(axis=1, keepdims=True)
    mean = np.where(exists, values, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    deviation = np.where(exists, values - mean, 0)
    std = np.sqrt(np.square(deviation).sum(axis=1, keepdims=True) / np.maximum(count, 1))
    # Rounding may give equal values a std above 0, so equality is read from the values themselves.
    largest = np.where(exists, values, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    varies = largest > np.where(exists, values, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    z = np.divide(deviation, std, out=np.zeros_like(deviation), where=varies & (std > 0))
    return np.where(exists, z, np.nan)


def stabilised(scores: Scores, indicator: Scores, weight: float) -> Scores:
    """Return the search score of section 4, as its exponential: e^S(u) with S(u) = log I(u) + λ · ASI(u).

    I · e^(λ · ASI) ranks as S does, takes I = 0 as it is (removed first), and has means over units that agree with
    those of I where λ = 0. The largest e^(λ · ASI) is set to 1, which changes no ranking and cannot overflow.

    Args:
        scores: I(u) >= 0, `[layers, units]` a structure.
        indicator: ASI(u), the same shape.
        weight: λ; above 0 keeps what matters only sometimes, below 0 removes it.

    Raises:
        ValueError: a negative score, which has no logarithm.
    """
    for name, values in scores.items():
        wrong = np.argwhere(np.asarray(values) < 0)
        if len(wrong):
            layer, unit = wrong[0]
            raise ValueError(
                f"stable: takes the logarithm of the scores, expected at least 0, got "
                f"{values[layer, unit]:.4g} for {name} unit {unit} in layer {layer}; leave it out, or use an "
                "estimator of absolute values without scope_constant"
            )
    # The largest exponent over all structures is taken off, so that nothing overflows.
    shift = {name: weight * np.asarray(indicator[name], np.float64) for name in scores}
    largest = max(np.nanmax(values, initial=-np.inf) for values in shift.values())
    return {name: np.asarray(scores[name], np.float64) * np.exp(shift[name] - largest) for name in scores}


def reduce_scenarios(scenarios: dict[str, Scores], reduction: ScenarioReduction) -> Scores:
    """Turn the scores of several scenarios into one; larger = more important.

    - `mean`: the mean over scenarios; a scenario of larger losses counts more.
    - `max`: the largest over scenarios; what any of them needs is kept.
    - `min_rank`: the same free of units. With r the rank of a unit among the n of its structure in a scenario
      (1 = most important, equal scores share their mean rank), the score is (n + 1 - min r) / n over scenarios.
    """
    check_value("scenarios.reduction", reduction, ScenarioReduction)
    reference = next(iter(scenarios.values()))
    reduced: Scores = {}
    for name in reference:
        values = np.stack([np.asarray(scores[name], np.float64) for scores in scenarios.values()])
        if reduction == "min_rank":
            from scipy.stats import rankdata  # which takes long

            flat = values.reshape(len(values), -1)
            ranks = rankdata(-flat, axis=1, nan_policy="omit").reshape(values.shape)
            units = np.isfinite(reference[name]).sum()
            values = (units + 1 - ranks) / units
        if reduction == "mean":
            reduced[name] = values.mean(axis=0)
        else:
            reduced[name] = values.max(axis=0)
    return reduced
