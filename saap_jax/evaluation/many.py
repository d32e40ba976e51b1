"""One against many: a sweep's differences from its best, from one bootstrap that all comparisons share."""

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.paired import Difference

_LEVEL = 0.95
"""Probability that an interval is meant to cover the true difference."""

_DRAWS = 1000
"""Resamples that are held at once."""


def differences_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Return how each variant differs from the base, other - base: above 0 the base is better.

    Drawn as `paired_difference` does (seeds and windows, each with replacement), but once for all variants, so that two
    hundred of them take a second. Intervals are 95 % percentile intervals; p-values are not adjusted (see `holm`).
    Where a loss is not finite, interval and p-value are NaN.

    Args:
        base: mean loss of each window in nats a token; a row for each calibration seed.
        others: the same of each variant.

    Raises:
        ValueError: shapes that differ, or fewer than two windows.
    """
    base, others = np.asarray(base, np.float64), np.asarray(others, np.float64)
    if others.ndim != 3 or others.shape[1:] != base.shape or base.shape[1] < 2 or resamples < 1:
        raise ValueError(
            f"differences_against: expected [seeds, windows] of two windows or more and [variants, seeds, windows], "
            f"got {base.shape} and {others.shape}, and at least one resample, got {resamples}"
        )
    with np.errstate(invalid="ignore"):
        difference = others - base
        values = difference.mean(axis=(1, 2))
    wins = ((others < base) + 0.5 * (others == base)).mean(axis=(1, 2))
    known = np.isfinite(difference).all(axis=(1, 2))
    means = _resampled(difference[known], resamples, seed)
    tails = np.minimum((means <= 0).sum(axis=1), (means >= 0).sum(axis=1))
    sure = np.full((4, len(others)), np.nan)
    sure[:2, known] = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=1)
    sure[2, known] = np.minimum(1.0, 2 * (1 + tails) / (resamples + 1))
    sure[3, known] = np.abs(difference[known]).max(axis=(1, 2))
    columns = (values, *sure[:2], wins, *sure[2:])
    return [Difference(*map(float, numbers)) for numbers in zip(*columns, strict=True)]


def p_values_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Float[np.ndarray, "variants"]:
    """Return the two-sided p-value of "as good as the base" of each variant, NaN where a loss is not finite.

    Arguments and errors are those of `differences_against`.
    """
    found = differences_against(base, others, resamples=resamples, seed=seed)
    return np.array([difference.p_value for difference in found], np.float64)


def _resampled(
    difference: Float[np.ndarray, "variants seeds windows"], resamples: int, seed: int
) -> Float[np.ndarray, "variants resamples"]:
    """Return the mean difference of each variant in each resample."""
    seeds, windows = difference.shape[1:]
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _DRAWS):
        count = min(_DRAWS, resamples - start)
        by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        by_window = random.multinomial(windows, np.full(windows, 1 / windows), size=count) / windows
        means.append(np.einsum("vsw,rw,rs->vr", difference, by_window, by_seed, optimize=True))
    return np.concatenate(means, axis=1)
