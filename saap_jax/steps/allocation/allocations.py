"""Ways to share a budget: as much of each layer, shares by depth or by scores, one ranking of all units."""

import dataclasses
from typing import Annotated

import numpy as np

from saap_jax.config.checks import check_positive
from saap_jax.steps.allocation.allocation import Allocation, By
from saap_jax.steps.base import step


@step("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """Remove the same share of each layer that is not left alone."""

    floor: bool = False
    """Round attention down to whole units, and make up for it by MLP channels."""
    alike: bool = False
    """Leave layers of one shape alike: round what each loses up to whole blocks, and give nothing of it back."""

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters."""
        return size / size.sum()


@step("log")
@dataclasses.dataclass(frozen=True)
class Log(Allocation):
    """Remove of each layer a share that grows with log(layer + 1), attention rounded down to whole units.

    Source: SlimGPT (arXiv:2412.18110).
    """

    floor: bool = dataclasses.field(default=True, init=False, repr=False)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and log(layer + 1)."""
        shares = size * np.log1p(np.arange(len(size)))
        return shares / shares.sum() if shares.any() else size / size.sum()


@step("softmax")
@dataclasses.dataclass(frozen=True)
class Softmax(Allocation):
    """Remove of each layer a share ∝ e^(-s / temperature) of the mean score s of its units, attention rounded down.

    With what a layer cannot lose shared by the others it is the optimum of its problem, max Σ s (1 - φ) + ε H(φ) with
    a given mean of the sparsities φ, also where the bound of a φ is met. Source: MoDeGPT (arXiv:2408.09632), theorem 4.
    Deviation: layers of other sizes count by their parameters.
    """

    fills = True

    temperature: Annotated[float, check_positive] = 0.1
    """ε, in the unit of the scores; the larger, the more alike are the shares."""
    floor: bool = dataclasses.field(default=True, init=False, repr=False)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and e^(-score / ε)."""
        lowest = scores[size > 0].min(initial=np.inf)
        shares = size * np.exp(-(np.where(size > 0, scores, lowest) - lowest) / self.temperature)
        return shares / shares.sum()


@step("global")
@dataclasses.dataclass(frozen=True)
class Global(Allocation):
    """Remove the units of the lowest scores of all layers and structures, whatever each of them loses."""

    ranks = True

    by: By = "score_per_parameter"
    """What ranks them: their scores, or the scores over their parameters, which is the knapsack's order."""
