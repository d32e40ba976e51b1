"""A against B on the same text: the difference of their losses, and how sure it is (paired bootstrap)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Difference(NamedTuple):
    """The mean of A - B in nats a token, and its bootstrap interval. Below 0: A is better."""

    value: float
    low: float
    high: float

    @property
    def percent(self) -> tuple[float, float, float]:
        """The same as percent of B's perplexity: 100 · (e^value - 1), value and interval.

        >>> Difference(np.log(0.9), np.log(0.8), 0.0).percent
        (-10.0, -20.0, 0.0)
        """
        value, low, high = (round(100 * float(np.expm1(x)), 12) for x in self)
        return value, low, high

    @property
    def sure(self) -> bool:
        """True where the interval does not hold 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: Float[np.ndarray, "seeds windows"],
    b: Float[np.ndarray, "seeds windows"],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return the mean difference of two models' losses and its percentile interval.

    A window is hard or easy for both models, so the differences vary much less than the losses do. Windows and seeds
    are drawn with replacement, each by itself, and A and B are looked at on the same draw: all windows of a seed share
    a pruned model, all seeds share the windows. Of few seeds (three, say) the bootstrap knows little about how much
    seeds vary: with n seeds it makes their variance too small by a factor of (n - 1) / n.

    Args:
        a: mean loss of each window in nats a token, windows of equal length; a row for each calibration seed.
        b: the same of the model to compare with.
        level: probability that the interval is meant to cover the true difference.

    Raises:
        ValueError: other shapes than [seeds, windows] of both, or fewer than two windows.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] < 1 or a.shape[1] < 2:
        raise ValueError(
            f"paired_difference: expected [seeds, windows] of two windows or more, twice the same, got {a.shape} and "
            f"{b.shape}"
        )
    if not (resamples >= 1 and 0 < level < 1):
        raise ValueError(f"paired_difference: expected resamples >= 1 and 0 < level < 1, got {resamples} and {level}")
    difference = a - b
    seeds, windows = difference.shape
    random = np.random.default_rng(seed)
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_window = random.multinomial(windows, np.full(windows, 1 / windows), size=resamples) / windows
    means = np.einsum("rs,sw,rw->r", by_seed, difference, by_window, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(difference.mean()), float(low), float(high))
