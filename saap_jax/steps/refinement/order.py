"""Scores of all units, for refinements that choose how many of a layer go and leave it to scores which."""

import numpy as np

from saap_jax.steps.base import State, Step, need
from saap_jax.types import Scores


def scores_of_all(state: State, step: Step) -> Scores:
    """Return the score of every unit, float64, `[layers, units]` a structure; NaN where there is none.

    Raises:
        ValueError: a unit of the model has no score, as behind `rounds`.
    """
    scores, existing = need(state, step), state.subject.existing
    found: Scores = {n: np.where(units, np.asarray(scores[n], np.float64), np.nan) for n, units in existing.items()}
    if any(np.isnan(found[name][units]).any() for name, units in existing.items()):
        raise ValueError(f"{step.name}: expected scores of all units before it, got none of those that went in rounds")
    return found
