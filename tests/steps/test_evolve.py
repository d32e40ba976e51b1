"""Shares of layers by evolution: brute force, budget and limits, stages by counting, what held-out text says."""

import itertools

import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.limits import Within
from saap_jax.steps.refinement.evolve import Evolve
from saap_jax.subjects.llama import LlamaSubject
from tests.divergence import batches_of
from tests.helpers import random_model, spec_of
from tests.steps.refined import refined, start_of

EVOLVE = Evolve(generations=25, offspring=8, quantum=0.2)
LAYERS, UNITS = 4, 5


@pytest.fixture(scope="module")
def small():
    return LlamaSubject(random_model(spec_of(*[(0, UNITS)] * LAYERS)))


class Counted:
    """Some function of how many channels each layer keeps, the same on every part; asks are kept."""

    parts = 3

    def __init__(self, seed: int = 0, noise: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        self.table, self.noise = random.random((LAYERS, UNITS + 1)), noise
        self.table.sort(axis=1)
        self.table = self.table.cumsum(axis=1)[:, ::-1]  # the more a layer keeps, the less one more brings
        self.cross = random.random((LAYERS, LAYERS)) / 20
        self.asked = []

    def judge(self, keep) -> float:
        kept = keep["mlp"].sum(axis=1)
        return float(self.table[np.arange(LAYERS), kept].sum() + kept @ self.cross @ kept / 10)

    def value(self, keep, part: int) -> float:
        self.asked.append((part, keep["mlp"].sum(axis=1).tolist()))
        return self.judge(keep) + self.noise * part

    def gradient(self, keep, part: int):
        raise AssertionError("evolution asks for no derivatives")


def run(subject, objective, step=EVOLVE, within=Within(), seed: int = 0):  # noqa: B008
    start = start_of(subject, 0.4, Uniform(), within, seed)
    return start, refined(subject, start, step, objective, 0.4)


def test_it_finds_what_brute_force_finds(small):
    """Of all ways to keep 12 of 20 channels, 1 to 5 a layer; and in each layer those of the highest scores."""
    found = 0
    for seed in range(8):
        objective = Counted(seed)
        start, done = run(small, objective, within=Within(min_keep=0), seed=seed)
        best = np.inf
        for kept in itertools.product(range(UNITS + 1), repeat=LAYERS):
            if sum(kept) == 12:
                units = np.arange(UNITS) < np.array(kept)[:, None]
                best = min(best, objective.judge({"mlp": units}))
        assert done.metrics["divergences"] == [objective.judge(start.keep), objective.judge(done.keep)]
        assert small.removed(done.keep) == small.removed(start.keep)
        for layer, kept in enumerate(done.keep["mlp"]):
            highest = np.sort(np.argsort(-start.scores["mlp"][layer])[: kept.sum()])
            np.testing.assert_array_equal(np.flatnonzero(kept), highest)
        found += objective.judge(done.keep) == pytest.approx(best)
    assert found >= 7, "it may stay where two switches at once would be needed"


def test_stages_ask_as_often_as_they_say(small):
    """8 children on 1 microbatch, the 3 best and their parent on 2; a level-switch moves one unit; the best stays."""
    evolve = Evolve(generations=4, offspring=8, survivors=(3, 1), microbatches=(1, 2), quantum=0.2)
    objective = Counted(noise=0.01)
    start, done = run(small, objective, evolve)
    each = 8 + 4 * 2
    assert len(objective.asked) == 4 * each
    parent = start.keep["mlp"].sum(axis=1).tolist()
    for generation in range(4):
        asked = objective.asked[generation * each : (generation + 1) * each]
        many, few = asked[:8], asked[8:]
        assert len({part for part, _ in many}) == 1
        assert [kept for _, kept in few[:2]] == [parent, parent]
        assert all(1 <= np.abs(np.array(kept) - parent).sum() // 2 <= 3 for _, kept in many if kept != parent)
        assert {sum(kept) for _, kept in asked} == {12}
        plain = {str(kept): value_of(objective, kept) for _, kept in many}
        stay = sorted((value_of(objective, kept) for _, kept in many))[:3]
        assert sorted(plain[str(kept)] for _, kept in few[2::2]) == pytest.approx(stay)
        parent = min([kept for _, kept in few[::2]], key=lambda kept: value_of(objective, kept))
    assert done.keep["mlp"].sum(axis=1).tolist() == parent


def value_of(objective: Counted, kept: list[int]) -> float:
    return objective.judge({"mlp": np.arange(UNITS) < np.array(kept)[:, None]})


def test_it_begins_and_ends_with_the_start_where_nothing_is_better(small):
    class Worse(Counted):
        calls = 0

        def judge(self, keep):
            self.calls += 1
            return float(self.calls)

        def value(self, keep, part):
            return super().judge(keep)

    start, done = run(small, Worse())
    assert done.keep is start.keep
    assert done.metrics["divergences"] == [1.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "limits", "allocation"),
    [
        (0.3, "", "uniform"),
        (0.2, "protect=(0,), multiple_of={mlp: 2}", "uniform"),
        (0.3, "attention=0.5", "global"),
        (0.2, "max_ratio=0.5", "uniform"),
        (0.3, "depth=True, min_keep=0", "global"),
    ],
)
def test_budget_and_limits_are_those_of_the_allocation(ratio, limits, allocation):
    subject = LlamaSubject(random_model(spec_of(*[(2, 8)] * 5)))
    text = Windows(*(np.concatenate(parts * 4) for parts in zip(*batches_of(1), strict=True)))  # four times the same
    chosen = f"random > within({limits}) > {allocation}"
    start = saap_jax.run_chain(subject, chosen, text, ratio, batch_size=2)
    done = saap_jax.run_chain(subject, f"{chosen} > evolve(12, offspring=8, quantum=0.2)", text, ratio, batch_size=2)
    assert subject.removed(done.keep) == subject.removed(start.keep)
    before, after = done.metrics["divergences"]
    assert after < before or (not limits and after == before), "no switch helps the first of these"
    for name in done.keep:
        first, last = (each.keep[name].sum(axis=1) for each in (start, done))
        assert first.sum() == last.sum(), "quanta move between layers of a structure"
        units = subject.existing[name].shape[1]
        if "depth" in limits:
            assert set(last.tolist()) <= {0, units}
        if "protect" in limits:
            assert last[0] == units
            assert not (done.keep["mlp"].sum(axis=1) % 2).any()
        if "max_ratio" in limits:
            assert last.min() >= units / 2


def test_what_stays_is_no_worse_than_what_was_chosen_whatever_the_scores(small):
    """The start keeps other units than the scores would, and is better than any that they order."""

    class Ordered(Counted):
        def judge(self, keep) -> float:
            return super().judge(keep) - 100 * keep["mlp"][:, 0].all()

    objective, within = Ordered(), Within(min_keep=0)
    start = start_of(small, 0.4, Uniform(), within)
    start.scores["mlp"][:, 0] = -1.0
    done = refined(small, start._replace(keep=learnt_of(start.keep)), EVOLVE, objective, 0.4)
    assert done.metrics["divergences"][0] == objective.judge(learnt_of(start.keep)) < done.metrics["divergences"][1]
    assert done.keep["mlp"][:, 0].all()


def learnt_of(keep):
    """Keep the first units of each layer, as many as before."""
    return {name: np.arange(units.shape[1]) < units.sum(axis=1, keepdims=True) for name, units in keep.items()}


def test_layers_that_lost_what_the_limits_do_not_say_stay_as_they_are(small):
    start = start_of(small, 0.4, Uniform(), Within())
    keep = {name: units.copy() for name, units in start.keep.items()}
    keep["mlp"][1] = False  # one unit stays by the limits, as behind `attentions` and `shape` none does
    done = refined(small, start._replace(keep=keep), EVOLVE, Counted(), 0.4)
    assert small.removed(done.keep) == small.removed(keep)
    assert not done.keep["mlp"][1].any()
    assert done.keep["mlp"].sum(axis=1).tolist() != keep["mlp"].sum(axis=1).tolist(), "control"


def test_limits_that_layers_share_are_refused(small):
    text = Windows(*(np.concatenate(parts) for parts in zip(*batches_of(), strict=True)))
    chain = "random > within(depth=True, whole_layers=True, min_keep=0) > global > evolve(1)"
    with pytest.raises(ValueError, match="no whole_layers, since"):
        saap_jax.run_chain(small, chain, text, 0.3, batch_size=2)
