"""Least squares: the kept rows of an output matrix stand in for those that went."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from saap_jax.steps.base import step
from saap_jax.steps.repair.repair import OutputRepair, left
from saap_jax.subjects.base import Subject
from saap_jax.surgery.corrections import (
    DAMPINGS,
    Solved,
    Sums,
    check_microbatches,
    damping_errors,
    kept_rows,
    least_squares,
    output_error,
    rows_of,
)


@step("least_squares")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastSquares(OutputRepair):
    """Change the kept rows of each output matrix by least squares.

    W'[K] = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]); see `surgery.compensation`. Sources: ZipLM (2302.04089), SlimGPT
    (2412.18110); our deviations are the damping relative to each coordinate's energy, chosen on held-out text, and the
    target, which makes up for the layers before.
    """

    damping: float | None = None
    """δ, how much each kept weight resists, relative to its input's mean square; None: what does best on every fourth
    microbatch of the calibration text, for each sub-block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"least_squares.damping: expected a number above 0 or None, got {self.damping}")

    def check(self, subject: Subject, microbatches: int) -> None:
        """Raise ValueError for a model of which nothing can be repaired so, or too little text to hold some out."""
        super().check(subject, microbatches)
        if self.damping is None:
            check_microbatches("least_squares", microbatches, "a number for damping")

    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Solve for the kept rows with the given damping, or the one that the held-out text prefers."""
        rows, count = kept_rows(np.asarray(kept))
        fit, judge, everything = (rows_of(normal, jnp.asarray(rows)) for normal in sums)
        start, some = weight[rows], jnp.asarray(count)
        nothing = jnp.zeros(weight.shape[1], weight.dtype)
        if self.damping is None:
            errors = np.asarray(damping_errors(fit, judge, start, some, jnp.asarray(DAMPINGS, weight.dtype)))
            damping, error = DAMPINGS[int(np.argmin(errors))], float(errors.min())
            unchanged = float(output_error(judge, start, nothing))
            if unchanged <= error:  # no damping is as good as none at all
                return Solved(left(weight, kept), None, unchanged, math.inf)
        else:
            damping = self.damping
            error = float(output_error(judge, least_squares(fit, start, some, jnp.asarray(damping)), nothing))
        solved = least_squares(everything, start, some, jnp.asarray(damping))
        return Solved(jnp.zeros_like(weight).at[rows].set(solved), None, error, damping)
