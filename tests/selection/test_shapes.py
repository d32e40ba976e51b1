"""Few runs and shapes: the limits hold, the budget is met, and the loss is near what trying everything finds."""

import itertools

import numpy as np
import pytest
from saap_jax.config.search import PerStructure, SearchConfig, SharePerStructure
from saap_jax.selection.search import aligned, largest_ratio, search

from saap_jax.types import STRUCTURES

GLOBAL = SearchConfig(allocation="global", rank_by="score_per_parameter")


def problem(layers: int = 6, heads: int = 2, channels: int = 6, seed: int = 0):
    random = np.random.default_rng(seed)
    scores = {"attention": random.gamma(1.0, 1.0, (layers, heads)), "mlp": random.gamma(1.0, 1.0, (layers, channels))}
    costs = {"attention": np.full(layers, 6, np.int64), "mlp": np.full(layers, 2, np.int64)}
    existing = {name: np.ones(each.shape, bool) for name, each in scores.items()}
    return scores, costs, existing


def widths_of(keep) -> list[tuple[int, ...]]:
    return list(zip(*(keep[name].sum(axis=1).tolist() for name in STRUCTURES), strict=True))


def runs_of(widths) -> int:
    return len(list(itertools.groupby(widths)))


def lost(scores, keep) -> float:
    return sum(float(scores[name][~keep[name]].sum()) for name in STRUCTURES)


def removed(costs, keep) -> int:
    return sum(int(((~keep[name]).sum(axis=1) * costs[name]).sum()) for name in STRUCTURES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits", [{"max_segments": 3}, {"max_shapes": 2}, {"max_segments": 4, "max_shapes": 2}, {"max_segments": 1}]
)
@pytest.mark.parametrize("search_options", [{}, {"allocation": "uniform"}, {"attention_share": 0.25}])
def test_limits_hold_and_the_budget_is_met(seed, limits, search_options):
    scores, costs, existing = problem(seed=seed)
    base = SearchConfig(**({"allocation": "global", "min_keep": PerStructure(attention=0, mlp=1)} | search_options))
    free = search(scores, costs, existing, 0.4, base)
    config = SearchConfig(**(vars(base) | limits))
    found = search(scores, costs, existing, 0.4, config)
    widths = widths_of(found.keep)
    assert runs_of(widths) <= limits.get("max_segments", 6)
    assert len(set(widths)) <= limits.get("max_shapes", 6)
    assert found.actual >= 0.4
    if not search_options:
        assert runs_of(widths_of(free.keep)) > limits.get("max_segments", 1)  # the limit is what did it
    for name in STRUCTURES:  # the lowest scores of a layer go first
        for own, kept in zip(scores[name], found.keep[name], strict=True):
            assert own[~kept].max(initial=0) <= own[kept].min(initial=np.inf)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_loss_is_near_the_best_of_all_assignments(seed, most):
    scores, costs, existing = problem(layers=4, heads=1, channels=4, seed=seed)
    config = SearchConfig(allocation="global", max_segments=most, min_keep=PerStructure(attention=1, mlp=0))
    found = search(scores, costs, existing, 0.3, config)
    total = sum(existing[name].sum() * costs[name][0] for name in STRUCTURES)
    ordered = np.sort(scores["mlp"], axis=1)
    best = np.inf
    for widths in itertools.product(range(5), repeat=4):
        if runs_of(widths) <= most and 2 * sum(4 - w for w in widths) >= 0.3 * total:
            best = min(best, sum(ordered[layer, : 4 - w].sum() for layer, w in enumerate(widths)))
    # a Lagrangian misses optima off the convex hull by less than one step of one stretch
    assert best - 1e-9 <= lost(scores, found.keep) <= best + ordered.max(axis=1).sum() / most
    if seed == 0:
        assert lost(scores, search(scores, costs, existing, 0.3, GLOBAL).keep) < best + 1e-9  # free to choose


def test_as_many_runs_as_layers_is_nearly_the_search_without_a_limit():
    scores, costs, existing = problem(layers=8, channels=16)
    free = search(scores, costs, existing, 0.3, GLOBAL)
    limited = search(scores, costs, existing, 0.3, SearchConfig(**(vars(GLOBAL) | {"max_segments": 8})))
    assert lost(scores, limited.keep) <= lost(scores, free.keep) * 1.05
    assert removed(costs, limited.keep) >= 0.3 * sum(existing[n].sum() * costs[n][0] for n in STRUCTURES)


def test_layers_left_alone_stay_whole_and_are_runs_of_their_own():
    scores, costs, existing = problem()
    config = SearchConfig(allocation="global", skip_layers=(0, -1), max_segments=3)
    widths = widths_of(search(scores, costs, existing, 0.3, config).keep)
    assert (widths[0], widths[-1], runs_of(widths)) == ((2, 6), (2, 6), 3)
    with pytest.raises(ValueError, match=r"cannot be removed with max_segments 2 .*largest possible ratio is"):
        search(scores, costs, existing, 0.5, SearchConfig(**(vars(config) | {"max_segments": 2})))
    top = largest_ratio(costs, existing, config)
    search(scores, costs, existing, top, config)
    with pytest.raises(ValueError, match="cannot be removed"):
        search(scores, costs, existing, top + 0.01, config)


def test_units_that_are_gone_stay_gone():
    scores, costs, existing = problem(seed=3)
    first = search(scores, costs, existing, 0.2, SearchConfig(allocation="global"))
    gone = {name: ~kept for name, kept in first.keep.items()}
    config = SearchConfig(allocation="global", max_segments=3)
    found = search(scores, costs, existing, 0.5, config, gone=gone)
    assert runs_of(widths_of(found.keep)) <= 3
    assert not any((found.keep[name] & gone[name]).any() for name in STRUCTURES)


def test_alignment_and_caps_hold_with_few_shapes():
    scores, costs, existing = problem(channels=16)
    config = SearchConfig(
        allocation="global", max_shapes=2, multiple_of=PerStructure(attention=1, mlp=4),
        max_ratio=SharePerStructure(attention=0.5, mlp=0.5),
    )  # fmt: skip
    found = search(scores, costs, existing, 0.3, config)
    assert all(mlp % 4 == 0 and mlp >= 8 and heads >= 1 for heads, mlp in widths_of(found.keep))


@pytest.mark.parametrize(("device", "multiple"), [("any", 1), ("tpu", 128), ("gpu", 64), ("cpu", 16)])
def test_a_device_asks_for_widths_that_suit_it(device, multiple):
    scores, costs, existing = problem(layers=3, channels=512)
    config = SearchConfig(allocation="global", device=device, skip_layers=(0,))
    widths = [mlp for _, mlp in widths_of(search(scores, costs, existing, 0.37, config).keep)]
    assert all(mlp % multiple == 0 for mlp in widths)
    assert aligned(SearchConfig(device=device, multiple_of=PerStructure(mlp=32))).mlp == 32  # what is said counts
    if multiple == 1:
        assert any(mlp % 16 for mlp in widths)


@pytest.mark.parametrize("options", [{"max_segments": 0}, {"max_shapes": 0}])
def test_none_at_all_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"search.{name}: expected at least 1, got 0"):
        SearchConfig(**options)


def test_the_exact_solver_has_no_such_limits():
    with pytest.raises(ValueError, match="search.max_segments: expected solver 'greedy' beside it, got 'exact'"):
        SearchConfig(allocation="global", solver="exact", max_segments=2)
