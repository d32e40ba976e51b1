"""Whole attentions beside what the chain in front removes, one by one by the loss without them."""

import dataclasses
from typing import Annotated

import numpy as np

from saap_jax.checks import Natural, check_positive
from saap_jax.runtime.decisions import least_first
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocation import meets
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.steps.limits import protected
from saap_jax.steps.score.oracles import mean_losses
from saap_jax.subjects.base import LanguageModel, rows_of
from saap_jax.types import Keep


@step("attentions")
@dataclasses.dataclass(frozen=True)
class Attentions(Step):
    """Run the chain before it on a part of the budget; the rest are whole attentions, the least needed first.

    With B layers, a share s of the parameters that is to go, and m and a the parameters of all MLPs and attentions,
    round(B s^(m / (α a))) attentions go: the attention without which the mean loss is lowest, then again. Each of them
    costs a forward pass over the text a layer. Where the chain before it cannot remove the rest, more attentions go;
    layers that are left alone keep theirs. Source: 2SSP (arXiv:2501.17771), stage 2 and equation 5.
    """

    kind = "allocation"
    runs_prefix = True
    of = LanguageModel

    balance: Annotated[float, check_positive] = 1.5
    """α; the larger, the more attentions go."""
    examples: Natural = 0
    """On how many of the first windows of the text attentions are judged; 0: on all."""

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """One pass over the windows that judge for each attention that is left whenever one goes."""
        existing = prefix.subject.existing
        count, rest = self._shared(prefix, existing, ratio)
        free = int(_free(prefix, existing).sum())
        tried = sum(free - gone for gone in range(count))
        windows = min(self.examples or text.windows, text.windows)
        return Cost(tried * windows / text.windows, prefix_ratio=rest)

    def _shared(self, prefix: Prefix, keep: Keep, ratio: float) -> tuple[int, float]:
        """Say how many attentions go beside those that are gone, and which ratio all leave to the chain before.

        As many as the formula says; more where the chain before cannot remove the rest.
        """
        existing = prefix.subject.existing
        costs = prefix.subject.costs
        sizes = {name: units.sum(axis=1) * costs[name] for name, units in existing.items()}
        there = existing["attention"].any(axis=1)
        gone = there & ~keep["attention"].any(axis=1)
        exponent = sizes["mlp"].sum() / max(self.balance * sizes["attention"].sum(), 1)
        wanted = round(int(there.sum()) * ratio**exponent) - int(gone.sum())
        # What so many attentions come to at least, with those that are gone: which ones go is not known yet.
        smallest = np.sort(sizes["attention"][_free(prefix, keep)])
        removed = sizes["attention"][gone].sum() + np.concatenate([[0], np.cumsum(smallest)])
        rests = np.maximum(ratio - removed / prefix.subject.prunable, 0.0)
        count = min(max(wanted, 0), len(smallest))
        while count < len(smallest) and rests[count] > prefix.largest_ratio:
            count += 1
        return count, float(rests[count])

    def __call__(self, state: State, on: Context) -> State:
        """Run the chain to what attentions leave of the ratio, then remove them."""
        runs = on.chain(self)
        count, rest = self._shared(runs.prefix, state.keep, on.ratio)
        free = _free(runs.prefix, state.keep)
        state = runs.run_prefix(state, rest)
        subject = state.subject  # perhaps repaired
        text = rows_of(dataclasses.replace(on, own_text=state.text).text, slice(self.examples or None))
        gone = on.store.load().get("gone", np.zeros(0, np.int64)).tolist()
        for _ in on.progress("remove attentions")(range(count - len(gone))):
            tried = [layer for layer in np.flatnonzero(free).tolist() if layer not in gone]
            keeps = [without(state.keep, [*gone, layer]) for layer in tried]
            losses = mean_losses(subject, text, keeps, Passes(on.batch_size), "")
            gone.append(tried[int(least_first("losses without an attention", losses)[0])])
            on.store.save({"gone": np.array(gone)})
        keep = without(state.keep, gone)
        if not meets(subject, keep, on.ratio):
            raise ValueError(
                "attentions: expected a chain before it that leaves attention alone, got one that removes some of what "
                "goes whole; put within(max_ratio={attention: 0}) before its allocation"
            )
        return state._replace(keep=keep)


def _free(prefix: Prefix, keep: Keep) -> np.ndarray:
    """List the layers whose attention is there and may go."""
    return keep["attention"].any(axis=1) & ~protected(prefix.within.protect, len(keep["attention"]))


def without(keep: Keep, layers: list[int]) -> Keep:
    """Mask the attentions of some layers."""
    stays = ~np.isin(np.arange(len(keep["attention"])), layers)
    return {**keep, "attention": keep["attention"] & stays[:, None]}
