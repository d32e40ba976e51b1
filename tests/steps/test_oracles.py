"""Scores from passes with units masked, against losses of the masked model and regressions solved another way."""

import numpy as np
import pytest

from saap_jax.data.windows import Windows
from saap_jax.evaluation.perplexity import WindowLosses, window_losses
from saap_jax.llama.segments import masks
from saap_jax.runtime.progress import Passes
from saap_jax.steps.score.calibrate import calibrate
from saap_jax.steps.score.oracles import make_oracle
from saap_jax.steps.score.score import Score
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import LlamaSubject
from tests.helpers import length_mask, random_model, random_tokens, spec_of

TOKENS, MASK = random_tokens(4, 7), length_mask(7, 5, 7, 6, seq=7)
WINDOWS = Windows(TOKENS, MASK)


@pytest.fixture(scope="module")
def subject():
    return LlamaSubject(random_model(spec_of((2, 6), (2, 4), (0, 5))))


def scored(subject, *names, text=WINDOWS, **options):
    return calibrate(subject, {"text": text}, {name: Score(name) for name in names}, **options)


def loss(subject, keep) -> float:
    return window_losses(subject.model, [(TOKENS, MASK)], masks(keep)).mean


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sub_block", "layer"])
@pytest.mark.parametrize("pruned", [False, True])
def test_blocks_are_removed_one_by_one(subject, granularity, pruned):
    """Also of a model that is pruned already: what is gone stays gone and has no score."""
    keep = {name: units.copy() for name, units in subject.existing.items()}
    if pruned:
        keep["mlp"][0], keep["attention"][1, 0] = False, False
    name = f"block_ablation(granularity='{granularity}')"
    scores = scored(subject, name, keep=keep if pruned else None).scores(name)
    for name in ("attention", "mlp"):
        for layer in range(3):
            there = keep[name][layer]
            assert np.isnan(scores[name][layer][~there]).all()
            if not there.any():
                continue
            without = {n: units.copy() for n, units in keep.items()}
            for other in ("attention", "mlp") if granularity == "layer" else (name,):
                without[other][layer] = False
            np.testing.assert_allclose(
                scores[name][layer][there], loss(subject, without) - loss(subject, keep), atol=2e-6
            )


@pytest.mark.slow
def test_an_oracle_scores_one_structure_and_an_estimator_the_other(subject):
    both = scored(subject, "block_ablation/wanda", "block_ablation", "wanda")
    mixed = both.scores("block_ablation/wanda")
    np.testing.assert_array_equal(mixed["attention"], both.scores("block_ablation")["attention"])
    np.testing.assert_array_equal(mixed["mlp"], both.scores("wanda")["mlp"])


@pytest.mark.slow
def test_the_exact_changes_can_be_fused(subject):
    made = scored(subject, "ablation", "ablation/wanda+magnitude")
    np.testing.assert_array_equal(
        made.scores("ablation/wanda+magnitude")["attention"], made.scores("ablation")["attention"]
    )


class Linear(Subject):
    """A subject whose loss is linear in its masks, and that has nothing else."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        self.existing = {"attention": np.ones((3, 2), bool), "mlp": np.ones((3, 10), bool)}
        self.effects = {name: random.random(units.shape) for name, units in self.existing.items()}
        self.seen: list = []

    def losses(self, examples, keeps, *, batch_size, at_once, progress):
        self.seen += keeps
        for number, keep in enumerate(keeps):
            value = 3 + sum(float(effect[~keep[name]].sum()) for name, effect in self.effects.items())
            yield {number: WindowLosses(np.array([value]), np.array([1]))}


Linear.__abstractmethods__ = frozenset()


def test_regression_on_random_masks_finds_linear_effects():
    subject = Linear()
    oracle = make_oracle("perturbation(masks=400, share=0.3, ridge=1e-6)")
    found = oracle(subject, None, None, Passes())
    for name, effect in subject.effects.items():
        centred = effect - effect.mean(axis=1, keepdims=True)  # each layer loses as many units in every mask
        np.testing.assert_allclose(found[name] - found[name].mean(axis=1, keepdims=True), centred, atol=1e-3)
    for keep in subject.seen:
        assert {int(row.sum()) for row in keep["mlp"]} == {7}
        assert {int(row.sum()) for row in keep["attention"]} == {1}


def test_the_ridge_is_that_of_the_primal_problem():
    """With few masks: (Xᵀ X + r t I) β = Xᵀ y, of masks that were drawn."""
    subject = Linear()
    found = make_oracle("perturbation(masks=8, share=0.3, ridge=0.5)")(subject, None, None, Passes())
    x = np.array([np.concatenate([(~each).ravel() for each in keep.values()]) for keep in subject.seen], float)
    y = x @ np.concatenate([each.ravel() for each in subject.effects.values()])
    x, y = x - x.mean(0), y - y.mean()
    penalty = 0.5 * np.trace(x @ x.T) / len(x)
    np.testing.assert_allclose(
        np.concatenate([each.ravel() for each in found.values()]),
        np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y), rtol=1e-8, atol=1e-10,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["ablation(examples={})", "block_ablation(examples={})", "perturbation(masks=4, examples={})"]
)
def test_the_first_examples_suffice_if_asked(subject, spec):
    first, whole = Windows(TOKENS[:2], MASK[:2]), Windows(TOKENS, MASK)
    few, alone, every = (
        scored(subject, spec.format(count), text=text).scores(spec.format(count))
        for count, text in ((2, whole), (9, first), (9, whole))
    )
    for name, scores in few.items():
        np.testing.assert_array_equal(scores, alone[name])
        assert not np.array_equal(scores, every[name], equal_nan=True)
