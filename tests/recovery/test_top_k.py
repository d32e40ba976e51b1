"""The teacher's likeliest tokens: their divergence against brute force, and what is on disk against the teacher."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import loss
from saap_jax.llama.passes import packed_hidden
from saap_jax.recovery.objective import Objective, TopK, masses_of, sums_of
from saap_jax.recovery.top_k import KeptLogits, keep_top_k, top_k_of
from tests.helpers import VOCAB, changed, dense_model, random_model, spec_of
from tests.recovery.helpers import LENGTH, packed, regular_rows, rows_of

STUDENT, TEACHER = dense_model(seed=0), dense_model(seed=1)
OBJECTIVE = Objective(distillation=0.5, temperature=2.0)
BATCH = packed(rows_of(12, 7, 5, 12))
ROWS = regular_rows(7)
ABOUT = {"dense model": "a", "k": 5}
K = 4
sums = jax.jit(sums_of, static_argnames="objective")


@functools.partial(jax.jit, static_argnames="objective")
def learned(student, teacher, rows, objective=OBJECTIVE):
    """Return the divergence and its gradient by the student's parameters."""
    return jax.value_and_grad(lambda model: sums_of(model, teacher, rows, objective).divergence)(student)


def known(teacher, k, rows=BATCH, objective=OBJECTIVE):
    """Return rows with what is known of the teacher."""
    return rows._replace(top=top_k_of(teacher, rows, k=k, objective=objective))


def brute_force(p, q, indices):
    """Return KL(q ‖ p) of some tokens and one bucket for all others, by probabilities `[..., vocab]`."""
    some = jax.nn.one_hot(indices, VOCAB).sum(axis=-2)

    def buckets(of):
        own = jnp.take_along_axis(of, indices, axis=-1)
        return jnp.concatenate([own, (of * (1 - some)).sum(-1, keepdims=True)], axis=-1)

    return (buckets(q) * jnp.log(buckets(q) / buckets(p))).sum(axis=-1)


def largest(gradient) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))


def same(one, other, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "temperature"), [(K, 2.0), (VOCAB - 1, 1.0)])
def test_the_divergence_of_some_tokens_by_brute_force(k, temperature):
    """Over all rows with the models; its gradient by logits."""
    objective = Objective(distillation=0.5, temperature=temperature)
    rows = known(TEACHER, k, objective=objective)
    logits = [states_to_logits(model, BATCH)[:, :-1] / temperature for model in (STUDENT, TEACHER)]
    order = np.argsort(-np.asarray(logits[1]), axis=-1)
    np.testing.assert_array_equal(rows.top.indices, order[..., :k])
    p, q = map(jax.nn.softmax, logits)
    expected, other = (
        float(jnp.where(BATCH.targets[:, 1:], brute_force(p, q, order[..., :count]), 0).sum()) for count in (k, k - 2)
    )
    np.testing.assert_allclose(sums(STUDENT, None, rows, objective).divergence, expected, rtol=1e-5)
    assert other < expected - 1e-3

    def ours(logits):
        return (jnp.exp(rows.top.masses) * (rows.top.masses - masses_of(logits, rows.top.indices))).sum()

    gradient = jax.grad(ours)(logits[0])
    np.testing.assert_allclose(
        gradient, jax.grad(lambda z: brute_force(jax.nn.softmax(z), q, rows.top.indices).sum())(logits[0]), atol=2e-6
    )
    assert largest(gradient) > 1e-2


states_to_logits = jax.jit(
    lambda model, rows: model.logits(packed_hidden(model, rows.tokens, rows.positions, rows.segments)[0])
)


@pytest.mark.slow
def test_all_tokens_are_the_loss_with_the_teacher_in_memory():
    """Value and gradient; of fewer tokens they are others."""
    expected, wanted = learned(STUDENT, TEACHER, BATCH)
    value, gradient = learned(STUDENT, None, known(TEACHER, VOCAB))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    same(gradient, wanted)
    assert largest(wanted) > 1e-2
    fewer, other = learned(STUDENT, None, known(TEACHER, K))
    assert float(fewer) < 0.99 * float(expected)
    assert largest(jax.tree.map(jnp.subtract, other, wanted)) > 1e-3


@pytest.mark.slow
def test_logits_in_chunks_are_those_at_once(monkeypatch):
    rows = known(TEACHER, K)
    value, gradient = learned(STUDENT, None, rows)
    monkeypatch.setattr(loss, "LOGITS", 3 * len(rows.tokens) * VOCAB * 4)  # three positions: the last chunk is short
    again = jax.jit(lambda model: top_k_of.__wrapped__(model, BATCH, k=K, objective=OBJECTIVE))(TEACHER)
    np.testing.assert_array_equal(again.indices, rows.top.indices)
    np.testing.assert_allclose(again.masses, rows.top.masses, rtol=1e-6)
    found, found_gradient = jax.jit(lambda *given: learned.__wrapped__(*given))(STUDENT, None, rows)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    same(found_gradient, gradient)
    assert largest(gradient) > 1e-2


def test_a_small_rest_is_not_lost():
    """Two tokens with all but 1e-9 of the probability: in float32, 1 - Σ p is 0 or a multiple of 6e-8."""
    logits = np.full((1, 1, VOCAB), -24.0, np.float32)
    logits[..., :2] = 0, 1
    indices = jnp.array([[[1, 0]]])
    found = np.asarray(masses_of(jnp.asarray(logits), indices), np.float64)[0, 0]
    p = np.exp(logits[0, 0].astype(np.float64))
    expected = np.log([p[1] / p.sum(), p[0] / p.sum(), p[2:].sum() / p.sum()])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with np.errstate(divide="ignore"):
        naive = np.log(np.float32(1) - jax.nn.softmax(logits)[0, 0, :2].sum())
    assert not abs(naive - expected[2]) < 0.1


@pytest.mark.slow
def test_no_program_holds_the_logits_of_all_positions(monkeypatch):
    """Of 4,096 words and 8 x 64 positions: 8 MiB."""
    model = random_model(dataclasses.replace(spec_of((2, 3)), vocab=4096))
    rows = packed(regular_rows(8, length=64))
    shapes = [jax.ShapeDtypeStruct((8, 63, count), dtype) for count, dtype in ((K, jnp.int32), (K + 1, jnp.float32))]
    taught = rows._replace(top=TopK(*shapes))

    def held():
        programs = (
            jax.jit(lambda *given: learned.__wrapped__(*given)).lower(model, None, taught),
            jax.jit(lambda *given: top_k_of.__wrapped__(*given, k=K, objective=OBJECTIVE)).lower(model, rows),
        )
        return [each.compile().memory_analysis().temp_size_in_bytes for each in programs]

    whole = held()
    monkeypatch.setattr(loss, "LOGITS", 2**19)
    for before, after in zip(whole, held(), strict=True):
        assert before > 8 * 2**20
        assert after < 0.5 * before


# --- on disk -------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """Five of seven rows, two at a time."""
    return KeptLogits(tmp_path / "top", np.array([0, 2, 3, 5, 6], np.int32), LENGTH - 1, k=5, vocab=VOCAB, batch=2)


def keep(kept, *, teacher=TEACHER, about=None) -> int:
    return keep_top_k(kept, teacher, ROWS, OBJECTIVE, about or ABOUT)


@pytest.mark.slow
@pytest.mark.parametrize("k", [5, VOCAB])
def test_rows_come_back_as_the_teacher_has_them(k, kept):
    """In any order, twice too; padding is any row. All tokens need no bucket for others."""
    kept = kept._replace(k=k)
    assert keep(kept) == 5 * LENGTH
    indices, masses = kept.of(np.array([6, 0, 5, 0, -1]))
    top = top_k_of(TEACHER, packed(ROWS), k=k, objective=OBJECTIVE)
    np.testing.assert_array_equal(indices[:4], top.indices[np.array([6, 0, 5, 0])])
    np.testing.assert_allclose(masses[:4], top.masses[np.array([6, 0, 5, 0])], rtol=1e-5)
    assert (indices.dtype, masses.dtype, masses.shape) == (np.int32, np.float32, (5, LENGTH - 1, min(k + 1, VOCAB)))
    assert (indices[0] != indices[1]).any()
    np.testing.assert_allclose(np.exp(masses).sum(axis=-1), 1, rtol=1e-5)
    assert sum(path.stat().st_size - 128 for path in kept.directory.glob("*.npy")) == kept.nbytes


def test_what_is_there_is_not_made_again_and_what_is_of_something_else_is_refused(kept):
    keep(kept)
    whole = {path.name: path.read_bytes() for path in kept.directory.iterdir()}
    assert keep(kept) == 0
    with pytest.raises(ValueError, match="of something else: dense model a -> b; remove the directory"):
        keep(kept, about=ABOUT | {"dense model": "b"})
    (kept.directory / "about.json").unlink()  # as after a kill
    (kept.directory / ".masses.npy.partial").write_bytes(b"torn")
    assert keep(kept) == 5 * LENGTH
    assert {path.name: path.read_bytes() for path in kept.directory.iterdir()} == whole


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(b""), "indices.npy: expected the dense model's likeliest tokens .*remove"),
        (lambda path: os.truncate(path, 200), "indices.npy: expected the dense model's likeliest tokens .*remove"),
        (lambda path: np.save(path, np.zeros((2, LENGTH - 1, 5), np.int32)), r"int32 of shape \(2, 11, 5\), not"),
        (lambda path: np.save(path, np.full((5, LENGTH - 1, 5), VOCAB, np.int32)), "beyond a vocabulary"),
    ],
)
def test_damage_is_said_when_it_is_read(harm, message, kept):
    keep(kept)
    harm(kept.directory / "indices.npy")
    with pytest.raises(ValueError, match=message):
        kept.of(np.array([0, 3]))


def test_a_broken_teacher_is_named_and_nothing_of_it_kept(kept):
    broken = changed(TEACHER, "segments/0/mlp/down", lambda x: x.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="of the dense model, got others on row 0 .*in segments/0/mlp/down"):
        keep(kept, teacher=broken)
    assert not (kept.directory / "about.json").exists()
