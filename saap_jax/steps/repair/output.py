"""Repairs of output matrices in closed form: bias and least squares."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saap_jax.checks import Share, check_positive
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.subjects.base import Subject
from saap_jax.surgery.corrections import (
    Repair,
    Ridge,
    Solved,
    Sums,
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

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for a model of which nothing can be repaired so."""
        subject.check_repair(self, text.microbatches)

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """One pass of the unpruned model, two of the pruned one."""
        return Cost(3)

    def __call__(self, state: State, on: Context) -> State:
        """Repair the model as it is pruned."""
        done = state.precomputed
        if done is not None and done.repair == self and done.of is state.subject and done.keep is state.keep:
            subject = done.subject
            made = done.corrections
        else:
            subject, made = state.subject.repaired(
                state.keep,
                on.text,
                self,
                dense=on.dense,
                batch_size=on.batch_size,
                progress=on.progress("repair"),
            )
        return state._replace(subject=subject, precomputed=None).report(corrections=made)


def next_repair(following: Sequence[Step]) -> OutputRepair | None:
    """Find the first repair in closed form of some steps, if any."""
    return next((each for each in following if isinstance(each, OutputRepair)), None)


LEAST = 1e-3
"""Damping at least, lest 32 bits do not suffice."""


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

    W'[K] = W[K] + (G_KK + δ D)⁻¹ (C_K - G_KK W[K]); see `surgery.compensation`. With `propagate = pruned` the target is
    T = (1 - β) · a W + β · (what the stream lacks), a of the pruned stream: with β = 1 it makes up for all that the
    layers before got wrong, and overfits on little text; with 0 each sub-block does what it did, on the stream that it
    gets. Sources: ZipLM (2302.04089), SlimGPT (2412.18110); the blend of SAES-SVD (ICLR 2026), there for low-rank
    factors. Deviation: the damping is relative to each coordinate's energy.

    W is the unpruned model's, also where a repair stands before this one: it takes that one's place.
    """

    from_dense: ClassVar[bool] = True
    damping: Annotated[float | None, check_positive] = None
    """δ, how much each kept weight resists, relative to a mean square; None: by `noise`."""
    noise: Annotated[float, check_positive] = 8.0
    """Noise over signal of what is to be written. Without `damping`, δ is so many times the kept inputs over the tokens
    of the text, as the ridge of a regression grows with its noise a coefficient."""
    ridge: Ridge = "coordinate"
    """Whose mean square the damping is relative to: each input's own, or the mean over the inputs that stay."""
    blend: Share = 0.3
    """β; it means nothing with `propagate = dense`, nor behind a norm (Gemma), where it is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None and "noise" in self.non_default_options:
            raise ValueError(
                f"least_squares.noise: expected no damping beside it, which takes its place, got noise {self.noise:g} "
                f"and damping {self.damping:g}; leave one of them out"
            )

    @property
    def alone(self) -> bool:
        """With β = 0, whatever the layers before got wrong."""
        return self.propagate == "pruned" and not self.blend

    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Solve for the kept rows."""
        damping = self.damping
        nothing = jnp.zeros(weight.shape[1], weight.dtype)
        if damping is None:
            damping = max(self.noise * float(jnp.sum(kept)) / max(float(sums.everything.tokens), 1.0), LEAST)
        fitted, new = (
            least_squares(each, weight, kept, jnp.asarray(damping), self.ridge) for each in (sums.fit, sums.everything)
        )
        return Solved(new, None, float(output_error(sums.judge, fitted, nothing)), damping)

    def target(
        self, own: Float[Array, "batch seq embed"], lacking: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Blend the two; an end without the other."""
        if self.blend in (0, 1):
            return lacking if self.blend else own
        return (1 - self.blend) * own + self.blend * lacking
