"""Whole attentions beside what the chain in front removes, one by one by the loss without them."""

import dataclasses
from typing import Annotated

import numpy as np

from saap_jax.config.checks import Natural, check_positive
from saap_jax.runtime.decisions import least_first
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocation import meets
from saap_jax.steps.base import Before, Context, Extent, State, Step, step
from saap_jax.steps.limits import protected
from saap_jax.steps.score.oracles import mean_losses
from saap_jax.subjects.base import Subject
from saap_jax.types import Keep


@step("attentions")
@dataclasses.dataclass(frozen=True)
class Attentions(Step):
    """Run the chain before it on a part of the budget; the rest are whole attentions, the least needed first.

    With B layers, a share s of the parameters that is to go, and m and a the parameters of all MLPs and attentions,
    round(B s^(m / (α a))) attentions go: the attention without which the mean loss is lowest, then again. Each of them
    costs a forward pass over the text a layer. Source: 2SSP (arXiv:2501.17771), stage 2 and equation 5.
    """

    kind = "allocation"
    drives = True

    balance: Annotated[float, check_positive] = 1.5
    """α; the larger, the more attentions go."""
    examples: Natural = 0
    """On how many of the first windows of the text attentions are judged; 0: on all."""

    def check(self, subject: Subject, text: Extent) -> None:
        """Raise ValueError for a model that does not tell attention and MLP apart."""
        subject.check_objective(self.name)

    def asks(self, subject: Subject, ratio: float) -> float:
        """Leave out what the attentions come to."""
        return self._shared(subject, subject.existing, ratio)[1]

    def _shared(self, subject: Subject, keep: Keep, ratio: float) -> tuple[int, float]:
        """Say how many attentions go beside those that are gone, and which ratio they leave to the chain before."""
        there, left = subject.existing["attention"].any(axis=1), keep["attention"].any(axis=1)
        sizes = {name: units.sum(axis=1) * subject.costs[name] for name, units in subject.existing.items()}
        exponent = sizes["mlp"].sum() / max(self.balance * sizes["attention"].sum(), 1)
        count = max(round(int(there.sum()) * ratio**exponent) - int((there & ~left).sum()), 0)
        attentions = np.sort(sizes["attention"][left])[:count].sum() / subject.prunable
        return count, max(ratio - float(attentions), 0.0)

    def __call__(self, state: State, on: Context, before: Before) -> State:
        """Run the chain to what attentions leave of the ratio, then remove them."""
        left = state.keep["attention"].any(axis=1)
        count, rest = self._shared(state.subject, state.keep, on.ratio)
        state = before(state, rest)
        subject = state.subject  # perhaps repaired
        free = np.asarray(left & ~protected(state.limits.protect, len(state.keep["attention"])))
        if count > free.sum():
            raise ValueError(
                f"attentions: expected at least {count} that may go, got {free.sum()}; protect fewer layers"
            )
        text = subject.rows(dataclasses.replace(on, instead=state.text).text, slice(self.examples or None))
        gone = on.store.load().get("gone", np.zeros(0, np.int64)).tolist()
        for _ in on.progress("remove attentions")(range(count - len(gone))):
            tried = [layer for layer in np.flatnonzero(free).tolist() if layer not in gone]
            keeps = [without(state.keep, [*gone, layer]) for layer in tried]
            losses = mean_losses(subject, text, keeps, Passes(on.batch_size), "")
            gone.append(tried[int(least_first("losses without an attention", losses)[0])])
            on.store.save({"gone": np.array(gone)})
        if not meets(subject, keep := without(state.keep, gone), on.ratio):
            raise ValueError(
                "attentions: expected a chain before it that leaves attention alone, got one that removes some of what "
                "goes whole; put within(max_ratio={attention: 0}) before its allocation"
            )
        return state._replace(keep=keep)


def without(keep: Keep, layers: list[int]) -> Keep:
    """Mask the attentions of some layers."""
    stays = ~np.isin(np.arange(len(keep["attention"])), layers)
    return {**keep, "attention": keep["attention"] & stays[:, None]}
