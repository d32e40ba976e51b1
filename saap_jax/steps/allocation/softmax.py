"""Shares by how much layers matter."""

import dataclasses
import math

import numpy as np

from saap_jax.steps.allocation.allocation import Allocation
from saap_jax.steps.base import step


@step("softmax")
@dataclasses.dataclass(frozen=True)
class Softmax(Allocation):
    """Remove of each layer a share ∝ e^(-s / temperature) of the mean score s of its units, attention rounded down.

    With what a layer cannot lose shared by the others it is the optimum of its problem, max Σ s (1 - φ) + ε H(φ) with
    a given mean of the sparsities φ, also where the bound of a φ is met. Source: MoDeGPT (arXiv:2408.09632), theorem 4.
    Deviation: layers of other sizes count by their parameters.
    """

    fills = True

    temperature: float = 0.1
    """ε, in the unit of the scores; the larger, the more alike are the shares."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"softmax.temperature: expected a number above 0, got {self.temperature}")

    @property
    def rounded_down(self) -> tuple[str, ...]:
        """Attention; MLP channels make up for it."""
        return ("attention",)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and e^(-score / ε)."""
        lowest = scores[size > 0].min(initial=np.inf)
        shares = size * np.exp(-(np.where(size > 0, scores, lowest) - lowest) / self.temperature)
        return shares / shares.sum()
