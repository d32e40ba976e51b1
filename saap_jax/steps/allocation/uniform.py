"""The same share of each layer."""

import dataclasses

import numpy as np

from saap_jax.steps.allocation.allocation import Allocation
from saap_jax.steps.base import step


@step("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """Remove the same share of each layer that is not left alone."""

    floor: bool = False
    """Round attention down to whole units, and make up for it by MLP channels."""

    @property
    def rounded_down(self) -> tuple[str, ...]:
        """Attention, if that is asked for."""
        return ("attention",) * self.floor

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters."""
        return size / size.sum()
