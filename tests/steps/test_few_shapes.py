"""Few runs and shapes: the limits hold, the budget is met, and the loss is near what trying everything finds."""

import itertools

import numpy as np
import pytest

from saap_jax.steps.allocation.ranking import Global
from saap_jax.steps.allocation.search import Prunable, largest_ratio, search
from saap_jax.steps.allocation.uniform import Uniform
from saap_jax.steps.chain import parse
from saap_jax.steps.limits import Within
from saap_jax.types import STRUCTURES


def problem(layers: int = 6, heads: int = 2, channels: int = 6, seed: int = 0):
    random = np.random.default_rng(seed)
    scores = {"attention": random.gamma(1.0, 1.0, (layers, heads)), "mlp": random.gamma(1.0, 1.0, (layers, channels))}
    costs = {"attention": np.full(layers, 6, np.int64), "mlp": np.full(layers, 2, np.int64)}
    existing = {name: np.ones(each.shape, bool) for name, each in scores.items()}
    return scores, Prunable(costs, existing)


def widths_of(keep) -> list[tuple[int, ...]]:
    return list(zip(*(keep[name].sum(axis=1).tolist() for name in STRUCTURES), strict=True))


def runs_of(widths) -> int:
    return len(list(itertools.groupby(widths)))


def lost(scores, keep) -> float:
    return sum(float(scores[name][~keep[name]].sum()) for name in STRUCTURES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits", [{"max_segments": 3}, {"max_shapes": 2}, {"max_segments": 4, "max_shapes": 2}, {"max_segments": 1}]
)
@pytest.mark.parametrize(("allocation", "share"), [(Global(), None), (Uniform(), None), (Global(), 0.25)])
def test_limits_hold_and_the_budget_is_met(seed, limits, allocation, share):
    scores, prunable = problem(seed=seed)
    free, found = (
        search(scores, prunable, 0.4, allocation, Within(min_keep={"attention": 0}, attention=share, **each))
        for each in ({}, limits)
    )
    widths = widths_of(found.keep)
    assert runs_of(widths) <= limits.get("max_segments", 6)
    assert len(set(widths)) <= limits.get("max_shapes", 6)
    assert found.actual >= 0.4
    if allocation == Global() and share is None:
        assert runs_of(widths_of(free.keep)) > limits.get("max_segments", 1)  # the limit is what did it
    for name in STRUCTURES:  # the lowest scores of a layer go first
        for own, kept in zip(scores[name], found.keep[name], strict=True):
            assert own[~kept].max(initial=0) <= own[kept].min(initial=np.inf)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_loss_is_near_the_best_of_all_assignments(seed, most):
    scores, prunable = problem(layers=4, heads=1, channels=4, seed=seed)
    found = search(scores, prunable, 0.3, Global(), Within(max_segments=most, min_keep={"mlp": 0}))
    total = prunable.parameters
    ordered = np.sort(scores["mlp"], axis=1)
    best = np.inf
    for widths in itertools.product(range(5), repeat=4):
        if runs_of(widths) <= most and 2 * sum(4 - w for w in widths) >= 0.3 * total:
            best = min(best, sum(ordered[layer, : 4 - w].sum() for layer, w in enumerate(widths)))
    # a Lagrangian misses optima off the convex hull by less than one step of one stretch
    assert best - 1e-9 <= lost(scores, found.keep) <= best + ordered.max(axis=1).sum() / most
    if seed == 0:
        assert lost(scores, search(scores, prunable, 0.3, Global(), Within()).keep) < best + 1e-9  # free to choose


def test_as_many_runs_as_layers_is_nearly_the_search_without_a_limit():
    scores, prunable = problem(layers=8, channels=16)
    free, limited = (search(scores, prunable, 0.3, Global(), Within(max_segments=most)) for most in (None, 8))
    assert lost(scores, limited.keep) <= lost(scores, free.keep) * 1.05
    gone = sum(int(((~kept).sum(axis=1) * prunable.costs[name]).sum()) for name, kept in limited.keep.items())
    assert gone == limited.removed >= 0.3 * prunable.parameters


def test_layers_left_alone_stay_whole_and_are_runs_of_their_own():
    scores, prunable = problem()
    within = Within(protect=(0, -1), max_segments=3)
    widths = widths_of(search(scores, prunable, 0.3, Global(), within).keep)
    assert (widths[0], widths[-1], runs_of(widths)) == ((2, 6), (2, 6), 3)
    with pytest.raises(ValueError, match=r"cannot be removed with max_segments 2 .*largest possible ratio is"):
        search(scores, prunable, 0.5, Global(), Within(protect=(0, -1), max_segments=2))
    top = largest_ratio(prunable, Global(), within)
    search(scores, prunable, top, Global(), within)
    with pytest.raises(ValueError, match="cannot be removed"):
        search(scores, prunable, top + 0.01, Global(), within)


def test_units_that_are_gone_stay_gone():
    scores, prunable = problem(seed=3)
    first = search(scores, prunable, 0.2, Global(), Within())
    gone = {name: ~kept for name, kept in first.keep.items()}
    found = search(scores, prunable, 0.5, Global(), Within(max_segments=3), gone)
    assert runs_of(widths_of(found.keep)) <= 3
    assert not any((found.keep[name] & gone[name]).any() for name in STRUCTURES)


def test_alignment_and_caps_hold_with_few_shapes():
    scores, prunable = problem(channels=16)
    found = search(scores, prunable, 0.3, Global(), Within(max_shapes=2, multiple_of={"mlp": 4}, max_ratio=0.5))
    assert all(mlp % 4 == 0 and mlp >= 8 and heads >= 1 for heads, mlp in widths_of(found.keep))


@pytest.mark.parametrize(("device", "multiple"), [("any", 1), ("tpu", 128), ("gpu", 64), ("cpu", 16)])
def test_a_device_asks_for_widths_that_suit_it(device, multiple):
    scores, prunable = problem(layers=3, channels=512)
    within = Within(device=device, protect=(0,))
    widths = [mlp for _, mlp in widths_of(search(scores, prunable, 0.37, Global(), within).keep)]
    assert all(mlp % multiple == 0 for mlp in widths)
    assert Within(device=device, multiple_of={"mlp": 32}).layer("mlp").multiple_of == 32  # what is said counts
    if multiple == 1:
        assert any(mlp % 16 for mlp in widths)


@pytest.mark.parametrize("name", ["max_segments", "max_shapes"])
def test_none_at_all_and_the_exact_solver_are_refused(name):
    with pytest.raises(ValueError, match=f"within.{name}: expected at least 1, got 0"):
        parse(f"wanda > within({name}=0) > global")
    scores, prunable = problem()
    with pytest.raises(ValueError, match="within.max_segments and max_shapes: expected solver greedy .*, got exact"):
        search(scores, prunable, 0.3, Global(solver="exact"), Within(**{name: 2}))
