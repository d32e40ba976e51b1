"""A refinement by itself, with an objective of a test's own in place of the divergence on text."""

from typing import Any

import numpy as np

from saap_jax.steps.allocation.allocation import Allocation, choose
from saap_jax.steps.base import Context, State, Step
from saap_jax.steps.limits import Within
from saap_jax.subjects.llama import LlamaSubject


class Judged(LlamaSubject):
    """A model whose keep-sets a test judges."""

    def objective(self, *_: Any, **__: Any) -> Any:
        """Return what the test gave."""
        return self.given


def start_of(subject, ratio: float, allocation: Allocation, within: Within = Within(), seed: int = 0):  # noqa: B008
    """Return the state behind an allocation of random scores."""
    random = np.random.default_rng(seed)
    scores = {name: random.random(units.shape) for name, units in subject.existing.items()}
    keep = choose(subject, scores, ratio, allocation, within).keep
    return State(subject, keep, within, scores=scores)


def refined(subject, start: State, step: Step, objective: Any, ratio: float) -> State:
    """Return the state behind a refinement that goes by an objective."""
    judged = Judged(subject.model)
    object.__setattr__(judged, "given", objective)
    on = Context(dense=judged, scenarios={"text": None}, ratio=ratio, final=ratio)
    object.__setattr__(judged, "join", lambda parts: None)
    return step(start._replace(subject=judged), on)
