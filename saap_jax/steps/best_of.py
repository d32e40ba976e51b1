"""The choice between whole chains on the model itself: what is best differs from model to model, so it is measured."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.runtime.decisions import least_first
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.steps.repair.output import OutputRepair, next_repair
from saap_jax.subjects.base import Examples, Subject, joined, language_model, rows_of
from saap_jax.types import HELD_OUT

EVERY = 5
"""Of the windows one in so many is held out: another number than repairs go by, which hold some out of the rest.
Of fewer it is the last one. Where no text would be left of what steps hold out themselves, it is the one before."""


@step("best_of")
@dataclasses.dataclass(frozen=True)
class BestOf(Step):
    """Run several chains and keep the one that comes closest to the unpruned model on held-out calibration text.

    Each chain runs on the text without every fifth window (of fewer, without the last), and is judged on these by the
    mean of KL(p_unpruned ‖ p_pruned) over their tokens. The winner runs once more, on all of the text; where a repair
    in closed form stands behind this step, without the repairs at its own end. So k chains take as long as k + 1 of
    them at most. Scores come from the one pass over all of the text, which serves all chains.
    """

    kind = "allocation"
    after = ()

    chains: tuple[Any, ...] = ()
    """Chains, with commas between them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({each.written for each in self.chains}) < max(2, len(self.chains)):
            names = ", ".join(each.name for each in self.chains) or "none"
            raise ValueError(f"best_of: expected two chains or more, each once, got {names}")

    @property
    def written(self) -> str:
        """The step as a chain writes it."""
        return f"best_of({', '.join(each.written for each in self.chains)})"

    @property
    def inner(self) -> tuple[Any, ...]:
        """The chains."""
        return self.chains

    def depends_on(self, following: Sequence[Step]) -> OutputRepair | None:
        """Find the repair in closed form after this step."""
        return next_repair(following)

    def check(self, subject: Subject, text: TextSize) -> None:
        """Raise ValueError for a model whose predictions are not compared, or where a chain cannot work."""
        language_model(self.name, subject)
        for chain in self.chains:
            chain.check(subject, text)

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """Each chain once, and one of them again."""
        each = [chain.passes(text, ratio, prefix.subject) for chain in self.chains]
        return Cost(sum(each) + max(each))

    def __call__(self, state: State, on: Context) -> State:
        """Take the outcome of the chain that has the lowest divergence."""
        run = on.chain(self).run
        fit, judge, tokens = _held_out(on)
        chains = self.chains
        judged = on.store.load().get("judged", np.zeros(0)).tolist()
        for chain in on.progress("choose between chains")(chains[len(judged) :]):
            tried = run(chain, fit, len(chain.steps))
            found = language_model(self.name, on.dense).divergences(
                judge, tried.keep, tried.subject, batch_size=on.batch_size
            )
            judged.append(float(np.average(found, weights=tokens)))
            on.store.save({"judged": np.array(judged)})
        best = chains[int(least_first("divergences of chains", judged)[0])]
        if self.depends_on(on.following):
            end = best.choosing
        else:
            end = len(best.steps)
        return run(best, on.scenarios, end).report(judged=judged, chosen=best.name)


def _held_out(on: Context) -> tuple[dict[str, Examples], Examples, np.ndarray]:
    """Split the text: all windows with those blanked that are held out; these, and the tokens of each.

    Raises:
        ValueError: too few windows.
    """
    fit = {}
    judge = []
    counts = []
    for name, examples in on.scenarios.items():
        windows = [rows_of(examples, slice(at, at + 1)) for at in range(on.dense.size(examples).rows)]
        tokens = np.array([on.dense.size(each).tokens for each in windows])
        left = np.cumsum(tokens > 0)  # a choice around this one may have blanked some
        every = max(2, min(EVERY, left[-1]))
        real = (tokens > 0) & (left[-1] > 1)
        ways = [real & (left % every == rest) for rest in ([every - 1, 0] if on.batch_size == 1 else [0, every - 1])]
        judging = real & (np.arange(len(real)) // on.batch_size % HELD_OUT == HELD_OUT - 1)  # by steps in the chains
        held = next((way for way in ways if (judging & ~way).any()), ways[0])
        fit[name] = language_model("best_of", on.dense).blanked(examples, held)
        judge.append(rows_of(examples, held))
        counts.append(tokens[held])
    if not any(map(len, counts)):
        raise ValueError("best_of: expected two windows of calibration text or more, to hold one out, got one")
    return fit, joined(judge), np.concatenate(counts)
