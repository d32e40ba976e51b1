"""Choose units from the first layer to the last, each on the activations of the model as pruned so far."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from saap_jax.steps.base import Context, Cost, Precomputed, Prefix, State, Step, TextSize, step
from saap_jax.steps.repair.output import OutputRepair, next_repair
from saap_jax.subjects.base import LanguageModel, language_model
from saap_jax.surgery.corrections import Tokens, Walk

Rule = Literal["wanda", "obs", "obs_swaps", "leverage"]


@step("layerwise")
@dataclasses.dataclass(frozen=True)
class Layerwise(Step):
    """Choose again which units of each layer and structure go, behind the layers that are pruned and repaired already.

    How many go is as chosen before. Scores from one pass over the unpruned model do not see what the layers before have
    lost. Layers are repaired on the way as the first repair behind this step says, if there is one; if it follows at
    once, it has nothing left to do. About three passes over the calibration text. The rules' formulas are in
    `surgery.sequence`.
    """

    kind = "refinement"
    needs_objective = True
    of = LanguageModel

    rule: Rule = "leverage"
    """Wanda's score, the optimal brain surgeon's (with swaps behind it or without), or ridge leverage."""

    tokens: Tokens | None = None
    """How much each token counts, as in `least_squares`; None: as the repair behind this step says, else `scaled`."""

    def depends_on(self, following: Sequence[Step]) -> OutputRepair | None:
        """Find the first repair after this step.

        Raises:
            ValueError: it does not look at the model as pruned so far.
        """
        repair = next_repair(following)
        if repair is not None and repair.propagate != "pruned":
            raise ValueError(
                f"layerwise: expected a repair with propagate=pruned behind it, which looks at the model as pruned so "
                f"far, got {repair.propagate}"
            )
        return repair

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """As many passes as a repair, which the one after it saves."""
        return Cost(3)

    def __call__(self, state: State, on: Context) -> State:
        """Choose as many units of each layer and structure."""
        repair = self.depends_on(on.following)
        tokens = self.tokens or (repair.tokens if repair else "scaled")
        keep, made = language_model(self.name, state.subject).layerwise(
            state.keep,
            on.text,
            self.rule,
            Walk(repair, equal=tokens == "equal"),
            dense=on.dense,
            batch_size=on.batch_size,
            progress=on.progress("choose layer by layer"),
        )
        precomputed = None
        if made is not None and repair is not None and tokens == repair.tokens:
            precomputed = Precomputed(repair, state.subject, keep, made[0], made[1])
        return state._replace(keep=keep, precomputed=precomputed)
