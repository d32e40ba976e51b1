"""Stage 2c, learned: which units stay is trained, with all weights as they are, under the exact budget.

    minimise over what is kept, within the budget,   mean over tokens of KL(p_unpruned ‖ p_masked)

Every unit has a value. In each step the solver of the search keeps what is worth most under the budget (the hard
projection), and the derivative of the divergence by each gate there goes straight through to the values, a parameter:

    d = (∂KL/∂g) / cost,    m ← β m + (1 − β) d,    value ← value − rate · m / RMS(d)

A unit that is gone has a derivative too, what opening its gate would do; so it may come back. The root mean square is
over all units, and a running mean over the steps: heads and channels are measured alike. Values begin at 0.75 for what
was chosen and 0.25 for the rest, whatever the score was that chose it.

Sources: gates trained with frozen weights towards the model's own predictions, projected onto the budget with a
straight-through derivative, as GRASPrune (ACL 2026) and DDP (ICML 2026) do. Deviations: the solver and the limits are
those of `search`, values are not bounded, derivatives are taken a parameter, and held-out text says which round counts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from saap_jax.config.method import LearnConfig, SearchConfig
from saap_jax.selection.search import Selection
from saap_jax.subjects.base import Objective
from saap_jax.types import Scores

MOMENTUM = 0.9
"""β of the derivatives, and of the mean of their squares."""

KEPT, GONE = 0.75, 0.25
"""Values at the start."""

Project = Callable[[Scores, SearchConfig], Selection]
"""Returns what is kept of units of some value, within the budget."""


def learned(
    project: Project,
    objective: Objective,
    start: Selection,
    costs: dict[str, np.ndarray],
    config: SearchConfig,
    *,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Selection:
    """Train which units stay, from a selection on; return the best of it and of what the rounds ended with.

    Args:
        project: the solver at the ratio of the selection.
        objective: what is lowered; a round learns from each of its parts once.
        costs: parameters a unit, `[groups]` a structure.
        config: limits of the search, and how to learn.
        progress: wraps the steps, to show progress.
    """
    free = dataclasses.replace(config, allocation="global", rank_by="score", normalize="none", learn=LearnConfig())
    values: Scores = {name: np.where(kept, KEPT, GONE) for name, kept in start.keep.items()}
    moments = {name: np.zeros(each.shape) for name, each in values.items()}
    square, step, current = 0.0, 0, start
    found = [(objective.judge(start.keep), start)]
    random, steps = np.random.default_rng(0), iter(progress(range(config.learn.steps)))
    while some := list(zip(random.permutation(objective.parts), steps, strict=False)):
        for part, _ in some:
            _, gradient = objective.gradient(current.keep, int(part))
            by_cost = {name: gradient[name] / costs[name][:, None] for name in values}
            mean = float(np.mean(np.concatenate([each.ravel() for each in by_cost.values()]) ** 2))
            square = MOMENTUM * square + (1 - MOMENTUM) * mean
            step += 1
            scale = math.sqrt(square / (1 - MOMENTUM**step)) or 1.0
            rate = config.learn.rate * (1 + math.cos(math.pi * (step - 1) / config.learn.steps)) / 2
            for name, each in by_cost.items():
                moments[name] = MOMENTUM * moments[name] + (1 - MOMENTUM) * each
                values[name] = values[name] - rate * moments[name] / scale
            current = project(values, free)
        found.append((objective.judge(current.keep), current))
    best = min(found, key=lambda each: each[0])[1]
    return best._replace(divergences=tuple(judged for judged, _ in found))
