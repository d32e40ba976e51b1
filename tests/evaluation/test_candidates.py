"""Candidates in batches: the losses of one by one, whatever the batches, resumed to the last bit, by one program."""

import numpy as np
import pytest

from saap_jax.evaluation.candidates import candidate_losses, candidates_step, grouped, keep_digest
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.segments import existing_units, masks
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES
from tests.evaluation.test_perplexity import batched
from tests.helpers import dense_model, length_mask, random_keep

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

    monkeypatch.setattr("saap_jax.evaluation.candidates.candidates_step", counted)
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


@pytest.mark.parametrize(("batches", "at_once", "message"), [([], 2, "one window"), (batched(5), 0, "at least 1")])
def test_refused(batches, at_once, message):
    with pytest.raises(ValueError, match=message):
        list(candidate_losses(MODEL, batches, KEEPS, at_once=at_once))
