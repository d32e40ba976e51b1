"""Shares of layers by evolution: brute force, budget and limits, stages by counting, what held-out text says."""

import dataclasses
import itertools

import numpy as np
import pytest
from saap_jax.config.search import EvolveConfig, PerStructure, SearchConfig, SharePerStructure
from saap_jax.selection.calibrate import calibrate
from saap_jax.selection.choose import choose, chosen_again, priority_of, selection_of
from saap_jax.selection.evolved import evolved

from saap_jax.config.method import TargetsConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.data import Windows
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.divergence import Divergence
from tests.divergence import batches_of, plain_divergence
from tests.helpers import random_model, spec_of

SEARCH = SearchConfig(allocation="uniform", evolve=EvolveConfig(generations=25, offspring=8, quantum=0.2))
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


def run(subject, objective, ratio: float = 0.4, config: SearchConfig = SEARCH, seed: int = 0):
    random = np.random.default_rng(seed)
    scores = {name: random.random(units.shape) for name, units in subject.existing.items()}
    start = choose(subject, scores, ratio, config)
    made = lambda keep: selection_of(subject, keep, ratio)  # noqa: E731
    return start, evolved(start, scores, objective, subject.costs, subject.existing, config, made), scores


def test_it_finds_what_brute_force_finds(small):
    """Of all ways to keep 12 of 20 channels, 1 to 5 a layer; and in each layer those of the highest scores."""
    config, found = dataclasses.replace(SEARCH, min_keep=PerStructure(attention=0, mlp=0)), 0
    for seed in range(8):
        objective = Counted(seed)
        start, done, scores = run(small, objective, config=config, seed=seed)
        best = np.inf
        for kept in itertools.product(range(UNITS + 1), repeat=LAYERS):
            if sum(kept) == 12:
                units = np.arange(UNITS) < np.array(kept)[:, None]
                best = min(best, objective.judge({"mlp": units}))
        assert done.divergences == (objective.judge(start.keep), objective.judge(done.keep))
        assert done.removed == start.removed
        for layer, kept in enumerate(done.keep["mlp"]):
            highest = np.sort(np.argsort(-scores["mlp"][layer])[: kept.sum()])
            np.testing.assert_array_equal(np.flatnonzero(kept), highest)
        found += objective.judge(done.keep) == pytest.approx(best)
    assert found >= 7, "it may stay where two switches at once would be needed"


def test_stages_ask_as_often_as_they_say(small):
    """8 children on 1 microbatch, the 3 best and their parent on 2; a level-switch moves one unit; the best stays."""
    evolve = EvolveConfig(generations=4, offspring=8, survivors=(3, 1), microbatches=(1, 2), quantum=0.2)
    objective = Counted(noise=0.01)
    start, done, _ = run(small, objective, config=dataclasses.replace(SEARCH, evolve=evolve))
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

    start, done, _ = run(small, Worse())
    assert done.keep is start.keep
    assert done.divergences == (1.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "limits"),
    [
        (0.3, {}),
        (0.2, {"skip_layers": (0,), "multiple_of": PerStructure(attention=1, mlp=2)}),
        (0.3, {"attention_share": 0.5, "allocation": "global"}),
        (0.2, {"max_ratio": SharePerStructure(attention=0.5, mlp=0.5)}),
        (0.3, {"depth": True, "allocation": "global", "min_keep": PerStructure(attention=0, mlp=0)}),
    ],
)
def test_budget_and_limits_are_those_of_the_search(ratio, limits):
    subject = LlamaSubject(random_model(spec_of(*[(2, 8)] * 5)))
    config = dataclasses.replace(SEARCH, evolve=dataclasses.replace(SEARCH.evolve, generations=12), **limits)
    text = Windows(*(np.concatenate(parts * 4) for parts in zip(*batches_of(1), strict=True)))  # four times the same
    scores = calibrate(subject, {"text": text}, ["random"], batch_size=2)
    start = choose(subject, scores.scores("random"), ratio, config)
    priority = priority_of(subject, scores, "random", config)
    done = chosen_again(subject, start, {"text": text}, config, None, priority, batch_size=2)
    assert done.removed == subject.removed(done.keep) == start.removed
    assert done.divergences[1] <= done.divergences[0]
    assert limits == {} or done.divergences[1] < done.divergences[0], "no switch helps the first of these"
    for name in done.keep:
        before, after = (each.keep[name].sum(axis=1) for each in (start, done))
        assert before.sum() == after.sum(), "quanta move between layers of a structure"
        if limits.get("depth"):
            assert set(after.tolist()) <= {0, subject.existing[name].shape[1]}
        if limits.get("skip_layers"):
            assert after[0] == subject.existing[name].shape[1]
        if "max_ratio" in limits:
            assert after.min() >= subject.existing[name].shape[1] / 2
    if "multiple_of" in limits:
        assert not (done.keep["mlp"].sum(axis=1) % 2).any()


@pytest.mark.slow
def test_a_part_is_judged_by_the_divergence():
    subject, batches = LlamaSubject(random_model(spec_of((2, 6), (2, 6)))), batches_of()
    random = np.random.default_rng(0)
    keep = {name: random.random(units.shape) < 0.6 for name, units in subject.existing.items()}
    objective, gates = Divergence(subject.model, batches), {n: k.astype(np.float32) for n, k in keep.items()}
    plain = [plain_divergence(subject.model, subject.model, gates, [batch]) for batch in batches[:3]]
    np.testing.assert_allclose([objective.value(keep, part) for part in range(3)], plain, rtol=1e-4)
    assert len(set(plain)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvolveConfig(survivors=(4, 2)), "search.evolve.survivors: expected ever fewer of 16 .* got 4 2"),
        (lambda: EvolveConfig(survivors=(20, 1)), "search.evolve.survivors: expected ever fewer of 16 .* got 20 1"),
        (lambda: EvolveConfig(survivors=()), "search.evolve.survivors: expected ever fewer of 16 .* got none"),
        (lambda: EvolveConfig(microbatches=(1,)), "search.evolve.microbatches: .* which are 2, got 1"),
        (lambda: EvolveConfig(microbatches=(0, 2)), "search.evolve.microbatches: .* got 0 2"),
        (lambda: EvolveConfig(generations=-1), "search.evolve.generations: expected at least 0, got -1"),
        (lambda: EvolveConfig(offspring=0), "search.evolve.offspring: expected at least 1, got 0"),
        (lambda: EvolveConfig(quantum=2.0), r"search.evolve.quantum: expected a number in \[0, 1\], got 2.0"),
        (lambda: dataclasses.replace(SEARCH, rescore_every=0.1), "search.evolve.generations: expected no search.resc"),
        (
            lambda: dataclasses.replace(
                SEARCH, depth=True, whole_layers=True, allocation="global", min_keep=PerStructure(attention=0, mlp=0)
            ),
            "search.evolve.generations: expected no search.whole_layers beside it",
        ),
        (
            lambda: dataclasses.replace(SEARCH, max_segments=3),
            "search.evolve.generations: expected no search.max_segments beside it, since layers move apart, got 3",
        ),
        (lambda: dataclasses.replace(SEARCH, max_shapes=2), "search.evolve.generations: expected no search.max_shapes"),
        (
            lambda: PruneConfig(search=SEARCH, targets=TargetsConfig(latency="70%")),
            "search.evolve.generations: expected no targets beside it, got latency",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_too_few_microbatches_are_refused(small):
    with pytest.raises(ValueError, match="search.evolve.generations: expected at least 4 microbatches .* got 3"):
        SEARCH.check_microbatches(3)
