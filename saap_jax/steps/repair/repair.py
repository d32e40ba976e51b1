"""Repairs of output matrices in closed form: what they have in common."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saap_jax.config.checks import check_choice
from saap_jax.steps.base import Before, Context, State, Step
from saap_jax.subjects.base import Subject
from saap_jax.surgery.corrections import Solved, Sums

Propagate = Literal["dense", "pruned"]
Tokens = Literal["scaled", "equal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRepair(Step):
    """Change what each sub-block writes so that it stays close to a target on the calibration text.

    A subclass says `solve`, from sums over the tokens of the text; perhaps another `target`.
    """

    kind = "repair"
    biases: ClassVar[bool] = False
    """Whether biases are added to the output projections."""

    propagate: Propagate = "pruned"
    """`dense`: each sub-block for itself, on the activations of the unpruned model; `pruned`: layer by layer, on those
    of the model as pruned so far, making up for the layers before too."""
    tokens: Tokens = "scaled"
    """How much each token counts: `scaled` by 1 / mean(x²) of the residual stream x behind the sub-block, by whose root
    whatever reads it divides it; or `equal`, as the rows of a traced model do."""

    def __post_init__(self) -> None:
        check_choice(f"{self.name}.propagate", self.propagate, Propagate)
        check_choice(f"{self.name}.tokens", self.tokens, Tokens)

    def solve(self, sums: Sums, weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]) -> Solved:
        """Return the output matrix (and bias) of a sub-block.

        Args:
            sums: over the tokens of the text, `surgery.corrections.Normal`: what fits, what judges, everything.
            kept: which rows of the matrix are kept; the others are to be 0.
        """
        raise NotImplementedError

    def target(
        self, own: Float[Array, "batch seq embed"], lacking: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        """Return what a sub-block with `propagate = pruned` is to write, where no norm stands behind it.

        Args:
            own: what the unpruned sub-block writes on the pruned stream.
            lacking: the unpruned stream behind the sub-block less the pruned one in front of it.
        """
        return lacking

    def check(self, subject: Subject, microbatches: int) -> None:
        """Raise ValueError for a model of which nothing can be repaired so."""
        subject.check_repair(self, microbatches)

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Repair the model as it is pruned."""
        subject, made = state.subject.repaired(
            state.keep, on.text, self, dense=on.dense, batch_size=on.batch_size, progress=on.progress("repair"),
        )  # fmt: skip
        return state._replace(subject=subject).tell(corrections=made)


def left(
    weight: Float[Array, "coordinates embed"], kept: Bool[Array, "coordinates"]
) -> Float[Array, "coordinates embed"]:
    """Return a matrix with the rows that went as 0."""
    return jnp.where(kept[:, None], weight, 0)
