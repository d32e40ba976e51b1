"""One factor for each kept unit, trained towards what the unpruned model predicts."""

import dataclasses
import math
from typing import Any

from saap_jax.config.checks import check_at_least
from saap_jax.steps.base import Before, Context, State, Step, step
from saap_jax.surgery.corrections import check_microbatches


@step("scales")
@dataclasses.dataclass(frozen=True)
class Scales(Step):
    """Train one factor for each kept unit towards what the unpruned model predicts, and fold it into the weights.

    Every fourth microbatch is held out, and the factors that do best there count; see `surgery.scales`.
    """

    kind = "repair"

    steps: int = 32
    """Steps of Adam, each on a microbatch of the calibration text and as long as three forward passes over it."""
    rate: float = 0.01
    """Learning rate of the first step; it falls to 0 as a cosine."""

    def __post_init__(self) -> None:
        check_at_least("scales.steps", self.steps, 1)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"scales.rate: expected a number above 0, got {self.rate}")

    def check(self, subject: Any, microbatches: int) -> None:
        """Raise ValueError for too little text, or a model whose units have no gates of their own."""
        check_microbatches("scales", microbatches)
        subject.check_objective("scales")

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Train the factors of the model as it is."""
        subject, done = state.subject.scaled(
            state.keep, on.text, self.steps, self.rate, dense=on.dense, batch_size=on.batch_size,
            progress=on.progress("train scales"),
        )  # fmt: skip
        return state._replace(subject=subject).tell(scaled=done)
