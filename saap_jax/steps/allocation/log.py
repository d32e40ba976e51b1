"""Shares that grow with the depth."""

import dataclasses

import numpy as np

from saap_jax.steps.allocation.allocation import Allocation
from saap_jax.steps.base import step


@step("log")
@dataclasses.dataclass(frozen=True)
class Log(Allocation):
    """Remove of each layer a share that grows with log(layer + 1), attention rounded down to whole units.

    Source: SlimGPT (arXiv:2412.18110).
    """

    @property
    def rounded_down(self) -> tuple[str, ...]:
        """Attention; MLP channels make up for it."""
        return ("attention",)

    def shares(self, size: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return shares in proportion to the parameters and log(layer + 1)."""
        shares = size * np.log1p(np.arange(len(size)))
        return shares / shares.sum() if shares.any() else size / size.sum()
