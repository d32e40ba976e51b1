"""Perplexity: exp of the mean token loss, whatever the batches, by one program for all gates."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.evaluation.perplexity import loss_step, window_losses
from saap_jax.llama.segments import existing_units, masks
from saap_jax.surgery.cut import cut
from tests.helpers import changed, dense_model, length_mask, random_keep, random_tokens, reference_losses

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


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = changed(dense_model(), "norm", jnp.zeros_like)
    assert window_losses(model, batched(5)).perplexity == pytest.approx(24, rel=1e-6)


def test_masked_equals_cut():
    model = dense_model(layers=3)
    keep = random_keep(existing_units(model.segments), 0.6, seed=4)
    masked, pruned = window_losses(model, batched(5), masks(keep)), window_losses(cut(model, keep), batched(5))
    np.testing.assert_allclose(masked.sums, pruned.sums, rtol=1e-5)
    assert masked.perplexity != pytest.approx(window_losses(model, batched(5)).perplexity, rel=1e-2)


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
