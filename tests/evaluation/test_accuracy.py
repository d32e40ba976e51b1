"""Paired accuracies over tasks against the bootstrap item by item, and against what is known exactly."""

import numpy as np
import pytest

from saap_jax.evaluation.differences import ALL, paired_tasks


def outcomes(items: int, seeds: int = 1, share: float = 0.6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, items)) < share


def by_hand(a, b, resamples: int = 4000, seed: int = 1):
    """Draw seeds for all tasks and items within each, one resample at a time."""
    random = np.random.default_rng(seed)
    seeds = next(iter(a.values())).shape[0]
    means = {task: [] for task in (*a, ALL)}
    for _ in range(resamples):
        rows = random.integers(seeds, size=seeds)
        each = []
        for task in a:
            columns = random.integers(a[task].shape[1], size=a[task].shape[1])
            difference = a[task].astype(float) - b[task].astype(float)
            each.append(100 * difference[np.ix_(rows, columns)].mean())
            means[task].append(each[-1])
        means[ALL].append(np.mean(each))
    return {task: np.quantile(values, [0.025, 0.975]) for task, values in means.items()}


@pytest.mark.parametrize("seeds", [1, 3])
def test_as_the_bootstrap_item_by_item(seeds):
    a = {"one": outcomes(80, seeds, 0.7), "two": outcomes(40, seeds, 0.5, 1)}
    b = {"one": outcomes(80, seeds, 0.5, 2), "two": outcomes(40, seeds, 0.5, 3)}
    found = paired_tasks(a, b)
    for task, (low, high) in by_hand(a, b).items():
        width = high - low
        assert found[task].low == pytest.approx(low, abs=0.08 * width)
        assert found[task].high == pytest.approx(high, abs=0.08 * width)
    points = [100 * (a[task].mean() - b[task].mean()) for task in a]
    assert [found[task].points for task in a] == pytest.approx(points)
    assert found[ALL].points == pytest.approx(np.mean(points))
    assert found[ALL].high - found[ALL].low < found["two"].high - found["two"].low


def test_a_result_of_a_task_does_not_depend_on_the_others():
    a, b = {"t": outcomes(50), "u": outcomes(50, seed=5)}, {"t": outcomes(50, seed=1), "u": outcomes(50, seed=6)}
    both = paired_tasks(a, b, resamples=300)
    assert paired_tasks({"u": a["u"]}, {"u": b["u"]}, resamples=300)["u"] == both["u"]


def test_planted_difference():
    base = outcomes(400)
    worse = base.copy()
    worse[0, np.flatnonzero(base[0])[:40]] = False
    found = paired_tasks({"t": worse}, {"t": base})["t"]
    assert found.points == pytest.approx(-10)
    assert found.sure
    assert found.p_value < 0.01
    assert found.sentence.startswith("A has a lower accuracy than B by 10.0 points (")
    one = base.copy()
    one[0, 0] = ~one[0, 0]
    assert not paired_tasks({"t": one}, {"t": base})["t"].sure


def test_refused():
    with pytest.raises(ValueError, match="expected the same tasks of both models, "):
        paired_tasks({"t": outcomes(5)}, {"u": outcomes(5)})
    with pytest.raises(ValueError, match="of one item or more"):
        paired_tasks({"t": outcomes(5)}, {"t": outcomes(6)})
    with pytest.raises(ValueError, match="of one item or more"):
        paired_tasks({"t": outcomes(0)}, {"t": outcomes(0)})
    with pytest.raises(ValueError, match="resamples >= 1"):
        paired_tasks({"t": outcomes(5)}, {"t": outcomes(5)}, resamples=0)
