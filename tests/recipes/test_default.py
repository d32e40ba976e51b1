"""What `saap prune` does, `fast` and `default`, once more: the choice by plain sorting, the repairs one by one."""

import functools

import numpy as np
import pytest
from scipy.special import log_softmax

from saap_jax.data.windows import Windows, pairs
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import make_estimators
from saap_jax.runtime.progress import Passes
from saap_jax.steps.base import Context, State
from saap_jax.steps.chain import parse
from saap_jax.steps.limits import Within
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.steps.repair.scales import Scales
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from tests.helpers import forward, random_model, random_tokens, same, spec_of
from tests.in_sequence import PATHS, matrices

LAYERS, HEADS, CHANNELS = 12, 2, 60
TOKENS = random_tokens(10, 26, seed=4)
TEXT = Windows(TOKENS, np.ones(TOKENS.shape, bool))
HELD = [4, 9]
"""Every fifth window."""


def masks_by_hand(model) -> list[dict[str, np.ndarray]]:
    """Return the masks between which both recipes choose, at half of the parameters, by sorted scores.

    A head has 192 parameters and a channel 24, all layers 21,888; 10,944 go. First: of 9 layers, since round(1.56) = 2
    in front and round(0.84) = 1 at the end stay. 30 % come from channels, and of the other 20 % a quarter, 1,094, of
    heads: 5.7, so 6 layers lose one. The rest are 408 channels: 46 or 45 of a layer. Second: 38 channels of each layer.
    """
    estimators = make_estimators(["fisher", "leverage", "wanda", "gate_fisher"])
    scores = score(estimators, observe(model, pairs(TEXT, 2), union_of_needs(estimators.values())), model)
    fused = sum(scores[name]["mlp"] / (2 * scores[name]["mlp"].mean()) for name in ("fisher", "leverage", "wanda"))
    first = {"attention": np.ones((LAYERS, HEADS), bool), "mlp": np.ones((LAYERS, CHANNELS), bool)}
    for layer in range(2, 8):
        first["attention"][layer, np.argmin(scores["gate_fisher"]["attention"][layer])] = False
    second = {name: kept.copy() for name, kept in first.items()}
    second["attention"][:] = True
    for layer in range(2, 11):
        first["mlp"][layer, np.argsort(fused[layer])[: 46 if layer < 5 else 45]] = False
    for layer in range(LAYERS):
        second["mlp"][layer, np.argsort(scores["leverage"]["mlp"][layer])[:38]] = False
    return [first, second]


def divergence(model, keep, rows) -> float:
    """Return the mean over tokens of KL(p ‖ p_masked), by numpy from logits."""
    gates = {name: kept.astype(model.embedding.dtype) for name, kept in keep.items()}
    known, own = (log_softmax(np.asarray(forward(model, rows, each), np.float64), axis=-1) for each in (None, gates))
    return float((np.exp(known) * (known - own)).sum(-1).mean())


def pruned(model, name: str) -> State:
    return Runner(LlamaSubject(model), {"text": TEXT}, (), Passes(2)).run(parse(name), 0.5)


@pytest.fixture
def model():
    return random_model(spec_of(*[(HEADS, CHANNELS)] * LAYERS))


@pytest.mark.slow
def test_fast_matches_numpy(model):
    state, ways = pruned(model, "fast"), masks_by_hand(model)
    judged = [divergence(model, keep, TOKENS[HELD]) for keep in ways]
    assert state.metrics["judged"] == pytest.approx(judged, rel=1e-4)
    keep = ways[int(np.argmin(judged))]
    assert same(dict(state.keep), keep)
    made, masked = matrices(state.subject.model), matrices(model)
    expected = matrices(compensate(model, keep, pairs(TEXT, 2), LeastSquares()).model)
    for name in PATHS:
        np.testing.assert_allclose(made[name], expected[name], rtol=1e-4, atol=1e-5)
        assert np.abs(made[name] - masked[name] * (made[name] != 0)).max() > 1e-2, "control: repaired"


@pytest.mark.slow
def test_default_repairs_are_those_one_by_one(model):
    """Least squares on the text and 96 windows that the model writes; then scales, on 64 others alone."""
    state, ways = pruned(model, "default"), masks_by_hand(model)
    judged = [divergence(model, keep, TOKENS[HELD]) for keep in ways]
    keep = ways[int(np.argmin(judged))]
    assert same(dict(state.keep), keep)
    whole = LlamaSubject(model)
    write = functools.partial(whole.continued, TEXT, prompt=12, temperature=1.0)
    first, second = write(96, seed=0), write(64, seed=1)
    assert not np.array_equal(first.tokens[:64], second.tokens), "control: others"
    both = Windows(*(np.concatenate(each) for each in zip(TEXT, first, strict=True)))

    def repaired(text: Windows, on_scales: Windows, rate: float) -> State:
        fitted = whole.with_model(compensate(model, keep, pairs(text, 2), LeastSquares()).model)
        on = Context(dense=whole, scenarios={"text": on_scales}, ratio=0.5, final=0.5, batch_size=2)
        return Scales(12, rate)(State(fitted, keep, Within()), on)

    expected = repaired(both, second, 0.03)
    assert state.metrics["scaled"] == pytest.approx(expected.metrics["scaled"], rel=1e-4)
    found = matrices(state.subject.model)
    for name, own in matrices(expected.subject.model).items():
        np.testing.assert_allclose(found[name], own, rtol=1e-4, atol=1e-5)
    for wrong in (repaired(first, second, 0.03), repaired(both, first, 0.03), repaired(both, second, 0.01)):
        assert wrong.metrics["scaled"] != pytest.approx(expected.metrics["scaled"], rel=1e-2), "control"
