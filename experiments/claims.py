"""What may be claimed of two methods whose calibration seeds and articles are both a few of many.

A and B have losses `[seeds, windows]` on the same windows. Their differences follow a crossed random-effects model,

    d[s, w] = μ + seed[s] + article[a(w)] + both[s, a(w)] + window[s, w],

a(w) the article of a window. The mean over all windows estimates μ with

    SE² = s²_seeds / S + V_articles,

s²_seeds the variance of the S means of a seed, and V_articles the jackknife variance of the mean when one article after
the other is left out, which is s²_articles / A where articles have as many windows each. Both terms hold what varies in
pairs of seed and article, so SE² holds it twice: the interval is rather too wide. Its quantile is Student's, with the
degrees of freedom of Satterthwaite: S - 1 and, of articles of sizes n, (Σ n)² / Σ n² - 1, which is A - 1 where they are
equal. And it is never narrower than Student's interval of the seed means alone, since few seeds tell little of how much
seeds vary.

Sources: Satterthwaite, An approximate distribution of estimates of variance components, Biometrics Bulletin 2, 1946;
Miller, A credible jackknife, Annals of Mathematical Statistics 35, 1964; Kish, Survey Sampling, 1965 (sizes); for
crossed effects that are added up, Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtr, stdtrit

from saap_jax.evaluation.differences import Difference, decimals_of
from saap_jax.evaluation.resample import LEVEL, holm
from saap_jax.evaluation.scales import PERPLEXITY


class Crossed(NamedTuple):
    """The mean of A - B in nats a token, and how much it varies; NaN where a loss is not finite."""

    value: float
    variances: tuple[float, float]
    """Of the mean, by seeds and by articles."""
    freedoms: tuple[float, float]
    """Degrees of freedom of each of them."""
    windows: int

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(sum(self.variances))

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of the squared standard error."""
        spent = sum(variance**2 / each for variance, each in zip(self.variances, self.freedoms, strict=True))
        return sum(self.variances) ** 2 / spent if spent else min(self.freedoms)

    def half(self, level: float = 1 - LEVEL) -> float:
        """Half the width of the interval, of both or of the seeds alone, whichever is wider."""
        both, seeds = stdtrit([self.freedom, self.freedoms[0]], (1 + level) / 2).tolist()
        return max(both * self.error, seeds * math.sqrt(self.variances[0]))

    @property
    def p_value(self) -> float:
        """Two-sided, of "there is no difference": below α where the interval of level 1 - α does not hold 0."""
        if not self.value:
            return 1.0
        with np.errstate(divide="ignore"):
            ratios = abs(self.value) / np.sqrt([sum(self.variances), self.variances[0]])
        return float((2 * stdtr([self.freedom, self.freedoms[0]], -ratios)).max())


def crossed(
    a: Float[np.ndarray, "seeds windows"], b: Float[np.ndarray, "seeds windows"], articles: Int[np.ndarray, " windows"]
) -> Crossed:
    """Estimate the mean difference of two methods' losses on the same seeds and windows.

    Args:
        a: mean loss of each window in nats a token, windows of equal length; a row for each calibration seed.
        articles: the number of the article of each window; any numbers.

    Raises:
        ValueError: shapes that differ, or fewer than two seeds or two articles, of which nothing could be claimed.
    """
    of, sizes = np.unique(articles, return_inverse=True, return_counts=True)[1:]
    if a.shape != b.shape or a.shape[1:] != of.shape or len(a) < 2 or len(sizes) < 2:
        raise ValueError(
            "claims: expected [seeds, windows] of two seeds and two articles or more, the same of both methods, got "
            f"{a.shape} and {b.shape}, {len(of)} windows of {len(sizes)} articles"
        )
    with np.errstate(invalid="ignore"):
        difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        seeds, windows, shares = difference.mean(axis=1), difference.mean(axis=0), sizes / len(of)
        value, means = float(seeds.mean()), np.bincount(of, windows) / sizes
        without = shares * (means - value) / (1 - shares)  # how far the mean moves when an article is left out
        by_articles = (1 - 1 / len(sizes)) * float(np.square(without).sum())
        by_seeds = float(seeds.var(ddof=1)) / len(seeds)
    freedoms = (len(seeds) - 1.0, 1 / float(np.square(shares).sum()) - 1)
    return Crossed(value, (by_seeds, by_articles), freedoms, len(of))


FAR = 1000.0
"""Per cent from which on a difference is said as a factor."""


class Verdict(NamedTuple):
    """What may be said of A beside one of its rivals."""

    difference: Difference
    """A - B with its own 95 % interval."""
    p_value: float
    """Holm's, over all rivals."""
    seen: float
    """The least difference that would have been significant, in per cent of B's perplexity."""
    seeds: int = 0
    """How many it rests on."""

    @property
    def significant(self) -> bool:
        """Whether the difference is significant beside all that was looked at with it."""
        return self.p_value < LEVEL

    @property
    def said(self) -> str:
        """The verdict in words."""
        if not math.isfinite(self.difference.value):
            return "not finite"
        if self.significant:
            return "significantly lower" if self.difference.value < 0 else "significantly higher"
        if self.seen >= FAR:
            return f"not significant, differences below a factor of {1 + self.seen / 100:.2g} cannot be seen"
        return f"not significant, differences below {self.seen:.{decimals_of(self.seen)}f} % cannot be seen"


def verdicts(estimates: Sequence[Crossed]) -> list[Verdict]:
    """Judge A beside each of its rivals, so that in all of them together a wrong "significant" is as rare as `LEVEL`.

    That is for verdicts of single rivals. That A is below *every* rival is an intersection, which takes each p-value as
    it is (`arena_report.Comparison.below`).

    What cannot be seen is the half width of an interval of level 1 - `LEVEL` / m, with m the number of rivals from whom
    A does not differ significantly, which is the last level at which Holm's procedure tested.
    """
    adjusted = holm([each.p_value for each in estimates])
    tested = 1 - LEVEL / max(1, int((adjusted >= LEVEL).sum()))
    found = []
    for each, p in zip(estimates, adjusted.tolist(), strict=True):
        half = each.half()
        whole = Difference(each.value, each.value - half, each.value + half, windows=each.windows)
        found.append(Verdict(whole, p, PERPLEXITY.percent(each.half(tested), math.inf), round(each.freedoms[0]) + 1))
    return found
