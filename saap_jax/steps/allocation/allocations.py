"""Ways to share a budget: as much of each layer, shares by depth or by scores, one ranking of all units."""

import dataclasses
from typing import Annotated

import numpy as np

from saap_jax.checks import check_positive
from saap_jax.steps.allocation.allocation import Allocation, By
from saap_jax.steps.allocation.blocks import SLACK
from saap_jax.steps.base import step


@step("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """Remove the same share of each layer that is not left alone."""

    floor: bool = False
    """Round attention down to whole units, and make up for it by MLP channels."""
    alike: bool = False
    """Leave layers of one shape alike: round what each loses up to whole blocks, and give nothing of it back."""


@step("log")
@dataclasses.dataclass(frozen=True)
class Log(Allocation):
    """Remove of each layer a share that grows with log(layer + 1), attention rounded down to whole units.

    The share of layer l is r + c log(l + 1), with the least r at which no layer is asked for more than it can lose: 0
    where that suffices, so that the first layer stays. Source: SlimGPT (arXiv:2412.18110), equation 6, where r is set
    by hand.
    """

    floor: bool = dataclasses.field(default=True, init=False, repr=False)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and log(layer + 1)."""
        shares = size * np.log1p(np.arange(len(size)))
        if shares.any():
            return shares / shares.sum()
        return size / size.sum()

    def fitted(self, shares: np.ndarray, size: np.ndarray, most: np.ndarray, target: int | float) -> np.ndarray:
        """Mix shares of log(layer + 1) with equal ones, as few of them as suffice."""
        even = size / size.sum()
        mixed = _mixed(shares, even, most, target or _most(shares, even, most))
        if mixed:
            return (1 - mixed) * shares + mixed * even
        return shares


def _mixed(shares: np.ndarray, even: np.ndarray, most: np.ndarray, target: int | float) -> float | None:
    """Find the least m in [0, 1] at which no layer is asked for more than it can lose, of (1 - m) shares + m even.

    Returns:
        m; None where no m will do.
    """
    asked = target * shares
    too_much = asked > most * (1 + SLACK)
    if not too_much.any():
        return 0.0
    fewer = target * (shares - even)  # a layer is asked for asked - m · fewer
    falls = fewer > 0
    rises = fewer < 0
    if too_much[~falls].any():  # with m it is asked for as much, or for more
        return None
    least = float(((asked - most)[falls] / fewer[falls]).max())
    largest = float(((asked - most)[rises] / fewer[rises]).min(initial=1.0))
    if least <= largest * (1 + SLACK):
        return least
    return None


def _most(shares: np.ndarray, even: np.ndarray, most: np.ndarray) -> int:
    """Find how many parameters can go by some mixture of two shares, by halving."""
    low = 0
    high = int(most.sum()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = _mixed(shares, even, most, middle) is not None
        low, high = (middle, high) if fits else (low, middle)
    return low


@step("softmax")
@dataclasses.dataclass(frozen=True)
class Softmax(Allocation):
    """Remove of each layer a share ∝ e^(-s / temperature) of the mean score s of its units, attention rounded down.

    With what a layer cannot lose shared by the others it is the optimum of its problem, max Σ s (1 - φ) + ε H(φ) with
    a given mean of the sparsities φ, also where the bound of a φ is met. Source: MoDeGPT (arXiv:2408.09632), theorem 4.
    Deviation: layers of other sizes count by their parameters.
    """

    temperature: Annotated[float, check_positive] = 0.1
    """ε, in the unit of the scores; the larger, the more alike are the shares."""
    floor: bool = dataclasses.field(default=True, init=False, repr=False)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and e^(-score / ε)."""
        lowest = scores[size > 0].min(initial=np.inf)
        shares = size * np.exp(-(np.where(size > 0, scores, lowest) - lowest) / self.temperature)
        return shares / shares.sum()

    def fitted(self, shares: np.ndarray, size: np.ndarray, most: np.ndarray, target: int | float) -> np.ndarray:
        """Share what a layer cannot lose between the others, in proportion to their shares."""
        if not 0 < target < most.sum():
            return most / most.sum() if most.any() else shares
        most = most / target
        full = np.zeros(len(shares), bool)
        while True:  # min(most, c · shares) with the c at which they make 1
            rest = np.where(full, 0.0, shares)
            if not rest.any():  # too small to be told from 0
                rest = np.where(full, 0.0, most)
            left = 1 - most[full].sum()
            scaled = np.where(full, most, rest * left / max(rest.sum(), np.finfo(float).tiny))
            over = ~full & (scaled > most)
            if not over.any():
                return scaled
            full |= over


@step("global")
@dataclasses.dataclass(frozen=True)
class Global(Allocation):
    """Remove the units of the lowest scores of all layers and structures, whatever each of them loses."""

    ranks = True

    by: By = "score_per_parameter"
    """What ranks them: their scores, or the scores over their parameters, which is the knapsack's order."""
