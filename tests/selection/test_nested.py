"""The search of structures inside others against every possible choice, with its budget and its refusals."""

import itertools

import numpy as np
import pytest

from saap_jax.config.search import QueryHeadsConfig, ResidualConfig, SearchConfig, SharePerStructure
from saap_jax.llama import LayerWidths
from saap_jax.selection.nested import Tied, kept_slices, kept_tied, search_nested
from saap_jax.selection.search import search
from saap_jax.types import Limits, Nested

WIDTHS = tuple(LayerWidths(kv_heads=k, q_per_kv=g, mlp=4) for k, g in ((2, 3), (2, 2), (1, 4), (0, 3), (3, 1)))
EACH = 10
RANKED = SearchConfig(allocation="global")


def search_query_heads(scores, widths, parameters, target, config, options, stability=None):
    """Search query heads of layers of these widths, each of as many parameters."""
    heads = np.array([w.kv_heads * w.q_per_kv for w in widths])
    holders = np.array([w.kv_heads for w in widths])
    present = np.arange(scores.shape[1]) < heads[:, None]
    kv_heads = np.arange(holders.max()) < holders[:, None]
    tied = Tied(present, kv_heads, kv_heads, np.full(len(widths), parameters, np.int64))
    how = Nested("attention", 0.5, "search.query_heads", Limits(min_keep=options.min_keep))
    return kept_tied(scores, tied, target, how, config, stability)


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
    with pytest.raises(ValueError, match="scores of query_heads unit 1 in layer 0 are not finite"):
        search_query_heads(
            np.where(np.arange(6) == 1, np.nan, scores_of()), WIDTHS, EACH, 10, RANKED, QueryHeadsConfig()
        )
    with pytest.raises(ValueError, match=r"search.skip_layers: expected layers in \[-5, 5\)"):
        searched(10, SearchConfig(skip_layers=(7,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"search.query_heads.share: expected a number in \[0, 1\], got 1.5"),
        ({"min_keep": 0}, "search.query_heads.min_keep: expected at least 1, got 0"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QueryHeadsConfig(**options)


# --- with all others -----------------------------------------------------------------------------

LAYERS, HOLDERS, PER, CHANNELS, EMBED = 3, 2, 3, 5, 16
EXISTING = {
    "attention": np.ones((LAYERS, HOLDERS), bool),
    "mlp": np.ones((LAYERS, CHANNELS), bool),
    "query_heads": np.ones((LAYERS, HOLDERS * PER), bool),
    "embed": np.ones((1, EMBED), bool),
}


def costs(keep) -> dict[str, np.ndarray]:
    """Return what a unit costs by a second, plain count: 4 columns a head, 3 matrices a channel."""
    embed, layers = int(keep["embed"].sum()), range(LAYERS)
    heads = keep["query_heads"].reshape(LAYERS, HOLDERS, PER)
    left = [max(int(heads[layer][keep["attention"][layer]].sum(1).max(initial=0)), 0) for layer in layers]
    attention = np.array([(2 * each + 2) * 4 * embed for each in left], np.int64)
    of_units = {"attention": attention, "mlp": np.full(LAYERS, 3 * embed, np.int64)}
    whole = sum(int((keep[name].sum(1) * of_units[name]).sum()) for name in of_units)
    return of_units | {"query_heads": np.full(LAYERS, 8 * embed, np.int64), "embed": np.array([whole // embed])}


def left_by(keep) -> int:
    of_units = costs(keep)
    return sum(int((keep[name].sum(1) * of_units[name]).sum()) for name in ("attention", "mlp"))


def nested_of(heads: float, channels: float, multiple_of: int = 2) -> dict[str, Nested]:
    return {
        "embed": Nested(None, channels, "search.residual", Limits(multiple_of=multiple_of)),
        "query_heads": Nested("attention", heads, "search.query_heads"),
    }


def drawn(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.lognormal(0, 1, units.shape) for name, units in EXISTING.items()}


@pytest.mark.parametrize(("heads", "channels"), [(0.3, 0.0), (0.0, 0.4), (0.2, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_all_together_meet_the_budget_from_above(heads, channels, allocation):
    whole = left_by(EXISTING)
    for seed, ratio in itertools.product(range(4), (0.2, 0.4)):
        config = SearchConfig(allocation=allocation)
        keep = search_nested(drawn(seed), costs, EXISTING, nested_of(heads, channels, 1), ratio, config)
        gone = whole - left_by(keep)
        largest = max(int(each.max()) for name, each in costs(keep).items() if name in ("attention", "mlp"))
        assert ratio * whole <= gone < ratio * whole + largest
        assert keep["embed"].all() == (channels == 0)
        counts = keep["query_heads"].reshape(LAYERS, HOLDERS, PER).sum(2)
        for layer in range(LAYERS):
            assert len(set(counts[layer][keep["attention"][layer]])) <= 1
            assert not counts[layer][~keep["attention"][layer]].any(), "query heads go with their KV head"
        if not heads:
            assert (counts[keep["attention"]] == PER).all()


def test_without_shares_it_is_the_ordinary_search():
    scores, config = drawn(0), SearchConfig(allocation="global")
    plain = {name: EXISTING[name] for name in ("attention", "mlp")}
    expected = search({n: scores[n] for n in plain}, {n: costs(EXISTING)[n] for n in plain}, plain, 0.3, config)
    keep = search_nested(scores, costs, EXISTING, nested_of(0.0, 0.0), 0.3, config)
    for name in plain:
        np.testing.assert_array_equal(keep[name], expected.keep[name])
    other = search_nested(scores, costs, EXISTING, nested_of(0.5, 0.0), 0.3, config)
    assert any((other[name] != expected.keep[name]).any() for name in plain)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_path_what_went_stays_away(seed):
    """Scores of what went are not read; the budget counts it; more of every structure goes."""
    nested, config = nested_of(0.3, 0.3), SearchConfig(allocation="global")
    first = search_nested(drawn(seed), costs, EXISTING, nested, 0.2, config)
    gone = {name: ~kept for name, kept in first.items()}
    later = {n: np.where(gone[n], np.nan, values) for n, values in drawn(seed + 100).items()}
    second = search_nested(later, costs, EXISTING, nested, 0.5, config, gone=gone)
    assert left_by(second) <= left_by(EXISTING) * 0.5 < left_by(first)
    for name, kept in second.items():
        assert not (kept & gone[name]).any(), name
    counts = second["query_heads"].reshape(LAYERS, HOLDERS, PER).sum(2)
    assert all(len(set(counts[layer][second["attention"][layer]])) <= 1 for layer in range(LAYERS))


def test_on_a_path_as_many_go_as_their_holders_left():
    """A share that held when all KV heads were there: some of these went on the way, with query heads in them."""
    nested, config = nested_of(0.55, 0.0), SearchConfig(allocation="global", max_ratio=SharePerStructure(mlp=0.0))
    ratio = 0.45
    search_nested(drawn(0), costs, EXISTING, nested, ratio, config)
    gone = {name: np.zeros_like(units) for name, units in EXISTING.items()}
    gone["attention"][:, 0] = gone["query_heads"][:, :PER] = True
    keep = search_nested(drawn(0), costs, EXISTING, nested, ratio, config, gone=gone)
    counts = keep["query_heads"].reshape(LAYERS, HOLDERS, PER).sum(2)
    assert (counts[:, 1] >= 1).all()
    assert not counts[:, 0].any()
    with pytest.raises(ValueError, match=r"search.query_heads.share: expected at most"):
        search_nested(drawn(0), costs, EXISTING, nested_of(1.0, 0.0), 0.9, config)


def test_slices_are_the_nearest_multiple_and_the_lowest_go():
    how = nested_of(0.0, 0.5)["embed"]
    keep = kept_slices(np.array([3.0, 1.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0]), 0.5, how)
    assert keep.tolist() == [True, False, False, True, True, True, True, True]
    large = nested_of(0.0, 0.5, multiple_of=16)["embed"]
    assert kept_slices(np.arange(576.0), 0.2, large).sum() == 512
    with pytest.raises(ValueError, match=r"search.residual.share: .* of 576 channels of the residual stream, 0 as"):
        kept_slices(np.arange(576.0), 0.99, Nested(None, 1.0, "search.residual", Limits(multiple_of=16)))
    with pytest.raises(ValueError, match="are not finite"):
        kept_slices(np.array([np.nan, 1.0]), 0.5, how)


def test_structures_without_scores_are_refused():
    scores = {name: values for name, values in drawn(0).items() if name != "query_heads"}
    with pytest.raises(ValueError, match="structure query_heads has no scores"):
        search_nested(scores, costs, EXISTING, nested_of(0.3, 0.0), 0.2, SearchConfig())
    search_nested(scores, costs, EXISTING, nested_of(0.0, 0.0), 0.2, SearchConfig())


@pytest.mark.parametrize("option", ["query_heads", "residual"])
@pytest.mark.parametrize("other", [{"max_segments": 2}, {"max_shapes": 2}])
def test_shared_widths_are_refused_beside_a_share(option, other):
    part = {"query_heads": QueryHeadsConfig(share=0.1), "residual": ResidualConfig(share=0.1)}[option]
    with pytest.raises(
        ValueError, match=rf"search.{option}.share: expected no search.{next(iter(other))} beside it, got 2"
    ):
        SearchConfig(**{option: part}, **other)
    SearchConfig(**other)
