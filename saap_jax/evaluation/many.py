"""One against many: the p-values of a sweep, from one bootstrap that all comparisons share."""

import numpy as np
from jaxtyping import Float


def p_values_against(
    base: Float[np.ndarray, "seeds windows"],
    others: Float[np.ndarray, "variants seeds windows"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Float[np.ndarray, "variants"]:
    """Return the two-sided p-value of "as good as the base" of each variant, NaN where a loss is not finite.

    Drawn as `paired_difference` does (seeds and windows, each with replacement), but once for all variants, so that two
    hundred of them take a second; they are not adjusted (see `holm`).

    Args:
        base: mean loss of each window in nats a token; a row for each calibration seed.
        others: the same of each variant.

    Raises:
        ValueError: shapes that differ, or fewer than two windows.
    """
    base, others = np.asarray(base, np.float64), np.asarray(others, np.float64)
    if others.ndim != 3 or others.shape[1:] != base.shape or base.shape[1] < 2 or resamples < 1:
        raise ValueError(
            f"p_values_against: expected [seeds, windows] of two windows or more and [variants, seeds, windows], got "
            f"{base.shape} and {others.shape}, and at least one resample, got {resamples}"
        )
    with np.errstate(invalid="ignore"):
        difference = others - base
    seeds, windows = base.shape
    random = np.random.default_rng(seed)
    below, above = np.zeros(len(others)), np.zeros(len(others))
    for start in range(0, resamples, 1000):
        count = min(1000, resamples - start)
        by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        by_window = random.multinomial(windows, np.full(windows, 1 / windows), size=count) / windows
        with np.errstate(invalid="ignore"):
            means = np.einsum("vsw,rw,rs->vr", difference, by_window, by_seed, optimize=True)
        below += (means <= 0).sum(axis=1)
        above += (means >= 0).sum(axis=1)
    p = np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (resamples + 1))
    return np.where(np.isfinite(difference).all(axis=(1, 2)), p, np.nan)
