"""The loss of packed rows is that of each piece alone, of its targets alone; divergence and casts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.recovery.objective import Objective, sums_of, total_of
from saap_jax.recovery.packing import pack
from tests.helpers import dense_model, forward, ragged_model, reference_losses
from tests.recovery.helpers import LENGTH, packed, pieces_of, rows_of

sums = jax.jit(sums_of, static_argnames="objective")
PLAIN = Objective()
PIECES = pieces_of(5, 7, 4, 9)


def loss_of(model, rows, objective=PLAIN, teacher=None) -> float:
    return float(sums(model, teacher, rows, objective).loss)


@pytest.mark.slow
def test_packed_losses_are_those_of_each_piece_alone():
    """Against numpy, one piece at a time: positions restart, no piece sees another, prompts are not predicted."""
    model = ragged_model()
    rows = pack(PIECES, LENGTH)
    assert len(rows.tokens) == 3
    expected = sum(reference_losses(model, piece.tokens)[piece.targets[1:]].sum() for piece in PIECES)
    found = sums(model, None, packed(rows), Objective())
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert int(found.tokens) == sum(piece.targets.sum() for piece in PIECES)
    apart = [loss_of(model, packed(pack([piece], LENGTH))) for piece in PIECES]
    np.testing.assert_allclose(sum(apart), expected, rtol=1e-5)


def test_packing_leaks_nothing():
    """Other tokens in the first piece leave the loss of the second to the last bit; without segments they do not."""
    model, rows = dense_model(), packed(pack(PIECES[:2], LENGTH))
    second = rows._replace(targets=rows.targets & (rows.segments == 2))
    other = second._replace(tokens=jnp.where(rows.segments == 1, (rows.tokens + 1) % 24, rows.tokens))
    assert loss_of(model, other) == loss_of(model, second)
    blind = [each._replace(segments=jnp.ones_like(each.segments)) for each in (second, other)]
    assert abs(loss_of(model, blind[0]) - loss_of(model, blind[1])) > 1e-3
    np.testing.assert_allclose(
        loss_of(model, second), reference_losses(model, PIECES[1].tokens)[PIECES[1].targets[1:]].sum(), rtol=1e-5
    )


def test_padding_and_prompts_have_no_part():
    model, rows = dense_model(), packed(rows_of(5))
    padding = rows._replace(tokens=jnp.where(rows.segments < 0, 7, rows.tokens))
    assert loss_of(model, padding) == loss_of(model, rows)
    rows = packed(rows_of(9))
    prompt = rows._replace(targets=rows.segments > 0)
    losses = reference_losses(model, np.asarray(rows.tokens[0, :9]))
    np.testing.assert_allclose(loss_of(model, prompt), losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss_of(model, rows), losses[2:].sum(), rtol=1e-5)


def test_divergence_by_hand():
    """KL(teacher ‖ student) of the tempered distributions, where a token is predicted."""
    student, teacher = dense_model(seed=0), dense_model(seed=1)
    rows = packed(rows_of(LENGTH))
    objective = Objective(distillation=0.3, temperature=2.0)
    ours, theirs = (
        np.asarray(jax.nn.softmax(forward(each, rows.tokens) / 2.0), np.float64)[0, :-1] for each in (student, teacher)
    )
    expected = (theirs * np.log(theirs / ours)).sum(axis=-1)[np.asarray(rows.targets)[0, 1:]].sum()
    found = sums(student, teacher, rows, objective)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-4)
    np.testing.assert_allclose(total_of(found, objective), 0.7 * found.loss + 0.3 * 4 * found.divergence, rtol=1e-6)
    np.testing.assert_allclose(sums(teacher, teacher, rows, objective).divergence, 0, atol=1e-5)
    assert float(sums(student, None, rows, objective).divergence) == 0


@pytest.mark.slow
def test_distance_of_hidden_states_by_hand():
    """The relative squared error of the stream behind each layer, their mean, where a token is predicted."""
    student, teacher = dense_model(seed=0), dense_model(seed=1)
    rows = packed(rows_of(LENGTH))
    objective = Objective(distillation=0.3, temperature=2.0, hidden=0.25)

    def streams(model):
        _, seen = model.hidden(rows.tokens, observe=lambda point, x: x if point == "mlp_out" else None)
        return np.concatenate([np.asarray(each["mlp_out"], np.float64) for each in seen])[:, 0, :-1]

    own, goal = streams(student), streams(teacher)
    each = ((own - goal) ** 2).sum(-1) / (goal**2).sum(-1)
    expected = each.mean(axis=0)[np.asarray(rows.targets)[0, 1:]].sum()
    found = sums(student, teacher, rows, objective)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-4)
    plain = sums(student, teacher, rows, objective._replace(hidden=0.0))
    assert float(plain.distance) == 0
    for name in ("loss", "divergence"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-6)
    np.testing.assert_allclose(
        total_of(found, objective), total_of(plain, objective) + 0.25 * found.distance, rtol=1e-6
    )
    np.testing.assert_allclose(sums(teacher, teacher, rows, objective).distance, 0, atol=1e-6)
