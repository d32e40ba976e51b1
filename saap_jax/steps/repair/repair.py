"""Repairs of output matrices in closed form: what they have in common."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saap_jax.config.checks import check_choice
from saap_jax.steps.base import Before, Context, State, Step
from saap_jax.subjects.base import Subject
from saap_jax.surgery.corrections import Propagate, Repair, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRepair(Repair, Step):
    """Change what each sub-block writes so that it stays close to a target on the calibration text.

    A subclass says `solve`, from sums over the tokens of the text; perhaps another `target`.
    """

    kind = "repair"

    def __post_init__(self) -> None:
        check_choice(f"{self.name}.propagate", self.propagate, Propagate)
        check_choice(f"{self.name}.tokens", self.tokens, Tokens)

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
    """Put back the rows that went, as 0."""
    return jnp.where(kept[:, None], weight, 0)
