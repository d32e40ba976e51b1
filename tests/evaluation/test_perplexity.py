"""Perplexity: exp of the mean token loss, whatever the batches, by one program for all gates.

Candidates in batches: the losses of one by one, whatever the batches, resumed to the last bit, by one program.
"""

import numpy as np
import pytest

from saap_jax.evaluation.perplexity import (
    candidate_losses,
    candidates_step,
    grouped,
    keep_digest,
    loss_step,
    window_losses,
)
from saap_jax.llama.segments import existing_units, masks
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, random_keep, random_tokens, reference_losses

TOKENS = random_tokens(5, 8)
FULL = np.ones((5, 8), bool)


def batched(size: int, tokens=TOKENS, mask=FULL) -> list[tuple[np.ndarray, np.ndarray]]:
    pad = ((0, -len(tokens) % size), (0, 0))
    tokens, mask = np.pad(tokens, pad), np.pad(mask, pad)
    return [(tokens[i : i + size], mask[i : i + size]) for i in range(0, len(tokens), size)]


def test_perplexity_equals_numpy():
    model = dense_model()
    losses = np.stack([reference_losses(model, row) for row in TOKENS])
    measured = window_losses(model, batched(5))
    np.testing.assert_allclose(measured.sums, losses.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(measured.counts, [7] * 5)
    assert measured.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert window_losses(model, batched(5, TOKENS[:, ::-1])).perplexity != pytest.approx(
        np.exp(losses.mean()), rel=1e-2
    )


def test_perplexity_weighs_tokens_not_windows():
    model, mask = dense_model(), length_mask(8, 3, 8, 5, 2, seq=8)
    losses = [reference_losses(model, row[:length]) for row, length in zip(TOKENS, mask.sum(axis=1), strict=True)]
    measured = window_losses(model, batched(2, mask=mask))
    np.testing.assert_array_equal(measured.counts, [7, 2, 7, 4, 1])
    assert measured.perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-5)
    assert measured.perplexity != pytest.approx(np.exp(np.mean([loss.mean() for loss in losses])), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batch_size_and_padding_rows_change_nothing(size):
    model = dense_model()
    whole, other = window_losses(model, batched(5)), window_losses(model, batched(size))
    np.testing.assert_allclose(other.sums, whole.sums, rtol=1e-6)
    np.testing.assert_array_equal(other.counts, whole.counts)
    assert other.sums.dtype == np.float64


def test_one_compilation_for_all_candidates():
    model = dense_model(mlp=7)
    before = loss_step._cache_size()
    dense = window_losses(model, batched(2)).perplexity
    for seed in range(3):
        keep = random_keep(existing_units(model.segments), 0.7, seed)
        assert window_losses(model, batched(2), masks(keep)).perplexity != dense
    assert loss_step._cache_size() == before + 1
    window_losses(cut(model, keep), batched(2))
    assert loss_step._cache_size() == before + 2


# --- candidates ------------------------------------------------------------------------------------

MODEL = dense_model(layers=4)
EXISTING = existing_units(MODEL.segments)


def pruned_from(layer: int, seed: int) -> dict[str, np.ndarray]:
    """Return a keep-set that leaves the layers in front of `layer` whole."""
    keep = random_keep(EXISTING, 0.6, seed)
    return {n: np.where(np.arange(4)[:, None] < layer, EXISTING[n], keep[n]) for n in STRUCTURES}


KEEPS = [pruned_from(layer, seed) for seed, layer in enumerate((2, 0, 4, 1, 3, 0, 2))]


def all_losses(batches, keeps=KEEPS, model=MODEL, **options) -> dict[int, np.ndarray]:
    found = {}
    for group in candidate_losses(model, batches, keeps, **options):
        assert not set(group) & set(found)
        found |= {number: losses.sums for number, losses in group.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("model", [MODEL, cut(MODEL, pruned_from(2, 9))], ids=["dense", "cut"])
def test_equal_to_one_by_one(model, at_once):
    existing = existing_units(model.segments)
    keeps = [{n: keep[n][:, : existing[n].shape[1]] & existing[n] for n in STRUCTURES} for keep in KEEPS]
    batches = batched(2, mask=length_mask(8, 3, 8, 5, 2, seq=8))
    found = all_losses(batches, keeps, model, at_once=at_once)
    assert sorted(found) == list(range(7))
    for number, keep in enumerate(keeps):
        alone = window_losses(model, batches, masks(keep))
        np.testing.assert_allclose(found[number], alone.sums, rtol=2e-6)
    assert not np.allclose(found[0], found[1], rtol=1e-3)


def test_counts_leave_padding_out():
    (first, *_) = candidate_losses(MODEL, batched(2, mask=length_mask(8, 3, 8, 5, 2, seq=8)), KEEPS)
    np.testing.assert_array_equal(first[0].counts, [7, 2, 7, 4, 1])


def test_taken_up_again_to_the_last_bit():
    """What is done does not change the groups: the same numbers, and only groups with something missing are run."""
    batches, ran = batched(2), []
    whole = all_losses(batches, at_once=3)

    def note(groups):
        ran.extend(groups)
        return iter(groups)

    again = all_losses(batches, at_once=3, done={0, 2, 4}, progress=note)
    assert [step.batch for step in ran] == [0, 1, 2] * 2
    for number, sums in again.items():
        np.testing.assert_array_equal(sums, whole[number])


@pytest.mark.slow
def test_one_program_for_all():
    model = dense_model(mlp=7)
    keeps = [random_keep(existing_units(model.segments), 0.7, seed) for seed in range(7)]
    before = candidates_step._cache_size()
    found = all_losses(batched(2), keeps, model, at_once=3)
    assert len(found) == 7
    assert candidates_step._cache_size() == before + 1
    all_losses(batched(2), keeps, model, at_once=2)
    assert candidates_step._cache_size() == before + 2


def without(base, layer: int):
    return {name: units & (np.arange(4) != layer)[:, None] for name, units in base.items()}


def test_groups_share_what_they_have_in_common():
    """Whole layers, and layers that are pruned alike, as of blocks that are tried one by one."""
    groups = grouped(KEEPS, EXISTING, 3)
    assert [group.members for group in groups] == [(0, 2, 4), (6, 3, 1), (5,)]
    assert [group.common for group in groups] == [2, 0, 4]
    base = without(EXISTING, 0)
    tries = [base, *(without(base, layer) for layer in (1, 2, 3))]
    assert grouped(tries, EXISTING, 2) == [((0, 3), 3), ((2, 1), 1)]
    assert not grouped([], EXISTING, 2)


def test_layers_in_common_run_once(monkeypatch):
    """What differs only in the last layers is computed from the stream that all have in front of them."""
    ran, steps = [], candidates_step

    def counted(model, shared, gates, common, *inputs):
        ran.append(int(common))
        return steps(model, shared, gates, common, *inputs)

    monkeypatch.setattr("saap_jax.evaluation.perplexity.candidates_step", counted)
    base = without(EXISTING, 0)
    tries = [base, *(without(base, layer) for layer in (1, 2, 3))]
    batches = batched(5)
    found = all_losses(batches, tries, at_once=2)
    assert ran == [3, 1]
    for number, keep in enumerate(tries):
        np.testing.assert_allclose(found[number], window_losses(MODEL, batches, masks(keep)).sums, rtol=2e-6)


def test_digests_differ_where_keep_sets_do():
    other = {name: kept.copy() for name, kept in KEEPS[0].items()}
    assert keep_digest(other) == keep_digest(KEEPS[0])
    other["mlp"][3, 0] ^= True
    assert keep_digest(other) != keep_digest(KEEPS[0])
    assert keep_digest({"attention": KEEPS[0]["attention"], "mlp": KEEPS[0]["mlp"][:, :-1]}) != keep_digest(KEEPS[0])
