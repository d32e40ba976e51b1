"""The one test behind every verdict on losses: how sure a mean difference is, at whatever time one looks.

Two models have losses on the same windows, or outcomes on the same items. d are their differences, one a unit: an item,
a window, or an article, where windows are of `FEWEST` articles or more (see `by_article`). "The mean is 0" is tested by
an e-process, the Bayes factor of "d has mean μ, with μ / σ normal of variance g" against "mean 0", with the right Haar
prior on σ,

    e = (1 + n g)^-½ · ((1 + t² / ν) / (1 + t² / (ν (1 + n g))))^(n / 2),     t = √n · mean / deviation,  ν = n - 1,

averaged over the g of `SCALES`. Of means above 0 alone, μ / σ the positive half of that normal, it is

    e⁺ = 2 e · F_n(t · √(n g / (1 + n g)) · √(n / (ν + t² / (1 + n g)))),     F_n Student's distribution, n degrees,

which grows with t, so that means below 0 make it cross a bound less often than 0 does. By Ville's inequality e⁺ ever
reaches 1 / α with probability α at most. So one may look after any number of windows, evaluate more, and look again.

The interval of a difference are the means that neither side rejects at level α / (2 m), where m is how many others a
model is compared with (Bonferroni): mean ± `boundary` · deviation / √n. A difference is sure where its interval does
not hold 0. Races, tables, `saap ab` and suggestions all go by it. What it is of are these models on text like the
windows; of methods on other calibration text see `experiments/claims.py`.

Sources: Hendriksen, de Heide & Grünwald, Optional stopping with Bayes factors, Bayesian Analysis 16, 2021 (right Haar
priors); Wang & Ramdas, Anytime-valid t-tests, 2024 (arXiv:2310.03722). It holds for normal differences; for others the
slow test suite simulates it, and exponential ones are missed in 6 % in the place of 5 %.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saap_jax.evaluation.resample import FEWEST, LEVEL

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Variances g of the standardised difference that the tests look out for."""


def threshold(others: int, level: float = LEVEL) -> float:
    """Compute the logarithm of the e⁺ from which on a difference is sure, beside so many others, on either side."""
    return math.log(2 * max(others, 1) / level)


@functools.cache
def boundary(count: int, evidence: float) -> float:
    """Find the t of `count` differences at which log e⁺ reaches `evidence`; infinite where none does."""
    low = 0.0
    high = 1e6
    if float(log_evidence(high, count)) < evidence:
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(log_evidence(middle, count)) < evidence else (low, middle)
    return high


def log_evidence(t: float | Float[np.ndarray, "*pairs"], count: int) -> Float[np.ndarray, "*pairs"]:
    """Compute the logarithm of e⁺ of a t statistic of `count` differences, against a mean of 0 or below.

    >>> [log_evidence(t, 100).round(2).item() for t in (-5.0, 0.0, 5.0)]
    [-2.91, -1.32, 9.13]
    """
    from scipy.special import stdtr

    t = np.clip(np.asarray(t, np.float64), -1e150, 1e150)[..., None]  # an axis for scales; its square is finite
    square = np.square(t)
    free = count - 1
    spread = count * np.asarray(SCALES)
    each = -0.5 * np.log1p(spread) + 0.5 * count * (np.log1p(square / free) - np.log1p(square / (free * (1 + spread))))
    posterior = t * np.sqrt(spread / (1 + spread) * count / (free + square / (1 + spread)))
    with np.errstate(divide="ignore"):
        each = each + np.log(2 * stdtr(count, posterior))
    return np.asarray(np.logaddexp.reduce(each, axis=-1) - math.log(len(SCALES)))


def by_article(values: Float[np.ndarray, "*rows windows"], articles: Sequence[int]) -> Float[np.ndarray, "*rows units"]:
    """Make a value of each article, since neighbouring windows say less than others do.

    Their mean m is that of the n windows. An article's value is m and what it adds to m: the sum of its windows less m,
    over the mean number of windows of an article. So the number of its windows is its weight and adds no spread (the
    linearised ratio estimator of cluster sampling). Windows are the units where articles are not known, or fewer than
    `FEWEST`.

    Args:
        articles: the number of the article of each window, those of an article side by side.

    >>> by_article(np.array([1.0, 3, 2, 2, 2, 2, 2, 2, 2]), [0, 0, *range(1, 8)]).tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    starts = []
    if len(articles):
        starts = np.flatnonzero(np.diff(articles, prepend=-1))
    if len(starts) < FEWEST:
        return values
    mean = values.mean(axis=-1, keepdims=True)
    return mean + np.add.reduceat(values - mean, starts, axis=-1) * (len(starts) / values.shape[-1])
