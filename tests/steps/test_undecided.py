"""Losses, divergences and sums that are not finite choose nothing: one line says whose fault that is."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax import run_chain, score_units
from saap_jax.data.windows import Windows
from saap_jax.llama.model import param
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.chain import parse
from saap_jax.steps.refinement.evolve import Evolve
from saap_jax.steps.refinement.learn import Learn
from saap_jax.steps.refinement.shape import UniformShape
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject
from tests.helpers import dense_model, random_tokens, same
from tests.steps.refined import refined, start_of
from tests.trace.subject.problems import stacked

TOKENS = random_tokens(16, 8, 3)
TEXT = {"web": Windows(TOKENS[:8], np.ones((8, 8), bool)), "code": Windows(TOKENS[8:], np.ones((8, 8), bool))}
BROKEN = slice(9, None), 4
"""Of the text: a token of each window of `code` but the first."""

CHAINS = {
    "perturbation": "perturbation(masks=4) > uniform",
    "block_ablation": "block_ablation > uniform",
    "ablation": "ablation > uniform",
    "attentions": "random > within(max_ratio={attention: 0}) > uniform > attentions(balance=1.0)",
    "evolve": "random > uniform > evolve(generations=2, offspring=4, survivors=(2, 1))",
    "shape": "random > uniform > shape",
    "learn": "random > uniform > learn(3)",
    "scales": "random > uniform > scales(2)",
    "best_of": "best_of(random > uniform, random > global)",
    "least_squares": "random > uniform > least_squares",
    "bias": "random > uniform > bias",
    "layerwise": "random > uniform > layerwise",
}
ASKS = dict.fromkeys(("perturbation", "block_ablation", "ablation"), "calibration")


def broken_model():
    """Return a model whose embedding of one token, which most windows of `code` have, is not finite; and that text."""
    model = dense_model(layers=3, mlp=8, tied=False)
    token = int(TOKENS.max())
    others = np.where(token == TOKENS, 0, TOKENS)
    others[BROKEN] = token
    model.embedding = param(model.embedding.axes, model.embedding[...].at[token].set(jnp.nan))
    masks = np.ones((8, 8), bool)
    return model, {"web": Windows(others[:8], masks), "code": Windows(others[8:], masks)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_nan_weights_choose_nothing(name):
    """The window is named, and the array; on text without that token the chain chooses."""
    model, text = broken_model()
    subject = LlamaSubject(model, name="tiny")
    said = (
        f"{ASKS.get(name, name)}: expected .*finite.*; the model tiny, with all its units, has a loss of nan on "
        "window 1 of code, from 0; its weights are not finite in embedding: load another model"
    )
    with pytest.raises(ValueError, match=said) as caught:
        run_chain(subject, CHAINS[name], text, 0.3, batch_size=2)
    assert "\n" not in str(caught.value)
    assert run_chain(subject, CHAINS[name], {"web": text["web"]}, 0.3, batch_size=2).removed, "control"


@pytest.mark.slow
def test_a_blanked_window_keeps_its_number():
    model, text = broken_model()
    mask = text["code"].mask.copy()
    mask[0] = False
    blanked = text | {"code": text["code"]._replace(mask=mask)}
    with pytest.raises(ValueError, match="a loss of nan on window 1 of code, from 0"):
        run_chain(LlamaSubject(model), "perturbation(masks=4) > uniform", blanked, 0.3, batch_size=2)


@pytest.mark.slow
def test_attentions_do_not_choose_around_a_fault():
    """Without the attention that is not finite the loss is: no reason to remove that one."""
    model = dense_model(layers=3, mlp=8)
    output = model.segments[0].attention.output
    model.segments[0].attention.output = param(output.axes, output[...].at[1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"attentions: .* window 0 of web, .* in segments/0/attention/output"):
        run_chain(LlamaSubject(model), CHAINS["attentions"], TEXT, 0.3, batch_size=2)


@pytest.mark.slow
def test_traced_examples_that_are_not_finite():
    problem = stacked()
    inputs, targets = jax.tree.map(np.asarray, problem.calibration)
    inputs = np.array(inputs, np.float32)
    inputs[3] = np.nan
    chains = {"calibration": "ablation > uniform", "least_squares": "magnitude > uniform > least_squares"}
    for asks, chain in chains.items():
        with pytest.raises(ValueError, match=f"{asks}: expected finite .* a loss of nan on example 3 of own, from 0"):
            run_chain(problem, chain, {"own": (inputs, targets)}, 0.3, batch_size=4)
        assert run_chain(problem, chain, {"own": problem.calibration}, 0.3, batch_size=4).removed, "control"


# --- candidates ------------------------------------------------------------------------------------


STEPS = [Evolve(generations=4, survivors=(1,), microbatches=(1,)), UniformShape(layers=0.5)]


def judged_by(bad):
    """Return an objective by which a keep-set has as many nats as heads and channels of layer 0, but for some."""
    numbers = itertools.count()

    def judge(keep, part=0):
        return bad if next(numbers) % 3 == 0 else float(keep["mlp"][0].sum() + keep["attention"][0].sum())

    return SimpleNamespace(parts=3, judge=judge, value=judge)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_overflowing_candidates_come_last(step, bad):
    subject = LlamaSubject(dense_model("mha", layers=4, mlp=12))
    start = start_of(subject, 0.4, Uniform())
    found, large, low = (refined(subject, start, step, judged_by(each), 0.4) for each in (bad, 1e9, -1e9))
    assert same(dict(found.keep), dict(large.keep))
    assert not same(dict(found.keep), dict(low.keep)), "control"


def test_learn_leaves_out_overflowing_rounds():
    subject = LlamaSubject(dense_model("mha", layers=3, mlp=24))
    start = start_of(subject, 0.4, Uniform())
    told = iter([np.nan, 2.0, 1.0, np.inf])
    slopes = {name: np.random.default_rng(0).normal(size=units.shape) for name, units in subject.existing.items()}
    objective = SimpleNamespace(parts=1, judge=lambda keep: next(told), gradient=lambda gates, part: (1.0, slopes))
    found = refined(subject, start, Learn(3, rate=20.0), objective, 0.4)
    assert not same(dict(found.keep), dict(start.keep)), "the start, which comes first, is NaN"
    objective.judge = lambda keep: np.nan
    with pytest.raises(ValueError, match="expected one of 4 divergences of rounds to be finite"):
        refined(subject, start, Learn(3), objective, 0.4)


@pytest.mark.slow
def test_repairs_that_overflow_are_told(monkeypatch):
    subject = LlamaSubject(dense_model(layers=3, mlp=8), name="tiny")
    runner, chain = Runner(subject, TEXT, passes=Passes(2)), parse("random > uniform > least_squares > scales(2)")
    repaired = LlamaSubject.repaired

    def overflowing(self, *given, **options):
        new, made = repaired(self, *given, **options)
        new.model.segments[0].mlp.down[...] = new.model.segments[0].mlp.down[...] * jnp.inf
        return new, made

    monkeypatch.setattr(LlamaSubject, "repaired", overflowing)
    said = "scales: expected finite divergences, .* model tiny, with all its units, has finite losses on all of the"
    with pytest.raises(ValueError, match=said):
        runner.run(chain, 0.3)


def test_held_out_text_has_to_be_there():
    mask = np.ones((8, 8), bool)
    mask[6:] = False
    subject = LlamaSubject(dense_model(mlp=8))
    with pytest.raises(ValueError, match="divergence: expected real tokens in every 4th microbatch"):
        subject.objective(Windows(TOKENS[:8], mask), 2, subject)
    mask[6] = True
    assert subject.objective(Windows(TOKENS[:8], mask), 2, subject).parts == 3, "control"


def test_random_scores_read_no_text():
    """Nothing is read of the text, so nothing of it decides."""
    model, text = broken_model()
    assert score_units(LlamaSubject(model), text, ["random"]).estimators == ["random"]
