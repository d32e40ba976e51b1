"""Learned units: derivatives by differences, budget and limits of the search, brute force, what held-out text says."""

import functools
import itertools

import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.steps.allocation.allocation import choose
from saap_jax.steps.allocation.allocations import Global
from saap_jax.steps.base import State
from saap_jax.steps.limits import Within
from saap_jax.steps.refinement.learn import Learn, hard, retention
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.divergence import Divergence
from tests.divergence import batches_of, plain_divergence
from tests.helpers import dense_model, random_model, spec_of
from tests.steps.refined import refined, start_of


def floats(keep):
    return {name: units.astype(np.float64) for name, units in keep.items()}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [0.0, 0.7])
def test_the_derivative_is_that_of_the_divergence_of_closed_gates_too(x64, loss):
    model = dense_model(dtype=np.float64)
    subject, batches = LlamaSubject(model), batches_of()
    keep = start_of(subject, 0.4, Global()).keep
    objective = Divergence(model, batches, loss)
    plain = functools.partial(plain_divergence, model, model, language_loss=loss)
    assert objective.parts == len(batches) - 1
    value, gradient = objective.gradient(hard(keep), 1)
    assert value == pytest.approx(plain(floats(keep), batches[1:2]), rel=1e-5)
    assert (value == pytest.approx(plain_divergence(model, model, floats(keep), batches[1:2]), rel=1e-2)) == (not loss)
    seen = set()
    for name, units in keep.items():
        for place in [*np.argwhere(units)[:2], *np.argwhere(~units)[:2]]:
            ends = []
            for step in (1e-4, -1e-4):
                moved = floats(keep)
                moved[name][tuple(place)] += step
                ends.append(plain(moved, batches[1:2]))
            np.testing.assert_allclose(gradient[name][tuple(place)], (ends[0] - ends[1]) / 2e-4, rtol=2e-3, atol=1e-7)
            seen.add((name, bool(units[tuple(place)])))
    assert len(seen) == 4
    held = plain_divergence(model, model, floats(keep), batches[3:])
    assert objective.judge(keep) == pytest.approx(held, rel=1e-5), "by the divergence alone"
    parts = [plain_divergence(model, model, floats(keep), batches[at : at + 1]) for at in range(3)]
    assert [objective.value(keep, at) for at in range(3)] == pytest.approx(parts, rel=1e-5)
    assert len({held, *parts}) == 4, "control"


class Quadratic:
    """(g − t)ᵀ A (g − t) / 2 of the gates of both structures in a row: any optimum is known by brute force."""

    parts = 3

    def __init__(self, subject, seed: int) -> None:
        self.shapes = {name: units.shape for name, units in subject.existing.items()}
        size = sum(np.prod(shape) for shape in self.shapes.values())
        factor = np.random.default_rng(seed).normal(size=(size, size))
        self.matrix = factor @ factor.T / size + 2 * np.diag(np.random.default_rng(seed + 1).random(size) ** 3)
        self.asked = []

    def judge(self, keep) -> float:
        away = np.concatenate([keep[name].ravel() for name in self.shapes]) - 1.0
        return float(away @ self.matrix @ away / 2)

    def value(self, keep, part) -> float:
        raise AssertionError("learning asks for derivatives")

    def gradient(self, gates, part):
        self.asked.append((part, gates))
        away = np.concatenate([gates[name].ravel() for name in self.shapes]) - 1.0
        flat, found, start = self.matrix @ away, {}, 0
        for name, shape in self.shapes.items():
            found[name], start = flat[start : start + np.prod(shape)].reshape(shape), start + np.prod(shape)
        return 0.0, found


@pytest.fixture(scope="module")
def small():
    return LlamaSubject(random_model(spec_of((0, 5), (0, 5))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "worst", "mean"), [("momentum", 0.1, 0.05), ("sigmoid", 0.2, 0.1), ("soft", 0.1, 0.05)]
)
def test_it_nears_what_brute_force_finds(small, rule, worst, mean):
    """Among all 210 ways to keep 6 of 10 channels, from the worst: always better than most, and on average than all
    but a few."""
    ranks = []
    for seed in range(6):
        objective = Quadratic(small, seed)
        ways = []
        for kept in itertools.combinations(range(10), 6):
            units = np.isin(np.arange(10), kept).reshape(2, 5)
            ways.append({"attention": small.existing["attention"], "mlp": units})
        costs = np.array([objective.judge(way) for way in ways])
        start = State(small, ways[int(costs.argmax())], Within(min_keep=0))
        done = refined(small, start, Learn(steps=60, rate=0.2, rule=rule), objective, 0.4)
        assert done.keep["mlp"].sum() == 6
        assert done.metrics["divergences"][0] == pytest.approx(costs.max())
        assert objective.judge(done.keep) == min(done.metrics["divergences"])
        ranks.append((costs < objective.judge(done.keep) - 1e-9).mean())
    assert max(ranks) < worst
    assert np.mean(ranks) < mean


def test_steps_are_those_that_are_written_out(small):
    """Values, momentum, scale and rate by plain numpy, each part once a round; the solver sees the values."""
    objective, start = Quadratic(small, 3), start_of(small, 0.4, Global(), seed=1)
    done = refined(small, start, Learn(steps=5, rate=0.1), objective, 0.4)
    parts, keeps = zip(*objective.asked, strict=True)
    assert sorted(parts[:3]) == [0, 1, 2]
    assert len(parts) == 5
    value = np.where(start.keep["mlp"], 0.75, 0.25)
    momentum, square, keep = np.zeros(value.shape), 0.0, start.keep
    judged = [objective.judge(keep)]
    nothing = np.zeros(small.existing["attention"].shape)
    for step in range(1, 6):
        np.testing.assert_array_equal(keep["mlp"], keeps[step - 1]["mlp"])
        derivative = Quadratic(small, 3).gradient(keep, 0)[1]["mlp"] / small.costs["mlp"][:, None]
        momentum = 0.9 * momentum + 0.1 * derivative
        square = 0.9 * square + 0.1 * (derivative**2).mean()
        rate = 0.1 * (1 + np.cos(np.pi * (step - 1) / 5)) / 2
        value = value - rate * momentum / np.sqrt(square / (1 - 0.9**step))
        keep = choose(small, {"attention": nothing, "mlp": value}, 0.4, Global(by="score"), Within()).keep
        judged += [objective.judge(keep)] * (step in (3, 5))
    np.testing.assert_allclose(done.metrics["divergences"], judged)


def worths_by_hand(start, costs, derivatives, rate, *, sign=-1.0, corrected=True, divided=True, apart=False):
    """The rule `momentum` once more, units of both structures in a row; yields what they are worth after each step.

    Args:
        derivatives: of each step, by gates.
        sign, corrected, divided, apart: others make a wrong rule: up the slope, a square that is not corrected for its
            beginning at 0, whatever a unit costs, or a scale for each structure.
    """
    names = list(start)
    structure = np.concatenate([np.full(start[name].size, at) for at, name in enumerate(names)])
    cost = np.concatenate([np.broadcast_to(costs[name][:, None], start[name].shape).ravel() for name in names])
    worth = np.concatenate([np.where(start[name], 0.75, 0.25).ravel() for name in names])
    momentum, square = np.zeros(len(worth)), np.zeros(len(worth))
    for step, derivative in enumerate(derivatives):
        d = np.concatenate([derivative[name].ravel() for name in names]) / (cost if divided else 1.0)
        groups = [structure == at for at in range(len(names))] if apart else [np.ones(len(d), bool)]
        for group in groups:
            square[group] = 0.9 * square[group] + 0.1 * np.square(d[group]).sum() / group.sum()
        momentum = 0.9 * momentum + 0.1 * d
        scale = np.sqrt(square / (1 - 0.9 ** (step + 1)) if corrected else square)
        worth = worth + sign * rate * 0.5 * (1 + np.cos(np.pi * step / len(derivatives))) * momentum / scale
        ends = np.cumsum([start[name].size for name in names])[:-1]
        yield {name: part.reshape(start[name].shape) for name, part in zip(names, np.split(worth, ends), strict=True)}


def test_learn_momentum_matches_numpy(monkeypatch):
    """With the step's own 72 steps and rate: all that the solver is ever given, of heads and channels."""
    subject = LlamaSubject(random_model(spec_of((2, 6), (2, 6))))
    assert subject.costs["attention"][0] != subject.costs["mlp"][0], "control: what a unit costs matters"
    objective, start = Quadratic(subject, 3), start_of(subject, 0.4, Global(), Within(min_keep=0), seed=1)
    seen = []

    def choosing(of, values, *more):
        seen.append(values)
        return choose(of, values, *more)

    monkeypatch.setattr("saap_jax.steps.refinement.learn.choose", choosing)
    refined(subject, start, Learn(), objective, 0.4)
    assert len(seen) == 72
    derivatives = [Quadratic(subject, 3).gradient(gates, 0)[1] for _, gates in objective.asked]
    away = {}
    for wrong in ({}, {"sign": 1.0}, {"corrected": False}, {"divided": False}, {"apart": True}):
        by_hand = worths_by_hand(start.keep, subject.costs, derivatives, 0.03, **wrong)
        away[str(wrong)] = [max(np.abs(values[name] - expected[name]).max() for name in expected)
                            for values, expected in zip(seen, by_hand, strict=True)]  # fmt: skip
    assert max(away.pop("{}")) < 1e-9
    assert all(max(each) > 1e-2 for each in away.values()), "control"
    assert all(each[0] > 1e-4 for each in away.values()), "control: from the first step on"


def test_learn_swaps_in_what_the_objective_misses(small):
    """Of units that do not work together the best mask is known; the default learns it from the worst one."""
    objective = Quadratic(small, 0)
    objective.matrix = np.diag(np.random.default_rng(0).permutation(len(objective.matrix)) + 1.0)
    worth = np.diag(objective.matrix)[-10:].reshape(2, 5)
    rank = worth.ravel().argsort().argsort().reshape(2, 5)
    worst, best = ({"attention": small.existing["attention"], "mlp": kept} for kept in (rank < 6, rank >= 4))
    done = refined(small, State(small, worst, Within(min_keep=0)), Learn(), objective, 0.4)
    np.testing.assert_array_equal(done.keep["mlp"], best["mlp"])
    assert objective.judge(best) < objective.judge(worst) / 2, "control: there is something to learn"
    still = refined(small, State(small, best, Within(min_keep=0)), Learn(), objective, 0.4)
    np.testing.assert_array_equal(still.keep["mlp"], best["mlp"])


def test_steps_of_probabilities_are_those_of_adam_on_their_logits(small):
    """GRASPrune's rule, written out: m(p) by the lowest p, ∂/∂θ = ∂/∂m · p (1 - p), whatever a unit costs."""
    objective, start = Quadratic(small, 3), start_of(small, 0.4, Global(), seed=1)
    refined(small, start, Learn(steps=5, rate=0.8, rule="sigmoid"), objective, 0.4)
    theta, keep = np.where(start.keep["mlp"], np.log(3), -np.log(3)), start.keep["mlp"]
    first, second = np.zeros(theta.shape), np.zeros(theta.shape)
    for step, (_, asked) in enumerate(objective.asked, start=1):
        np.testing.assert_array_equal(asked["mlp"], keep)
        p = 1 / (1 + np.exp(-theta))
        slope = Quadratic(small, 3).gradient(asked, 0)[1]["mlp"] * p * (1 - p)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = 0.8 * (1 + np.cos(np.pi * (step - 1) / 5)) / 2
        theta = theta - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
        keep = theta > np.sort(theta.ravel())[int((~start.keep["mlp"]).sum()) - 1]
    assert not (keep == start.keep["mlp"]).all(), "control: something was learnt"


def test_what_soft_gates_retain_is_0_at_0_and_1_at_twice_the_sharpness():
    z = np.linspace(-0.5, 1.5, 41)
    for sharp in (0.5, 0.2, 0.05):
        ends, _ = retention(np.array([-1e-3, 0.0, sharp, 2 * sharp, 2 * sharp + 1e-3]), sharp)
        np.testing.assert_allclose(ends, [0, 0, 0.5, 1, 1], atol=1e-12)
        inside = (z > 1e-3) & (z < 2 * sharp - 1e-3)
        differences = (retention(z + 1e-6, sharp)[0] - retention(z - 1e-6, sharp)[0]) / 2e-6
        np.testing.assert_allclose(retention(z, sharp)[1][inside], differences[inside], rtol=1e-4)
    assert retention(np.ones(1), 0.5)[1] > 0.4, "straight through the clip, or nothing would move from z = 1"


def test_steps_of_soft_gates_are_those_of_an_augmented_lagrangian(small):
    """As a review of DDP has it: m = ReLU(z), s by the stretched sigmoid, Adam on all losses, multipliers rise."""
    objective, start = Quadratic(small, 3), start_of(small, 0.4, Global(), seed=1)
    done = refined(small, start, Learn(steps=60, rate=0.2, rule="soft"), objective, 0.4)
    z = {name: np.ones(units.shape) for name, units in small.existing.items()}["mlp"]
    first, second, one, two, closed = np.zeros(z.shape), np.zeros(z.shape), 0.0, 0.0, 0
    judged = [objective.judge(start.keep)]
    for step, (_, asked) in enumerate(objective.asked, start=1):
        np.testing.assert_allclose(asked["mlp"], np.maximum(z, 0), atol=1e-3)  # Adam in 32 bits
        mu = 0.5 - 0.45 * np.sqrt(step / 60)
        v = 1 / (1 + np.exp(-(z - mu) * 2.397895 / mu))
        s = np.clip(v * 1.2 - 0.1, 0, 1)
        slope = 1.2 * v * (1 - v) * 2.397895 / mu
        over = s.mean() - 0.6
        down = Quadratic(small, 3).gradient(asked, 0)[1]["mlp"]
        down = down + (one + 2 * two * over) * slope / 10 + (1 - 2 * s) * slope / 10
        first, second = 0.9 * first + 0.1 * down, 0.999 * second + 0.001 * down**2
        rate = 0.2 * (1 + np.cos(np.pi * (step - 1) / 60)) / 2
        z = z - rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
        one, two, closed = one + over, two + over**2, closed + int((z < 0).sum())
        keep = {"attention": small.existing["attention"], "mlp": z > np.sort(z.ravel())[3]}
        judged += [objective.judge(keep)] * (step % 3 == 0)
    assert closed > 0, "control: some gates closed"
    np.testing.assert_allclose(done.metrics["divergences"], judged)


def test_what_it_chose_before_stays_where_nothing_is_better(small):
    class Worse(Quadratic):
        calls = 0

        def judge(self, keep):
            self.calls += 1
            return float(self.calls)

    start = start_of(small, 0.4, Global())
    done = refined(small, start, Learn(steps=12, rate=0.2), Worse(small, 0), 0.4)
    assert done.keep is start.keep
    assert done.metrics["divergences"] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "chosen"),
    [
        (0.3, "random > uniform"),
        (0.2, "random > within(protect=(0,), multiple_of={mlp: 2}) > uniform"),
        (0.3, "random > within(attention=0.5) > global"),
    ],
)
def test_budget_and_limits_are_those_of_the_allocation(ratio, chosen):
    subject = LlamaSubject(random_model(spec_of((2, 6), (2, 8), (1, 8))))
    text = Windows(*(np.concatenate(parts) for parts in zip(*batches_of(), strict=True)))
    start, done, same = (
        saap_jax.run_chain(subject, f"{chosen} > {then}", text, ratio, batch_size=2)
        for then in ("none", "learn(12, rate=0.2)", "learn(0)")
    )
    assert len(done.metrics["divergences"]) == 5
    assert subject.removed(done.keep) >= ratio * subject.prunable
    assert any((done.keep[name] != start.keep[name]).any() for name in start.keep)
    assert min(done.metrics["divergences"]) < done.metrics["divergences"][0]
    if "protect" in chosen:
        assert all(done.keep[name][0].sum() == subject.existing[name][0].sum() for name in done.keep)
        assert all(done.keep["mlp"].sum(axis=1) % 2 == 0)
    assert all((same.keep[name] == start.keep[name]).all() for name in start.keep)
    assert "divergences" not in same.metrics
