"""Blended least squares: one end is the plain repair, at the other each sub-block does what it did; a new repair."""

import numpy as np
import pytest

from saap_jax.llama.segments import existing_units
from saap_jax.steps.repair.output import Blended, LeastSquares
from saap_jax.surgery.compensation import compensate
from tests.helpers import changed, dense_model, layers_of, random_keep, random_tokens, reference

TOKENS = random_tokens(8, 7)
BATCHES = [(TOKENS[at : at + 2], np.ones((2, 7), bool)) for at in range(0, 8, 2)]
PATHS = {"attention": "attention/output", "mlp": "mlp/down"}


def matrices(model) -> dict[str, np.ndarray]:
    """Return the output matrices of all layers, `[layers, coordinates, embed]` a structure."""
    return {name: np.stack([layer[path].reshape(-1, 8) for layer in layers_of(model)]) for name, path in PATHS.items()}


def by_hand(model, keep, damping: float) -> dict[str, np.ndarray]:
    """Return output matrices W'[K] = W[K] + (G_KK + δ D)⁻¹ (Σ â (â W)ᵀ - G W) of each sub-block in turn, where a W on
    the pruned stream is the target; activations are those of the other implementation."""
    made = {name: each.copy() for name, each in matrices(model).items()}
    now = model
    for layer in range(2):
        for name, path in PATHS.items():
            seen = np.concatenate([reference(now, row)[1][layer][name] for row in TOKENS])
            active, weight = seen.reshape(len(seen), -1), matrices(model)[name][layer]
            kept = np.repeat(keep[name][layer], len(weight) // keep[name].shape[1])
            gram = active.T @ active
            among, cross = gram[np.ix_(kept, kept)], gram[kept] @ weight
            system = among + damping * np.diag(np.diag(among))
            new = np.zeros_like(weight)
            new[kept] = weight[kept] + np.linalg.solve(system, cross - among @ weight[kept])
            made[name][layer] = new
            now = changed(now, f"segments/0/{path}", lambda value, at=layer, new=new: value.at[at].set(
                new.reshape(value.shape[1:])))  # fmt: skip
    return made


@pytest.fixture
def problem(x64):
    model = dense_model(layers=2, mlp=21, dtype=np.float64)
    return model, random_keep(existing_units(model.segments), 0.6, seed=1)


def test_one_end_is_least_squares_and_the_other_the_sub_block_itself(problem):
    model, keep = problem
    options = {"damping": 0.1, "tokens": "equal"}
    least, one, none, half = (
        matrices(compensate(model, keep, BATCHES, repair).model)
        for repair in (LeastSquares(**options), *(Blended(blend=blend, **options) for blend in (1.0, 0.0, 0.5)))
    )
    expected = by_hand(model, keep, 0.1)
    for name in PATHS:
        np.testing.assert_array_equal(one[name], least[name])
        np.testing.assert_allclose(none[name], expected[name], rtol=1e-6, atol=1e-8)
        assert np.abs(none[name][1] - least[name][1]).max() > 1e-3, "control"
        assert (half[name][1] != least[name][1]).any()


def test_of_the_first_sub_block_alone_both_targets_are_the_same(problem):
    """Its stream is that of the unpruned model."""
    model, _ = problem
    keep = existing_units(model.segments)
    keep["attention"][1, 0] = False  # nothing before it is pruned
    made = [compensate(model, keep, BATCHES, Blended(blend=blend, damping=0.1)).model for blend in (0.0, 1.0)]
    first, last = (matrices(each)["attention"][1] for each in made)
    np.testing.assert_allclose(first, last, rtol=1e-8, atol=1e-10)
    assert (first != matrices(model)["attention"][1]).any(), "control"
