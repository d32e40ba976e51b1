"""Blended least squares: one end is the plain repair, at the other each sub-block does what it did; a new repair."""

import numpy as np
import pytest

from saap_jax.llama.segments import existing_units
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.surgery.compensation import compensate
from tests.helpers import dense_model, random_keep, random_tokens, relative
from tests.in_sequence import PATHS, entering, matrices, refitted_by_hand, streams

TOKENS = random_tokens(8, 7)
BATCHES = [(TOKENS[at : at + 2], np.ones((2, 7), bool)) for at in range(0, 8, 2)]


@pytest.fixture
def problem(x64):
    model = dense_model(layers=2, mlp=21, dtype=np.float64)
    return model, random_keep(existing_units(model.segments), 0.6, seed=1)


def test_one_end_is_least_squares_and_the_other_the_sub_block_itself(problem):
    model, keep = problem
    options = {"damping": 0.1, "tokens": "equal"}
    one, none, half = (
        matrices(compensate(model, keep, BATCHES, LeastSquares(blend=blend, **options)).model)
        for blend in (1.0, 0.0, 0.5)
    )
    expected = refitted_by_hand(model, keep, TOKENS, 0.1)
    for name in PATHS:
        np.testing.assert_allclose(none[name], expected[name], rtol=1e-6, atol=1e-8)
        assert np.abs(none[name][1] - one[name][1]).max() > 1e-3, "control"
        assert (half[name][1] != one[name][1]).any()


def test_least_squares_defaults_match_numpy(problem):
    """`least_squares` without options, as recipes have it: a blend of 0.3, damping by the text, tokens by weight."""
    model, keep = problem
    mask = np.ones(TOKENS.shape, bool)
    mask[2, 4:] = False
    batches = [(TOKENS[at : at + 2], mask[at : at + 2]) for at in range(0, 8, 2)]
    rows = [row[real] for row, real in zip(TOKENS, mask, strict=True)]
    done = compensate(model, keep, batches, LeastSquares())
    made = matrices(done.model)
    assert [each.damping for each in done.corrections] == pytest.approx(
        [8 * keep[name][layer].sum() * (1 if name == "mlp" else 8) / mask.sum() for layer in range(2) for name in PATHS]
    )
    expected = refitted_by_hand(model, keep, rows, None, blend=0.3, scaled=True)
    wrong = {
        "exchanged": {"blend": 0.7, "scaled": True},
        "alike": {"blend": 0.3, "scaled": False},
        "mean": {"blend": 0.3, "scaled": True, "ridge": "mean"},
    }
    wrong = {how: refitted_by_hand(model, keep, rows, None, **options) for how, options in wrong.items()}
    for name in PATHS:
        np.testing.assert_allclose(made[name], expected[name], rtol=1e-6, atol=1e-8)
        for how, other in wrong.items():
            assert np.abs(made[name][1] - other[name][1]).max() > 1e-4, f"control: {how}"


def test_least_squares_judges_on_every_fourth_batch(problem):
    """Errors of the first sub-block, in front of which nothing is pruned: before, and made from the other batches."""
    model, keep = problem
    correction = compensate(model, keep, BATCHES, LeastSquares()).corrections[0]
    assert correction[:2] == ("attention", 0)

    def errors(held: int) -> list[float]:
        fit = [row for at, row in enumerate(TOKENS) if at // 2 != held]
        new = refitted_by_hand(model, keep, fit, correction.damping, scaled=True)["attention"][0]
        old, walks = matrices(model)["attention"][0], [streams(model, row) for row in TOKENS[2 * held : 2 * held + 2]]
        active = np.concatenate([seen[0]["attention"].reshape(len(stream[0]), -1) for seen, stream in walks])
        behind = np.concatenate([stream[1] for _, stream in walks])
        weights = 1 / (np.mean(behind**2, axis=1) + model.constants.norm_eps)
        target = active @ old
        masked = old * (new != 0)
        missed = [weights @ ((target - active @ each) ** 2).sum(1) for each in (masked, new)]
        return [each / (weights @ (target**2).sum(1)) for each in missed]

    assert correction[3:] == pytest.approx(errors(3), rel=1e-6)
    assert all(correction[3:] != pytest.approx(errors(held), rel=1e-2) for held in (0, 1, 2)), "control"


def test_of_the_first_sub_block_alone_both_targets_are_the_same(problem):
    """Its stream is that of the unpruned model."""
    model, _ = problem
    keep = existing_units(model.segments)
    keep["attention"][1, 0] = False  # nothing before it is pruned
    made = [compensate(model, keep, BATCHES, LeastSquares(blend=blend, damping=0.1)).model for blend in (0.0, 1.0)]
    first, last = (matrices(each)["attention"][1] for each in made)
    np.testing.assert_allclose(first, last, rtol=1e-8, atol=1e-10)
    assert (first != matrices(model)["attention"][1]).any(), "control"


def test_a_ridge_may_be_relative_to_the_mean_of_the_diagonal(problem):
    model, keep = problem
    options = {"blend": 0.0, "damping": 0.3, "tokens": "equal"}
    mean, coordinate = (
        matrices(compensate(model, keep, BATCHES, LeastSquares(**options, ridge=ridge)).model)
        for ridge in ("mean", "coordinate")
    )
    for name, expected in refitted_by_hand(model, keep, TOKENS, 0.3, "mean").items():
        np.testing.assert_allclose(mean[name], expected, rtol=1e-6, atol=1e-8)
        assert np.abs(mean[name] - coordinate[name]).max() > 1e-3, "control"


def test_noise_gives_the_damping(problem):
    """δ = noise · kept inputs / tokens of the text, of each sub-block: 8 of them where nothing is said."""
    model, keep = problem
    for noise, options in ((8.0, {}), (2.0, {"noise": 2.0})):
        done = compensate(model, keep, BATCHES, LeastSquares(**options)).corrections
        assert done
        for each in done:
            own = keep[each.structure]
            inputs = own[each.layer].sum() * matrices(model)[each.structure].shape[1] / own.shape[1]
            assert each.damping == pytest.approx(noise * inputs / TOKENS.size, rel=1e-6)
    with pytest.raises(ValueError, match="expected no damping beside it, which takes its place, got noise 2 and dampi"):
        LeastSquares(noise=2.0, damping=0.1)
    assert LeastSquares(noise=8.0, damping=0.1) == LeastSquares(damping=0.1), "control: as usual"


def test_without_a_ridge_it_is_the_nystrom_refit(problem):
    """(SᵀCS)⁻¹ SᵀC W, C of what the sub-block reads from the pruned stream; what keeps all stays, to the bit."""
    model, keep = problem
    keep["attention"][:] = True
    repair = LeastSquares(blend=0.0, damping=1e-10, tokens="equal", ridge="mean")
    made, old = matrices(compensate(model, keep, BATCHES, repair).model), matrices(model)
    np.testing.assert_array_equal(made["attention"], old["attention"])
    for layer in range(2):
        active = entering(model, keep, layer, "mlp", TOKENS, BATCHES, repair)[:, :, 0]
        moment, kept = active.T @ active, keep["mlp"][layer]
        expected = np.linalg.solve(moment[np.ix_(kept, kept)], moment[kept] @ old["mlp"][layer])
        np.testing.assert_allclose(made["mlp"][layer][kept], expected, rtol=1e-4, atol=1e-6)
    towards = matrices(compensate(model, keep, BATCHES, LeastSquares(damping=0.01, tokens="equal", blend=1.0)).model)
    assert (towards["attention"][1] != old["attention"][1]).any(), "control: ours refits what keeps all"


def test_behind_a_norm_the_target_is_what_the_sub_block_itself_writes(x64):
    """As Gemma has it: on the pruned stream, whatever the blend."""
    model = relative("gemma3_text", dtype=np.float64)
    keep = random_keep(existing_units(model.segments), 0.4, seed=2)
    options = {"damping": 0.1, "tokens": "equal"}
    alone, half, dense = (
        matrices(compensate(model, keep, BATCHES, LeastSquares(**options, **more)).model)
        for more in ({"blend": 0.0}, {"blend": 0.5}, {"propagate": "dense"})
    )
    for name, expected in refitted_by_hand(model, keep, TOKENS, 0.1).items():
        np.testing.assert_allclose(alone[name], expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(half[name], expected, rtol=1e-6, atol=1e-8)
        assert np.abs(dense[name][1] - expected[1]).max() > 1e-3, "control"


@pytest.mark.parametrize("options", [{}, {"blend": 0.0}, {"propagate": "dense"}])
def test_least_squares_replaces_an_earlier_repair(problem, options):
    """Its weights start from the unpruned model, whatever an earlier repair made of them."""
    model, keep = problem
    repair = LeastSquares(damping=0.1, **options)
    earlier = compensate(model, keep, BATCHES, LeastSquares(damping=0.001, ridge="mean")).model
    alone = compensate(model, keep, BATCHES, repair).model
    after = compensate(earlier, keep, BATCHES, repair, dense=model).model
    on_top = compensate(earlier, keep, BATCHES, repair).model
    for name in PATHS:
        np.testing.assert_allclose(matrices(after)[name], matrices(alone)[name], rtol=1e-9, atol=1e-12)
        assert np.abs(matrices(earlier)[name] - matrices(alone)[name]).max() > 1e-3, "control: it did something else"
    assert np.abs(matrices(on_top)["mlp"] - matrices(alone)["mlp"]).max() > 1e-3, "control: from repaired weights"
