"""One factor for each kept unit, trained towards what the unpruned model predicts; weights stay.

    minimise over s   mean over tokens of KL(p_unpruned ‖ p_pruned(s)),     activations of unit u times s_u,

by Adam from s = 1. A unit's factor is folded into its rows of the output matrix, so that the pruned model has the
parameters that it had. The microbatches that are held out judge after each round over the others, and the best factors
count, 1 among them, so that text that was not trained on never says that they did harm.

Sources: one scale a unit with weights frozen and folded afterwards as GRASPrune's last step (ACL 2026) and the gates of
DDP (ICML 2026), here behind any correction of the output matrices, and with the divergence alone as the loss.
"""

import dataclasses
from typing import Annotated

import numpy as np

from saap_jax.checks import Positive, check_positive
from saap_jax.runtime.decisions import least_first
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.steps.limits import first_prunable, limits_at_end
from saap_jax.steps.training import adam, adam_start, cosine, rounds, trained
from saap_jax.subjects.base import LanguageModel, language_model
from saap_jax.types import Scores


@step("scales")
@dataclasses.dataclass(frozen=True)
class Scales(Step):
    """Train one factor for each kept unit towards what the unpruned model predicts, and fold it into the weights.

    Every fourth microbatch is held out, and the factors that do best there count. Layers in front of the first one that
    has lost units, or may lose some, are left alone.
    """

    kind = "repair"
    needs_objective = True
    of = LanguageModel

    steps: Positive = 32
    """Steps of Adam, each on a microbatch of the calibration text and shorter than three forward passes over it."""
    rate: Annotated[float, check_positive] = 0.01
    """Learning rate of the first step; it falls to 0 as a cosine."""

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """The passes of the steps of training."""
        return Cost(trained(self.steps, text.microbatches))

    def __call__(self, state: State, on: Context) -> State:
        """Train the factors of the model as it is."""
        keep = state.keep
        first = first_prunable(keep, state.subject.existing, limits_at_end(state, on))
        objective = language_model(self.name, state.subject).objective(on.text, on.batch_size, on.dense, first=first)

        def gates(scales: Scores) -> Scores:
            return {name: np.where(kept, scales[name], 0.0) for name, kept in keep.items()}

        scales: Scores = {name: np.ones(kept.shape) for name, kept in keep.items()}
        learnt = adam_start(scales)
        found = [(objective.judge(gates(scales)), scales)]
        for some in rounds(objective.parts, on.progress("train scales")(range(self.steps))):
            for part, at in some:
                _, gradient = objective.gradient(gates(scales), part)
                slopes: Scores = {name: np.where(kept, gradient[name], 0.0) for name, kept in keep.items()}
                scales, learnt = adam(scales, slopes, learnt, cosine(self.rate, at, self.steps))
            found.append((objective.judge(gates(scales)), scales))
        judged = [each for each, _ in found]
        best = found[int(least_first("divergences of rounds", judged)[0])][1]
        return state._replace(subject=language_model(self.name, state.subject).folded(best)).report(scaled=judged)
