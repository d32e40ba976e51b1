"""The search of query heads against every possible choice, with its budget and its refusals."""

import itertools

import numpy as np
import pytest

from saap_jax.config.method import QueryHeadsConfig, SearchConfig
from saap_jax.llama import LayerWidths
from saap_jax.selection.query_heads import search_query_heads

WIDTHS = tuple(LayerWidths(kv_heads=k, q_per_kv=g, mlp=4) for k, g in ((2, 3), (2, 2), (1, 4), (0, 3), (3, 1)))
EACH = 10
RANKED = SearchConfig(allocation="global")


def scores_of(seed: int = 0) -> np.ndarray:
    """Return scores of every query head; NaN where a layer has none."""
    heads = np.array([w.kv_heads * w.q_per_kv for w in WIDTHS])
    drawn = np.random.default_rng(seed).lognormal(0, 1, (len(WIDTHS), heads.max()))
    return np.where(np.arange(heads.max()) < heads[:, None], drawn, np.nan)


def searched(target: int, config: SearchConfig = RANKED, seed: int = 0, min_keep: int = 1) -> np.ndarray:
    return search_query_heads(scores_of(seed), WIDTHS, EACH, target, config, QueryHeadsConfig(min_keep=min_keep))


def removed(keep: np.ndarray) -> int:
    return EACH * int((np.isfinite(scores_of()) & ~keep).sum())


def left_of(keep: np.ndarray) -> list[list[int]]:
    """Return how many query heads each KV head of each layer keeps."""
    rows = zip(keep, WIDTHS, strict=True)
    return [row[: w.kv_heads * w.q_per_kv].reshape(w.kv_heads, w.q_per_kv).sum(axis=1).tolist() for row, w in rows]


@pytest.mark.parametrize("target", [0, 1, 20, 21, 45, 80])
@pytest.mark.parametrize("seed", range(4))
def test_budget_and_shape(target, seed):
    keep = searched(target, seed=seed)
    assert not (keep & np.isnan(scores_of())).any()
    for layer, counts in enumerate(left_of(keep)):
        assert len(set(counts)) <= 1
        assert all(1 <= count <= WIDTHS[layer].q_per_kv for count in counts)
    assert target <= removed(keep)
    pruned = [w for w, counts in zip(WIDTHS, left_of(keep), strict=True) if sum(counts) < w.kv_heads * w.q_per_kv]
    blocks = [EACH * w.kv_heads for w in pruned]
    assert all(removed(keep) - cost < target for cost in blocks), "no block could be given back"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [20, 40, 60])
def test_exact_is_the_best_of_all_choices(target, seed):
    """Every number of query heads a layer, and every choice of them within each KV head."""
    scores, costs = scores_of(seed), []
    options = []
    for layer, w in enumerate(WIDTHS):
        each = []
        for gone in range(w.q_per_kv if w.kv_heads else 1):
            groups = scores[layer, : w.kv_heads * w.q_per_kv].reshape(w.kv_heads, w.q_per_kv)
            choices = [min(sum(c) for c in itertools.combinations(group, gone)) for group in groups]
            each.append((gone * w.kv_heads * EACH, sum(choices)))
        options.append(each)
    for chosen in itertools.product(*options):
        cost = sum(c for c, _ in chosen)
        if cost >= target:
            costs.append(sum(s for _, s in chosen))
    for solver in ("exact", "greedy"):
        config = SearchConfig(allocation="global", solver=solver)
        lost = np.nansum(np.where(searched(target, config, seed), 0, scores))
        assert lost >= min(costs) - 1e-9
        if solver == "exact":
            assert lost == pytest.approx(min(costs))


def test_one_ranking_of_means_by_hand():
    """Two layers of two KV heads: the blocks of lowest mean go, other heads in each group."""
    widths = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=1),) * 2
    scores = np.array([[5.0, 1.0, 2.0, 9.0], [3.0, 4.0, 8.0, 3.0]])
    one = search_query_heads(scores, widths, EACH, 20, SearchConfig(), QueryHeadsConfig())
    np.testing.assert_array_equal(one, [[1, 0, 0, 1], [1, 1, 1, 1]])
    both = search_query_heads(scores, widths, EACH, 21, SearchConfig(), QueryHeadsConfig())
    np.testing.assert_array_equal(both, [[1, 0, 0, 1], [0, 1, 1, 0]])
    swapped = search_query_heads(scores[::-1], widths, EACH, 20, SearchConfig(), QueryHeadsConfig())
    np.testing.assert_array_equal(swapped, one[::-1])


def test_heads_in_another_order_are_chosen_in_that_order():
    order = np.array([2, 0, 1, 5, 3, 4])
    widths = (LayerWidths(kv_heads=2, q_per_kv=3, mlp=1),) * 3
    scores = np.random.default_rng(1).lognormal(0, 1, (3, 6))
    keep = search_query_heads(scores, widths, EACH, 60, RANKED, QueryHeadsConfig())
    np.testing.assert_array_equal(
        search_query_heads(scores[:, order], widths, EACH, 60, RANKED, QueryHeadsConfig()), keep[:, order]
    )
    assert (keep[:, order] != keep).any()


def test_floor_and_skipped_layers():
    assert left_of(searched(20, SearchConfig(skip_layers=(0,)), min_keep=2)) == [
        [3, 3],
        [2, 2],
        [2],
        [],
        [1] * 3,
    ]
    assert left_of(searched(90)) == [[1, 1], [1, 1], [1], [], [1] * 3]
    with pytest.raises(ValueError, match=r"expected at most 20 parameters from query heads.*got 21"):
        searched(21, SearchConfig(skip_layers=(0,)), min_keep=2)


def test_stability_counts_where_it_is_asked_for():
    widths = (LayerWidths(kv_heads=1, q_per_kv=3, mlp=1),)
    scores, stability = np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, -5.0, 0.0]])
    options = {"scores": scores, "widths": widths, "parameters": EACH, "target": 10, "stability": stability}
    options["options"] = QueryHeadsConfig()
    adaptive = SearchConfig(allocation="adaptive", stability_weight=1.0)
    np.testing.assert_array_equal(search_query_heads(config=adaptive, **options), [[1, 0, 1]])
    np.testing.assert_array_equal(search_query_heads(config=RANKED, **options), [[0, 1, 1]])


def test_normalized_scores():
    """Scores of other sizes in each layer: standardised ones take a block of each, plain ones both of the first."""
    widths = (LayerWidths(kv_heads=1, q_per_kv=3, mlp=1),) * 2
    scores = np.array([[1.0, 2.0, 3.0], [100.0, 200.0, 300.0]])
    plain = search_query_heads(
        scores, widths, EACH, 20, SearchConfig(allocation="global", rank_by="score"), QueryHeadsConfig()
    )
    np.testing.assert_array_equal(plain, [[0, 0, 1], [1, 1, 1]])
    normal = SearchConfig(allocation="global", rank_by="score", normalize="layer_zscore")
    np.testing.assert_array_equal(
        search_query_heads(scores, widths, EACH, 20, normal, QueryHeadsConfig()), [[0, 1, 1]] * 2
    )


def test_refusals():
    alone = (LayerWidths(kv_heads=3, q_per_kv=1, mlp=1), LayerWidths(kv_heads=0, q_per_kv=2, mlp=1))
    with pytest.raises(ValueError, match="got a model with one each"):
        search_query_heads(scores_of()[:2], alone, EACH, 10, RANKED, QueryHeadsConfig())
    tied = np.where(np.isfinite(scores_of()), np.arange(5.0)[:, None], np.nan)
    with pytest.raises(ValueError, match="tell the query heads of a KV head apart, got equal ones"):
        search_query_heads(tied, WIDTHS, EACH, 10, RANKED, QueryHeadsConfig())
    with pytest.raises(ValueError, match="scores of attention unit 1 in layer 0 are not finite"):
        search_query_heads(
            np.where(np.arange(6) == 1, np.nan, scores_of()), WIDTHS, EACH, 10, RANKED, QueryHeadsConfig()
        )
    with pytest.raises(ValueError, match=r"search.skip_layers: expected layers in \[-5, 5\)"):
        searched(10, SearchConfig(skip_layers=(7,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"query_heads.share: expected a number in \[0, 1\], got 1.5"),
        ({"min_keep": 0}, "query_heads.min_keep: expected at least 1, got 0"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QueryHeadsConfig(**options)
