"""A bias for what a sub-block lacks on average."""

import dataclasses

from jaxtyping import Array, Bool, Float

from saap_jax.steps.base import step
from saap_jax.steps.repair.repair import OutputRepair, left
from saap_jax.surgery.corrections import Solved, Sums, output_bias, output_error


@step("bias")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias(OutputRepair):
    """Leave the kept weights as they are and add what the sub-block lacks on average.

    Source: FLAP (arXiv:2312.11983), section 3.3.
    """

    biases = True

    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Return the kept rows and the bias."""
        rest = left(weight, kept)
        error = float(output_error(sums.judge, rest, output_bias(sums.fit, weight, kept)))
        return Solved(rest, output_bias(sums.everything, weight, kept), error)
