"""One against many: a sweep's differences from its best, from one bootstrap that all comparisons share."""

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.paired import FEWEST, Difference, resamples_for, sureness

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
    Where a loss is not finite, or there are fewer than `FEWEST` windows, interval and p-value are NaN.

    Args:
        base: mean loss of each window in nats a token; a row for each calibration seed.
        others: the same of each variant.

    Raises:
        ValueError: shapes that differ, or no window.
    """
    base, others = np.asarray(base, np.float64), np.asarray(others, np.float64)
    if others.ndim != 3 or others.shape[1:] != base.shape or not base.size or resamples < 1:
        raise ValueError(
            f"differences_against: expected [seeds, windows] of one window or more and [variants, seeds, windows], "
            f"got {base.shape} and {others.shape}, and at least one resample, got {resamples}"
        )
    with np.errstate(invalid="ignore"):
        difference = others - base
        values = difference.mean(axis=(1, 2))
    wins = ((others < base) + 0.5 * (others == base)).mean(axis=(1, 2))
    known = np.isfinite(difference).all(axis=(1, 2))
    windows = base.shape[1]
    sure = np.full((4, len(others)), np.nan)
    sure[3, known] = np.abs(difference[known]).max(axis=(1, 2))
    if windows >= FEWEST:
        sure[:3, known] = sureness(_resampled(difference[known], resamples, seed), windows)
    rows = np.stack((values, *sure[:2], wins, *sure[2:]), axis=1).tolist()
    return [Difference(*numbers, windows=windows) for numbers in rows]


def p_values_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, "variants"]:
    """Return the two-sided p-value of "as good as the base" of each variant, NaN where a loss is not finite.

    Arguments and errors are those of `differences_against`; by default there are as many resamples as are needed to
    adjust the p-values for their number.
    """
    found = differences_against(base, others, resamples=resamples or resamples_for(len(others)), seed=seed)
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
