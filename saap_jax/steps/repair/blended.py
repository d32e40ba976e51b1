"""Least squares towards a blend of two targets."""

import dataclasses

from jaxtyping import Array, Float

from saap_jax.config.checks import check_share
from saap_jax.steps.base import step
from saap_jax.steps.repair.least_squares import LeastSquares


@step("blended")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blended(LeastSquares):
    """Repair by least squares towards T = (1 - β) · a W + β · (what the stream lacks), a of the pruned stream.

    With β = 1 it is `least_squares`, which makes up for all that the layers before got wrong and overfits on little
    text; with 0 each sub-block does what it did, on the stream that it gets. Source: the blend of SAES-SVD (ICLR 2026),
    there for low-rank factors.
    """

    blend: float = 0.4
    """β."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("blended.blend", self.blend)
        if self.propagate != "pruned":
            raise ValueError(f"blended.propagate: expected pruned, got {self.propagate}: there is no other target")

    def target(
        self, own: Float[Array, "batch seq embed"], lacking: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Return the blend."""
        return (1 - self.blend) * own + self.blend * lacking
