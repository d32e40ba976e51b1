"""Repairs of output matrices in closed form: bias, least squares, and least squares towards a blend."""

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from saap_jax.config.checks import Share, check_positive
from saap_jax.steps.base import Before, Context, State, Step, step
from saap_jax.subjects.base import Subject
from saap_jax.surgery.corrections import (
    DAMPINGS,
    Repair,
    Ridge,
    Solved,
    Sums,
    check_microbatches,
    damping_errors,
    least_squares,
    output_bias,
    output_error,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRepair(Repair, Step):
    """Change what each sub-block writes so that it stays close to a target on the calibration text.

    A subclass says `solve`, from sums over the tokens of the text; perhaps another `target`.
    """

    kind = "repair"

    def check(self, subject: Subject, microbatches: int) -> None:
        """Raise ValueError for a model of which nothing can be repaired so."""
        subject.check_repair(self, microbatches)

    def passes(self, before: float, parts: int, ratio: float) -> float:
        """One of the unpruned model, two of the pruned one."""
        return before + 3

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Repair the model as it is pruned."""
        ready = state.ready
        if ready is not None and ready.repair == self and ready.of is state.subject and ready.keep is state.keep:
            subject, made = ready.subject, ready.corrections
        else:
            subject, made = state.subject.repaired(
                state.keep, on.text, self, dense=on.dense, batch_size=on.batch_size, progress=on.progress("repair"),
            )  # fmt: skip
        return state._replace(subject=subject, ready=None).tell(corrections=made)


def left(
    weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]
) -> Float[Array, "coordinates embed"]:
    """Put back the rows that went, as 0."""
    return jnp.where(kept[:, None], weight, 0)


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


@step("least_squares")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastSquares(OutputRepair):
    """Change the kept rows of each output matrix by least squares.

    W'[K] = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]); see `surgery.compensation`. Sources: ZipLM (2302.04089), SlimGPT
    (2412.18110); our deviations are the damping relative to each coordinate's energy, chosen on held-out text, and the
    target, which makes up for the layers before.
    """

    damping: Annotated[float | None, check_positive] = None
    """δ, how much each kept weight resists, relative to a mean square; None: what does best on every fourth
    microbatch of the calibration text, for each sub-block."""
    ridge: Ridge = "coordinate"
    """Whose mean square the damping is relative to: each input's own, or the mean over the inputs that stay."""

    def check(self, subject: Subject, microbatches: int) -> None:
        """Raise ValueError for a model of which nothing can be repaired so, or too little text to hold some out."""
        super().check(subject, microbatches)
        if self.damping is None:
            check_microbatches("least_squares", microbatches, "a number for damping")

    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Solve for the kept rows with the given damping, or the one that the held-out text prefers."""
        nothing = jnp.zeros(weight.shape[1], weight.dtype)
        if self.damping is None:
            errors = np.asarray(
                damping_errors(sums.fit, sums.judge, weight, kept, jnp.asarray(DAMPINGS, weight.dtype), self.ridge)
            )
            damping, error = DAMPINGS[int(np.argmin(errors))], float(errors.min())
            unchanged = float(output_error(sums.judge, left(weight, kept), nothing))
            if unchanged <= error:  # no damping is as good as none at all
                return Solved(left(weight, kept), None, unchanged, math.inf)
        else:
            damping = self.damping
            fitted = least_squares(sums.fit, weight, kept, jnp.asarray(damping), self.ridge)
            error = float(output_error(sums.judge, fitted, nothing))
        new = least_squares(sums.everything, weight, kept, jnp.asarray(damping), self.ridge)
        return Solved(new, None, error, damping)


@step("blended")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blended(LeastSquares):
    """Repair by least squares towards T = (1 - β) · a W + β · (what the stream lacks), a of the pruned stream.

    With β = 1 it is `least_squares`, which makes up for all that the layers before got wrong and overfits on little
    text; with 0 each sub-block does what it did, on the stream that it gets. Source: the blend of SAES-SVD (ICLR 2026),
    there for low-rank factors.
    """

    blend: Share = 0.4
    """β."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.propagate != "pruned":
            raise ValueError(f"blended.propagate: expected pruned, got {self.propagate}: there is no other target")

    @property
    def alone(self) -> bool:
        """With β = 0, whatever the layers before got wrong."""
        return not self.blend

    def target(
        self, own: Float[Array, "batch seq embed"], lacking: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Return the blend."""
        return (1 - self.blend) * own + self.blend * lacking
