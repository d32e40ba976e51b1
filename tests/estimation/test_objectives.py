"""What is differentiated in place of the loss, against plain gradients of it; what is drawn, against what is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.estimation import objectives
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.objectives import OBJECTIVES, drawn, draws
from saap_jax.estimation.observe import observe
from saap_jax.estimation.registry import make_estimator
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.segments import ones_gates
from saap_jax.runtime.gather import leaves_by_path
from tests.helpers import forward, length_mask, losses_of, random_model, random_tokens, spec_of

TOKENS, MASK = random_tokens(2, 6), length_mask(6, 4, seq=6)


@pytest.fixture(scope="module")
def model():
    return random_model(spec_of((2, 3)))


def numbers(tokens, mask):
    return np.asarray(draws(jnp.asarray(tokens), jnp.asarray(mask)))


def pairs(model, tokens, mask, objective):
    """Return the words of one example whose -log p are added, and those whose are taken off, where there are such."""
    log_p = np.asarray(jax.nn.log_softmax(forward(model, jnp.asarray(tokens[None]))[0], axis=-1), np.float64)
    draw, added, taken = numbers(tokens[None], mask[None])[0], [], []
    for place in range(int(mask.sum()) - 1):
        right, row = int(tokens[place + 1]), log_p[place]
        if objective == "margin":
            added.append(right)
            taken.append(max((word for word in range(len(row)) if word != right), key=lambda word: row[word]))
        else:
            ends = np.cumsum(np.exp(row))
            added.append(int(np.searchsorted(ends, float(draw[place]) * ends[-1], side="right")))
    return added, taken


def shares(model, added, taken) -> np.ndarray:
    """Return how much of each word's log p is in the mean objective of one example, [seq, vocab]."""
    found = np.zeros((TOKENS.shape[1], model.spec.vocab), np.float32)
    for words, sign in ((added, -1), (taken, 1)):
        for place, word in enumerate(words):
            found[place, word] += sign / len(added)
    return found


@jax.jit
def gradient_of(model, gates, tokens, share):
    """Return the gradient of the mean objective of one example."""

    def plain(model, gates):
        return jnp.sum(share * jax.nn.log_softmax(model(tokens[None], gates)[0], axis=-1))

    return jax.grad(plain, argnums=(0, 1))(model, gates)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_gradients_are_those_of_the_objective(model, objective):
    needs = [each.of_objective(objective) for each in (GATE_GRADIENT, WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT)]
    seen = observe(model, [(TOKENS, MASK)], frozenset(needs) | {GATE_GRADIENT})
    ones = ones_gates(model.segments)
    each = []
    for tokens, mask in zip(TOKENS, MASK, strict=True):
        share = shares(model, *pairs(model, tokens, mask, objective))
        each.append(gradient_of(model, ones, jnp.asarray(tokens), jnp.asarray(share)))
    for name, found in seen.of(needs[0]).items():
        np.testing.assert_allclose(found, np.stack([gates[name] for _, gates in each]), atol=2e-6, err_msg=name)
        assert np.abs(found - seen.of(GATE_GRADIENT)[name]).max() > 1e-3  # those of the loss are others
    counts = [int(mask.sum()) - 1 for mask in MASK]
    by_path = [leaves_by_path(weights) for weights, _ in each]
    for path, found in leaves_by_path(seen.of(needs[1])).items():
        if np.ndim(found) > 1:
            mean = sum(count * one[path] for count, one in zip(counts, by_path, strict=True)) / sum(counts)
            np.testing.assert_allclose(found, mean, atol=2e-6, err_msg=path)
            square = sum(one[path] ** 2 for one in by_path) / len(TOKENS)
            if (of_squares := leaves_by_path(seen.of(needs[2]))[path]).ndim > 1:
                np.testing.assert_allclose(of_squares, square, atol=2e-6, err_msg=path)
    np.testing.assert_allclose(seen.losses, losses_of(model, TOKENS, MASK) / np.array(counts, np.float32), rtol=1e-5)


@pytest.mark.slow
def test_what_is_drawn_is_told_by_the_text_alone():
    whole, longer = numbers(TOKENS, MASK), np.pad(TOKENS, ((0, 0), (0, 5)), constant_values=9)
    padded = numbers(longer, np.pad(MASK, ((0, 0), (0, 5))))
    np.testing.assert_array_equal(padded[:, : whole.shape[1]], whole)
    np.testing.assert_array_equal(numbers(TOKENS[1:], MASK[1:]), whole[1:])
    other = TOKENS.copy()
    other[0, 1] += 1
    assert (numbers(other, MASK)[0] != whole[0]).all()
    assert len(np.unique(whole)) == whole.size


@pytest.mark.slow
def test_words_are_drawn_as_the_model_predicts_them():
    """Shares of words over many texts are their probabilities; uniform numbers are uniform."""
    tokens = random_tokens(400, 33)
    found = numbers(tokens, np.ones(tokens.shape, bool))
    counts, _ = np.histogram(found, 20, (0, 1))
    expected = found.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
    logits = jnp.asarray([0.3, -1.0, 2.0, 0.0, -30.0])
    words = np.asarray(drawn(jnp.broadcast_to(logits, (*found.shape, 5)), jnp.asarray(found)))
    shares = np.bincount(words.ravel(), minlength=5) / words.size
    probabilities = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(shares, probabilities, atol=4 * np.sqrt(0.25 / words.size))


@pytest.mark.slow
def test_squares_of_what_is_drawn_are_the_curvature_of_the_divergence(model, monkeypatch):
    """Over evenly spread draws, the mean square of a gate's derivative is the second derivative of KL by that gate."""
    tokens, rows = jnp.asarray(TOKENS[:1, :2]), 1000
    monkeypatch.setattr(
        objectives, "draws", lambda tokens, mask: (jnp.arange(rows, dtype=jnp.float32)[:, None] + 0.5) / rows
    )
    gates = ones_gates(model.segments)
    many, mask = np.repeat(tokens, rows, axis=0), np.ones((rows, 2), bool)
    statistic = GATE_GRADIENT.of_objective("sampled")
    seen = observe(model, [(many, mask)], frozenset({statistic})).of(statistic)
    empirical = observe(model, [(tokens, mask[:1])], frozenset({GATE_GRADIENT})).of(GATE_GRADIENT)
    base = jax.nn.log_softmax(forward(model, tokens, gates)[0, 0])
    for name, found in seen.items():

        def divergence(gate, name=name):
            changed = jax.nn.log_softmax(model(tokens, gates | {name: gate})[0, 0])
            return jnp.sum(jnp.exp(base) * (base - changed))

        size = gates[name].size
        curvature = np.diag(np.asarray(jax.jit(jax.hessian(divergence))(gates[name])).reshape(size, size))
        fisher = np.mean(np.square(found), axis=0).ravel()
        exists = ~np.isnan(fisher) & (curvature != 0)
        np.testing.assert_allclose(fisher[exists], curvature[exists], rtol=0.02)
        assert np.abs(np.square(empirical[name]).ravel()[exists] / curvature[exists] - 1).max() > 0.2


def test_estimators_take_an_objective():
    for name in ("gate_taylor", "gate_fisher", "taylor_vector", "taylor_element", "taylor_element_second", "fisher"):
        plain_one, of_margin = make_estimator(name), make_estimator(f"{name}(objective='margin')")
        assert {need.objective for need in of_margin.needs} == {"margin"}
        assert {need.of_objective("margin") for need in plain_one.needs} == of_margin.needs
        assert make_estimator(f"{name}(objective='loss')").needs == plain_one.needs
    with pytest.raises(ValueError, match="objective"):
        make_estimator("gate_fisher(objective='marge')")
