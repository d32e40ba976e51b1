"""Units chosen layer by layer: each place by plain formulas on activations of the model as pruned up to there."""

import jax
import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.llama.segments import existing_units
from saap_jax.steps.repair.output import Bias, LeastSquares
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.corrections import Walk
from saap_jax.surgery.sequence import chosen_in_sequence
from saap_jax.types import STRUCTURES
from tests.helpers import layers_of, random_keep, random_model, random_tokens, reference, spec_of
from tests.in_sequence import entering, surgeon_order, swapped_by_hand

LAYERS, KV_HEADS, CHANNELS, EMBED = 3, 3, 10, 8
TOKENS = random_tokens(8, 9)
BATCHES = [(TOKENS[at : at + 2], np.ones((2, 9), bool)) for at in range(0, 8, 2)]
LEAST = LeastSquares(damping=0.1, tokens="equal")


@pytest.fixture(scope="module")
def model():
    return random_model(spec_of(*[(KV_HEADS, CHANNELS)] * LAYERS))


def plain_scores(rule: str, weight: np.ndarray, active: np.ndarray, count: int) -> np.ndarray:
    """Score units by the formula, written out; for `obs` by the place in the surgeon's order, for swaps 1 or 0."""
    rows = active.reshape(len(active), -1)
    moment = rows.T @ rows / len(rows)
    if rule == "wanda":
        return (np.abs(weight).sum(2) * np.sqrt(np.diag(moment)).reshape(weight.shape[:2])).sum(1)
    ridge = 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
    if rule == "leverage":
        return np.diag(moment @ np.linalg.inv(moment + ridge)).reshape(weight.shape[:2]).sum(1)
    order = surgeon_order(weight, active, 16)
    if rule == "obs_swaps":
        kept = swapped_by_hand(weight, moment, float(ridge[0, 0]), set(order[len(order) - count :]))
        return np.isin(np.arange(len(weight)), sorted(kept)).astype(float)
    return np.argsort(order).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["wanda", "obs", "obs_swaps", "leverage"])
@pytest.mark.parametrize("repair", [None, LEAST], ids=["none", "least_squares"])
def test_each_layer_is_chosen_behind_those_that_were_pruned(rule, repair, x64):
    wide = random_model(spec_of(*[(KV_HEADS, CHANNELS)] * LAYERS), dtype=np.float64)
    asked = random_keep(existing_units(wide.segments), 0.4)
    keep, made = chosen_in_sequence(wide, asked, BATCHES, rule, Walk(repair, equal=True))
    if repair is not None:  # what was corrected on the way is what the repair makes of the outcome
        alone = compensate(wide, keep, BATCHES, repair)
        for own, other in zip(jax.tree.leaves(made.model), jax.tree.leaves(alone.model), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-8, atol=1e-10)
        assert [each[:3] for each in made.corrections] == [each[:3] for each in alone.corrections]
    for name in STRUCTURES:
        np.testing.assert_array_equal(keep[name].sum(1), asked[name].sum(1))
    for layer in range(LAYERS):
        for name, path in (("attention", "attention/output"), ("mlp", "mlp/down")):
            count = int(asked[name][layer].sum())
            if count == keep[name].shape[1]:
                continue
            active = entering(wide, keep, layer, name, TOKENS, BATCHES, repair)
            weight = layers_of(wide)[layer][path].reshape(keep[name].shape[1], -1, EMBED)
            scores = plain_scores(rule, weight, active, count)
            expected = np.sort(np.argsort(-scores, kind="stable")[:count])
            np.testing.assert_array_equal(np.flatnonzero(keep[name][layer]), expected, err_msg=f"{name} {layer}")


@pytest.mark.slow
def test_it_differs_from_choosing_on_the_whole_model(model):
    """Negative control: behind what was removed, other units are the lowest."""
    asked = random_keep(existing_units(model.segments), 0.5)
    keep, made = chosen_in_sequence(model, asked, BATCHES, "wanda", Walk(equal=True))
    assert made is None
    whole = {}
    for name, path in (("attention", "attention/output"), ("mlp", "mlp/down")):
        whole[name] = np.zeros_like(asked[name])
        for layer in range(LAYERS):
            seen = np.concatenate([reference(model, row)[1][layer][name] for row in TOKENS])
            active = seen.reshape(len(seen), seen.shape[1], -1)
            weight = layers_of(model)[layer][path].reshape(asked[name].shape[1], -1, EMBED)
            count = int(asked[name][layer].sum())
            first = np.argsort(-plain_scores("wanda", weight, active, count))[:count]
            whole[name][layer, first] = True
    assert any((keep[name] != whole[name]).any() for name in STRUCTURES)
    np.testing.assert_array_equal(keep["attention"][0], whole["attention"][0])


def test_what_was_repaired_on_the_way_is_not_repaired_again(model, monkeypatch):
    text, seen = Windows(TOKENS, np.ones(TOKENS.shape, bool)), []
    monkeypatch.setattr(
        LlamaSubject, "repaired", lambda subject, *given, **options: seen.append(given) or (subject, [])
    )
    for then, count in {
        "layerwise(wanda) > least_squares": 0,
        "layerwise(wanda, tokens=equal) > least_squares": 1,
        "layerwise(wanda) > shape > least_squares": 1,
        "layerwise(wanda) > scales(1) > least_squares": 1,
        "layerwise(wanda) > bias > least_squares": 1,
    }.items():
        seen.clear()
        saap_jax.run_chain(LlamaSubject(model), f"random > uniform > {then}", text, 0.4, batch_size=2)
        assert len(seen) == count, then


def test_the_step_keeps_the_budget_and_chooses_again(model):
    subject, text = LlamaSubject(model), Windows(TOKENS, np.ones(TOKENS.shape, bool))
    for ratio in (0.2, 0.4):
        plain, again, repaired = (
            saap_jax.run_chain(subject, f"random > global{then}", text, ratio, batch_size=2).keep
            for then in ("", " > layerwise(wanda, tokens=equal)", " > layerwise(wanda) > bias(tokens=equal)")
        )
        assert subject.removed(again) == subject.removed(plain)
        assert any((again[name] != plain[name]).any() for name in STRUCTURES)
        for keep, repair in ((again, None), (repaired, Bias(tokens="equal"))):
            expected, _ = chosen_in_sequence(model, plain, BATCHES, "wanda", Walk(repair, equal=True))
            for name in STRUCTURES:
                np.testing.assert_array_equal(keep[name], expected[name])


def test_what_cannot_be_done_is_refused(model):
    keep = existing_units(model.segments)
    with pytest.raises(ValueError, match="keep: expected attention and mlp alone, got query_heads too"):
        chosen_in_sequence(model, {**keep, "query_heads": np.ones((LAYERS, 2 * KV_HEADS), bool)}, BATCHES, "obs")
