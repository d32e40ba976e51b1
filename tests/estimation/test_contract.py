"""What every estimator owes its callers: one table of models, every entry of ESTIMATORS, also those yet to come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimator
from saap_jax.llama.segments import existing_units, masks
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, permuted, random_keep, random_model, random_tokens, spec_of

BY_INDEX: dict[str, tuple[str, ...]] = {"random": STRUCTURES, "gate_hessian": ("mlp",)}
"""Name -> structures, of estimators that draw a random number for each unit by its index."""
NAMES = list(ESTIMATORS)
COMPARING = ("obs", "obs(greedy=False)", "obs(block=5)", "leverage", "fluctuation(standardize=True)")
"""Those whose formulas compare units of a layer with each other."""

made = functools.cache(make_estimator)  # one formula compiles once a shape
TOKENS = random_tokens(4, 8)
MASK = length_mask(8, 6, 8, 5, seq=8)
MODELS = {
    "dense": dense_model,
    "ragged": lambda: random_model(spec_of((2, 6), (0, 3))),
    "bfloat16": functools.partial(dense_model, "mqa", tied=True, dtype=jnp.bfloat16),
}


def batched(size: int, tokens=TOKENS, mask=MASK, extra: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut examples into microbatches; the last is filled with padding rows, and every row padded by `extra` tokens."""
    pad = ((0, -len(tokens) % size), (0, extra))
    tokens, mask = np.pad(tokens, pad), np.pad(mask, pad)
    return [(tokens[i : i + size], mask[i : i + size]) for i in range(0, len(tokens), size)]


def observed(model, batches):
    """Observe what all estimators of the table need, in one pass."""
    return observe(model, batches, union_of_needs(made(name) for name in NAMES))


@functools.cache
def plain_pass(kind: str):
    """Return a model of the table and what one pass over the calibration examples shows."""
    model = MODELS[kind]()
    return model, observed(model, batched(4))


def scores_of(name: str, model, statistics) -> dict[str, np.ndarray]:
    """Score by one estimator that sees only the statistics that it asks for."""
    estimator = made(name)
    own = {need: statistics.values[need] for need in estimator.needs}
    return score({name: estimator}, statistics._replace(values=own), model)[name]


def assert_close(actual, expected, order=None, structures=STRUCTURES) -> None:
    """Assert scores that are equal to 1e-5 of the structure's largest, after reordering the expected ones' units."""
    for name in structures:
        other = expected[name] if order is None else np.take_along_axis(expected[name], order[name], axis=1)
        np.testing.assert_allclose(actual[name], other, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(expected[name])))


def nearly_equal(first, second) -> bool:
    return all(np.allclose(first[n], second[n], rtol=1e-3, atol=0, equal_nan=True) for n in STRUCTURES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_one_float32_number_a_unit_and_nan_where_none_is(name, kind):
    model, statistics = plain_pass(kind)
    scores, existing = scores_of(name, model, statistics), existing_units(model.segments)
    assert set(scores) == set(STRUCTURES)
    for structure, units in existing.items():
        assert scores[structure].shape == units.shape
        assert scores[structure].dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(scores[structure]), units)
        np.testing.assert_array_equal(np.isnan(scores[structure]), ~units)
    assert len({float(number) for n, units in existing.items() for number in scores[n][units]}) > 1
    assert existing["attention"].all() == (kind != "ragged")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pure(name):
    """Traced anew, a formula gives the same; and it leaves what it is given as it is."""
    model, statistics = plain_pass("ragged")
    before = jax.tree.map(np.array, (model, statistics))
    anew = score({name: make_estimator(name)}, statistics, model)[name]
    jax.tree.map(np.testing.assert_array_equal, anew, scores_of(name, model, statistics))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, (model, statistics)))


@functools.cache
def permuted_pass():
    """Return a dense model with reordered units, its statistics, and the order."""
    random = np.random.default_rng(3)
    order = {name: np.stack([random.permutation(n) for _ in range(2)]) for name, n in (("attention", 2), ("mlp", 6))}
    order["attention"][:] = [1, 0]
    model = permuted(dense_model(), order)
    return model, observed(model, batched(4)), order


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_units_in_another_order_have_their_scores_in_that_order(name):
    model, statistics, order = permuted_pass()
    plain, reordered = scores_of(name, *plain_pass("dense")), scores_of(name, model, statistics)
    if name == "random":
        jax.tree.map(np.testing.assert_array_equal, reordered, plain)
        return
    for structure in set(STRUCTURES) - set(BY_INDEX.get(name, ())):
        assert_close(reordered, plain, order, (structure,))
    one_a_layer = all(np.ptp(plain[structure], axis=1).max() == 0 for structure in STRUCTURES)
    assert one_a_layer or not nearly_equal(reordered, plain)


@functools.cache
def masked_and_cut():
    """Return a keep-set, and a masked model and the cut one, each with what one pass shows; in double precision."""
    model = dense_model(mlp=24, dtype=np.float64)
    keep = random_keep(existing_units(model.segments), 0.6, seed=1)
    pruned, needs = cut(model, keep), union_of_needs(made(name) for name in NAMES)
    seen, small = observe(model, batched(4), needs, gates=masks(keep)), observe(pruned, batched(4), needs)
    return keep, (model, seen), (pruned, small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in NAMES if name not in ("random", *COMPARING)),
        *COMPARING,
        "taylor_element(within='layer')",
        "activation_frequency(multiple=0.5)",
    ],
)
def test_units_of_a_masked_model_have_the_scores_of_the_cut_one(name, x64):
    """Those that have gone count for nothing where units are compared with each other."""
    keep, masked, pruned = masked_and_cut()
    scores, expected = scores_of(name, *masked), scores_of(name, *pruned)
    compared = scores_of(name, masked[0], masked[1]._replace(gates=None))

    def same(scores, structure: str) -> bool:
        pairs = zip(scores[structure], keep[structure], expected[structure], strict=True)
        return all(np.allclose(row[kept], want[: kept.sum()], rtol=1e-6, atol=1e-12) for row, kept, want in pairs)

    structures = set(STRUCTURES) - set(BY_INDEX.get(name, ()))
    assert all(same(scores, structure) for structure in structures)
    assert all(same(compared, structure) for structure in structures) == (name not in COMPARING), "control"


BATCHINGS = {"smaller batches, padding rows": batched(3), "padding rows and tokens": batched(6, extra=2)}


@functools.cache
def other_pass(batching: str):
    return observed(plain_pass("dense")[0], BATCHINGS[batching])


@pytest.mark.slow
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("name", NAMES)
def test_batches_and_padding_change_nothing(name, batching):
    model, statistics = plain_pass("dense")
    assert_close(scores_of(name, model, other_pass(batching)), scores_of(name, model, statistics))


@functools.cache
def other_text():
    return observed(plain_pass("dense")[0], batched(4, tokens=random_tokens(4, 8, seed=9)))


@pytest.mark.parametrize("name", NAMES)
def test_the_calibration_text_matters(name):
    model, statistics = plain_pass("dense")
    same = nearly_equal(scores_of(name, model, other_text()), scores_of(name, model, statistics))
    assert same == (not make_estimator(name).needs)


@pytest.mark.parametrize("name", [name for name in NAMES if make_estimator(name).needs])
def test_no_statistic_is_used_that_is_not_needed(name):
    """Without its statistics an estimator says which one it misses."""
    model, statistics = plain_pass("dense")
    estimator = make_estimator(name)
    for need in estimator.needs:
        rest = {key: value for key, value in statistics.values.items() if key != need}
        with pytest.raises(ValueError, match=f"statistic {need.name} was not observed"):
            score({name: estimator}, statistics._replace(values=rest), model)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_scores_that_are_not_finite_are_refused(name):
    """The error names the estimator, the layer and the unit."""
    model, statistics = plain_pass("dense")
    model, values = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (model, statistics.values))
    with pytest.raises(ValueError, match=f"estimator {name}: .* not finite, .*layer 0, unit 0"):
        score({name: made(name)}, statistics._replace(values=values), model)


@pytest.mark.slow
def test_estimators_together_equal_each_alone():
    model, statistics = plain_pass("ragged")
    together = score({name: made(name) for name in NAMES}, statistics, model)
    for name in NAMES:
        assert_close(together[name], scores_of(name, model, statistics))
