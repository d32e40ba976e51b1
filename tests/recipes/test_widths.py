"""Recipes that say how wide layers become, against the rules of their papers, written out plainly."""

import math

import numpy as np
import pytest

from saap_jax.data.windows import Windows
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.segments import masks
from saap_jax.recipes.registry import RECIPES
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation import attentions as step
from saap_jax.steps.base import Store
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject
from tests.helpers import layers_of, random_model, random_tokens, reference, spec_of
from tests.steps.test_run import Memory

LAYERS, KV_HEADS, CHANNELS = 5, 2, 32
TOKENS = random_tokens(6, 12, seed=1)
MASK = np.ones(TOKENS.shape, bool)


@pytest.fixture(scope="module")
def model():
    return random_model(spec_of(*[(KV_HEADS, CHANNELS)] * LAYERS))


@pytest.fixture(scope="module")
def activations(model):
    """What enters the output matrix of each structure in each layer, `[examples, tokens, units, coordinates]`."""
    seen = [reference(model, row)[1] for row in TOKENS]
    return [{name: np.stack([each[layer][name] for each in seen]).reshape(*TOKENS.shape, count, -1)
             for name, count in (("attention", KV_HEADS), ("mlp", CHANNELS))} for layer in range(LAYERS)]  # fmt: skip


def kept(model, method: str, ratio: float, store: Store = Store()):
    chain, text = parse(method), {"text": Windows(TOKENS, MASK)}
    return Runner(LlamaSubject(model), text, [chain], Passes(1), store=store).choose(chain, ratio).keep


# --- ours, alike ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_homogeneous_leaves_all_layers_alike(ratio):
    """At ratios at which a step of 32 channels of each layer is too much."""
    keep = kept(random_model(spec_of(*[(KV_HEADS, 160)] * LAYERS)), "homogeneous", ratio)
    assert keep["attention"].all()
    (width,) = {*keep["mlp"].sum(1).tolist()}
    assert width % 32 == 0


# --- ZipLM -----------------------------------------------------------------------------------------


def surgeon_errors(weight: np.ndarray, active: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Take out unit after unit, each time the one without which the error of the refitted output is least.

    Returns:
        The order, and after each of 0, 1, … units the error over that of removing everything.
    """
    units, coordinates, embed = weight.shape
    rows, flat = active.reshape(-1, units * coordinates), weight.reshape(-1, embed)
    moment = rows.T @ rows / len(rows)
    system = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))

    def error(gone: list[int]) -> float:
        """min tr((W - W')ᵀ H (W - W')) over W' that is 0 in the rows of what is gone, solved for."""
        stays = ~np.repeat(np.isin(np.arange(units), gone), coordinates)
        new = np.zeros_like(flat)
        if stays.any():
            new[stays] = np.linalg.solve(system[np.ix_(stays, stays)], system[stays] @ flat)
        return float(np.sum((flat - new) * (system @ (flat - new))))

    order: list[int] = []
    errors = [0.0]
    while len(order) < units:
        tries = {unit: error([*order, unit]) for unit in range(units) if unit not in order}
        order.append(min(tries, key=tries.__getitem__))
        errors.append(tries[order[-1]])
    return order, np.array(errors) / errors[-1]


def least_error(places: dict, size: int) -> np.ndarray:
    """Solve by dynamic programming: the least sum of errors when so many parameters or more go, by their number."""
    best = np.full(size + 1, np.inf)
    best[0] = 0.0
    for errors, cost in places.values():
        new = np.full(size + 1, np.inf)
        for count, error in enumerate(errors):
            gone = count * cost
            new[gone:] = np.minimum(new[gone:], best[: size + 1 - gone] + error)
        best = new
    return np.minimum.accumulate(best[::-1])[::-1]


@pytest.mark.slow
def test_ziplm(model, activations):
    """In each sub-block the surgeon's first go, and as many that the sum of relative errors is the least there is."""
    subject = LlamaSubject(model)
    chain = RECIPES["ziplm-no-search"].chain.replace("obs >", "obs(block=1) >")  # one after another, as the reference
    orders, places = {}, {}
    for layer, (weights, seen) in enumerate(zip(layers_of(model), activations, strict=True)):
        for name, matrix in (
            ("attention", weights["attention/output"].reshape(KV_HEADS, -1, 8)),
            ("mlp", weights["mlp/down"][:, None]),
        ):
            orders[name, layer], errors = surgeon_errors(matrix, seen[name])
            places[name, layer] = errors, int(subject.costs[name][layer])
    least = least_error(places, subject.prunable)
    exact = 0
    for ratio in (0.15, 0.3, 0.45, 0.6, 0.75):
        keep, total = kept(model, chain, ratio), 0.0
        for (name, layer), (errors, _) in places.items():
            gone = np.flatnonzero(~keep[name][layer]).tolist()
            assert gone == sorted(orders[name, layer][: len(gone)])
            total += errors[len(gone)]
        dearest = max(np.diff(errors).max() for errors, _ in places.values())
        assert total <= least[math.ceil(ratio * subject.prunable)] + dearest
        exact += math.isclose(total, least[subject.removed(keep)], rel_tol=1e-5)
        other = kept(model, chain.replace("normalize(within=sub_block) > ", ""), ratio)
        assert any((keep[name] != other[name]).any() for name in keep), "control: errors as they are choose others"
    assert exact >= 3, "the optimum of the parameters that went, but where some were given back"


# --- 2SSP ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "attentions"), [(0.1, 0), (0.35, 1), (0.65, 3)])
def test_two_ssp(model, activations, ratio, attentions):
    """Channels of the lowest mean over examples of ‖a_j‖₂ go, as many of each layer; then attentions greedily."""
    subject = LlamaSubject(model)
    mlp, attention = (int(subject.costs[n].sum()) * each.shape[1] for n, each in reversed(subject.existing.items()))
    assert attentions == round(LAYERS * ratio ** (mlp / (1.5 * attention)))
    keep, norms = (
        kept(model, "two-ssp", ratio),
        [np.linalg.norm(seen["mlp"][..., 0], axis=1).mean(0) for seen in activations],
    )
    channels = (ratio * subject.prunable - attentions * attention / LAYERS) / int(subject.costs["mlp"][0])
    counts = (~keep["mlp"]).sum(axis=1)
    assert np.ptp(counts) <= 1
    assert counts.sum() == math.ceil(channels)
    for gone, norm in zip(~keep["mlp"], norms, strict=True):
        assert np.flatnonzero(gone).tolist() == sorted(np.argsort(norm)[: gone.sum()].tolist())
    now = {"attention": np.ones((LAYERS, KV_HEADS), bool), "mlp": keep["mlp"]}
    for _ in range(attentions):
        tries = {}
        for layer in np.flatnonzero(now["attention"].any(axis=1)):
            tried = {"attention": now["attention"] & (np.arange(LAYERS) != layer)[:, None], "mlp": now["mlp"]}
            tries[layer] = window_losses(model, [(TOKENS, MASK)], masks(tried)).mean, tried
        now = min(tries.values(), key=lambda each: each[0])[1]
    np.testing.assert_array_equal(keep["attention"], now["attention"])


@pytest.mark.slow
def test_what_was_killed_between_two_attentions_goes_on(model, monkeypatch):
    store, whole, done = Store(Memory(), "key"), kept(model, "two-ssp", 0.65), []
    judge = step.mean_losses

    def killed(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(judge(*arguments))
        return done[-1]

    monkeypatch.setattr(step, "mean_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        kept(model, "two-ssp", 0.65, store)
    done.pop()  # so that it may judge once more, and no more
    again = kept(model, "two-ssp", 0.65, store)
    assert all((again[name] == whole[name]).all() for name in whole)


@pytest.mark.slow
def test_attentions_are_judged_on_the_first_windows(model, monkeypatch):
    judge, seen = step.mean_losses, []
    monkeypatch.setattr(step, "mean_losses", lambda *given: seen.append(given[1].tokens) or judge(*given))
    kept(model, parse("two-ssp").written.replace("examples=16", "examples=2"), 0.35)
    assert all((tokens == TOKENS[:2]).all() for tokens in seen)
    assert len(seen) == 1
