"""Pruning with query heads first: what goes, against direct ablation; exact budgets; what composes; `saap prune`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import calibrate
from saap_jax.cli import main
from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import (
    CalibrationConfig,
    CompensationConfig,
    ModelConfig,
    PerStructure,
    QueryHeadsConfig,
    SearchConfig,
)
from saap_jax.config.use import EvaluateConfig
from saap_jax.data import Windows, pairs
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.estimation.ablation import Unit, ablate
from saap_jax.jobs import chosen as selection
from saap_jax.jobs import prune
from saap_jax.jobs.evaluate import evaluate
from saap_jax.jobs.query_stage import remove_query_heads
from saap_jax.llama import load_keep, load_model
from saap_jax.llama.segments import existing_query_heads, existing_units, masks, ones_gates
from saap_jax.llama.ungroup import ungrouped
from saap_jax.runtime.progress import quiet
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.counting import kept_parameters
from saap_jax.surgery.cut import cut
from saap_jax.types import QUERY_HEADS, STRUCTURES
from tests.helpers import changed, forward, length_mask, losses_of, random_model, random_tokens, spec_of

pytestmark = pytest.mark.slow
"""An option of one command; what it is made of is in the default suite (`test_query_heads`)."""

WINDOWS = Windows(random_tokens(8, 12), length_mask(12, 9, 12, 12, 7, 12, 12, 10, seq=12))
CALIBRATION = CalibrationConfig(examples=8, length=12, batch_size=4)
SCENARIOS = {"calibration": WINDOWS}
WEAK = {0: (1, 3), 2: (0, 4)}
"""Layer -> the query head of each KV head that hardly writes anything."""


def model_of(weak: bool = False, **options):
    """Return a model of three layers, two KV heads of three query heads each; `weak` ones if asked for."""
    model = random_model(spec_of(*[(2, 20)] * 3, q_per_kv=3), **options)
    if weak:
        scale = np.ones((3, 6))
        for layer, heads in WEAK.items():
            scale[layer, list(heads)] = 1e-3
        factor = jnp.asarray(scale.reshape(3, 2, 3, 1, 1), model.embedding.dtype)
        model = changed(model, "runs/0/attention/output", lambda value: value * factor)
    return model


def chosen(model, ratio: float, search: SearchConfig, share: float, estimator: str = "gate_fisher", min_keep: int = 1):
    heads = QueryHeadsConfig(share=share, min_keep=min_keep)
    config = PruneConfig(ratio=ratio, estimator=estimator, search=search, query_heads=heads)
    return selection.chosen_units(config, LlamaSubject(model), SCENARIOS, CALIBRATION, quiet)


def first_stage(model, ratio: float, search: SearchConfig, share: float, estimator: str = "gate_fisher"):
    heads = QueryHeadsConfig(share=share)
    return remove_query_heads(LlamaSubject(model), SCENARIOS, estimator, ratio, search, heads, batch_size=4)


def removed_heads(heads: np.ndarray) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(np.flatnonzero(~row).tolist()) for layer, row in enumerate(heads) if not row.all()}


def direct_ablation(model) -> np.ndarray:
    """Return the change of the loss a token without each query head, by one forward pass each."""
    tokens, mask = jnp.asarray(WINDOWS.tokens), jnp.asarray(WINDOWS.mask)
    ones, heads = ones_gates(model.runs), np.ones((3, 6), np.float32)
    dense, changes = float(losses_of(model, tokens, mask, ones | {QUERY_HEADS: heads}).sum()), np.zeros((3, 6))
    for layer, head in np.ndindex(3, 6):
        gate = heads.copy()
        gate[layer, head] = 0
        changes[layer, head] = float(losses_of(model, tokens, mask, ones | {QUERY_HEADS: jnp.asarray(gate)}).sum())
    return (changes - dense) / WINDOWS.mask[:, 1:].sum()


def test_the_oracle_on_the_ungrouped_model_is_direct_ablation(x64):
    model = model_of(dtype=np.float64)
    direct = direct_ablation(model)
    units = [Unit("attention", layer, head) for layer, head in np.ndindex(3, 6)]
    found = ablate(ungrouped(model), pairs(WINDOWS, 4), units)
    np.testing.assert_allclose(direct, np.array([found[u] for u in units]).reshape(3, 6), rtol=0, atol=1e-8)
    assert np.abs(direct).max() > 1e-3


@pytest.mark.parametrize(
    "estimator",
    ["gate_fisher", "gate_taylor", "taylor_element", "taylor_vector", "fisher", "wanda", "fluctuation", "saap"],
)
def test_what_goes_is_what_direct_ablation_ranks_lowest(estimator):
    model = model_of(weak=True)
    change = np.abs(direct_ablation(model)).reshape(3, 2, 3)
    lowest = {layer: tuple(np.add(change[layer].argmin(axis=1), (0, 3)).tolist()) for layer in range(3)}
    assert {layer: lowest[layer] for layer in WEAK} == WEAK
    assert change.min(axis=2)[1].min() > 10 * max(change.min(axis=2)[layer].max() for layer in WEAK)
    block, whole = 2 * 2 * 4 * 8, prunable_parameters(discover(model))
    first = first_stage(model, 2 * block / whole, SearchConfig(), 1.0, estimator)
    assert removed_heads(first.keep[QUERY_HEADS]) == WEAK
    assert first.rest == 0
    strong = first_stage(model_of(), 2 * block / whole, SearchConfig(), 1.0, estimator)
    assert removed_heads(strong.keep[QUERY_HEADS]) != WEAK


def test_heads_in_another_order_give_the_same_model(x64):
    model, order = model_of(dtype=np.float64), np.array([2, 0, 1])
    permuted = changed(model, "runs/0/attention/query", lambda value: value[:, :, :, order])
    permuted = changed(permuted, "runs/0/attention/output", lambda value: value[:, :, order])
    one, two = (chosen(each, 0.3, SearchConfig(allocation="global"), 0.4) for each in (model, permuted))
    heads = one.keep[QUERY_HEADS].reshape(3, 2, 3)
    np.testing.assert_array_equal(two.keep[QUERY_HEADS].reshape(3, 2, 3), heads[:, :, order])
    assert (heads[:, :, order] != heads).any()
    tokens = jnp.asarray(WINDOWS.tokens)
    same = [forward(cut(m, s.keep), tokens) for m, s in ((model, one), (permuted, two))]
    np.testing.assert_allclose(*same, rtol=0, atol=1e-10)


COMPOSED = {
    "uniform": SearchConfig(),
    "global": SearchConfig(allocation="global", rescore_every=0.1),
    "adaptive": SearchConfig(allocation="adaptive", stability_weight=-1.0),
    "shares": SearchConfig(attention_share=0.3, skip_layers=(-1,), rescore_every=0.1),
    "whole heads": SearchConfig(allocation="global", min_keep=PerStructure(attention=0, mlp=2), attention_share=0.7),
    "exact": SearchConfig(allocation="global", solver="exact"),
    "standardised": SearchConfig(allocation="global", rank_by="score", normalize="layer_zscore"),
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize(("ratio", "share"), [(0.25, 0.3), (0.1, 1.0)])
def test_budgets_are_exact_and_masked_equals_cut(name, ratio, share, x64):
    model = model_of(dtype=np.float64)
    search, least = COMPOSED[name], 2 if name == "exact" else 1
    selection = chosen(model, ratio, search, share, min_keep=least)
    pruned, whole = cut(model, selection.keep), prunable_parameters(discover(model))
    assert count_parameters(model) - count_parameters(pruned) == selection.removed
    assert count_parameters(pruned) == kept_parameters(model, selection.keep)
    assert selection.actual == selection.removed / whole >= ratio == selection.asked
    channel, block, unit = 3 * 8, 2 * 2 * 4 * 8, 8 * 4 * 8
    largest = block if share == 1 else channel if search.attention_share is None else unit
    assert selection.removed < ratio * whole + largest
    left = [w.q_per_kv for w in pruned.spec.layers if w.kv_heads]
    assert min(left) < 3
    assert min(left) >= least
    if search.skip_layers:
        assert pruned.spec.layers[-1] == model.spec.layers[-1]
    tokens = jnp.asarray(WINDOWS.tokens)
    masked = np.asarray(forward(model, tokens, masks(selection.keep)))
    np.testing.assert_allclose(masked, forward(pruned, tokens), rtol=0, atol=1e-10)
    whole_heads = {name: selection.keep[name] for name in STRUCTURES}
    assert np.abs(masked - np.asarray(forward(model, tokens, masks(whole_heads)))).max() > 1e-3


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_met_by_less_than_a_block_more(share):
    model = model_of()
    whole, block = prunable_parameters(discover(model)), 2 * 2 * 4 * 8
    first = first_stage(model, 0.3, SearchConfig(), share)
    gone = whole - prunable_parameters(discover(first.subject.model))
    assert share * 0.3 * whole <= gone < share * 0.3 * whole + block
    assert first.rest == pytest.approx((np.ceil(0.3 * whole) - gone) / (whole - gone))


def test_the_rest_is_the_usual_search_on_the_model_without_them():
    model = model_of()
    search = SearchConfig(allocation="global", min_keep=PerStructure(attention=0, mlp=1))
    selection = chosen(model, 0.5, search, 0.3, "wanda")
    first = first_stage(model, 0.5, search, 0.3, "wanda")
    rest = chosen(first.subject.model, first.rest, search, 0.0, "wanda")
    assert not rest.keep["attention"].all(), "KV heads and query heads go together"
    once, twice = cut(model, selection.keep), cut(first.subject.model, rest.keep)
    assert [w.q_per_kv for w in once.spec.layers if w.kv_heads] == [w.q_per_kv for w in twice.spec.layers if w.kv_heads]
    np.testing.assert_array_equal(
        forward(once, jnp.asarray(WINDOWS.tokens)), forward(twice, jnp.asarray(WINDOWS.tokens))
    )
    assert QUERY_HEADS not in rest.keep


def test_scores_see_the_model_without_the_query_heads_that_went():
    model = model_of()
    search = SearchConfig(allocation="global")
    selection, first = chosen(model, 0.4, search, 0.5), first_stage(model, 0.4, search, 0.5)
    again = calibrate(first.subject.model, WINDOWS, ["gate_fisher"], batch_size=4).scores("gate_fisher")["mlp"]
    before = calibrate(model, WINDOWS, ["gate_fisher"], batch_size=4).scores("gate_fisher")["mlp"]
    kept = selection.keep["mlp"]
    assert again[kept].min() >= again[~kept].max(), "one ranking of the new scores"
    assert before[kept].min() < before[~kept].max()


@pytest.mark.parametrize("method", ["bias", "least_squares"])
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_compensation_is_that_of_the_ungrouped_model(method, propagate, x64):
    model = model_of(dtype=np.float64)
    keep = existing_units(model.runs) | {QUERY_HEADS: existing_query_heads(model.runs)}
    keep[QUERY_HEADS][0] = [1, 0, 1, 0, 1, 1]
    keep[QUERY_HEADS][2] = [0, 0, 1, 0, 0, 0]
    keep["attention"][2, 1] = False
    keep["mlp"][1, :7] = False
    config = CompensationConfig(method=method, propagate=propagate, damping=0.1)
    batches = pairs(WINDOWS, 4)
    new = compensate(model, keep, batches, config)
    plain = {"attention": keep[QUERY_HEADS], "mlp": keep["mlp"]}
    expected = compensate(ungrouped(model), plain, batches, config)
    np.testing.assert_allclose(
        new.model.runs[0].attention.output[...].reshape(3, 6, 1, 4, 8),
        expected.model.runs[0].attention.output[...],
        rtol=0,
        atol=1e-9,
    )
    tokens = jnp.asarray(WINDOWS.tokens)
    masked = np.asarray(forward(new.model, tokens, masks(keep)))
    np.testing.assert_allclose(masked, forward(cut(new.model, keep), tokens), rtol=0, atol=1e-10)
    assert np.abs(masked - np.asarray(forward(model, tokens, masks(keep)))).max() > 1e-3
    assert all(each.corrected < each.error for each in new.corrections if each.structure == "attention")


def test_models_without_groups_and_too_large_shares_are_refused():
    alone = random_model(spec_of((4, 8), (4, 8), q_per_kv=1))
    with pytest.raises(ValueError, match=r"query_heads.share: .* got a model with one each"):
        chosen(alone, 0.2, SearchConfig(), 0.5)
    with pytest.raises(
        ValueError, match=r"query_heads.share: expected at most 256 parameters .* lower it or the ratio"
    ):
        chosen(model_of(), 0.9, SearchConfig(skip_layers=(0, 1)), 0.9)
    with pytest.raises(ValueError, match="tell the query heads of a KV head apart"):
        chosen(model_of(), 0.2, SearchConfig(), 0.5, "block_influence")


@pytest.fixture
def options(tiny_model_directory) -> dict:
    return {
        "model": ModelConfig(name=str(tiny_model_directory)),
        "calibration": CalibrationConfig(examples=8, length=16, batch_size=2),
        "ratio": 0.3,
        "estimator": "saap",
    }


def test_prune_saves_a_model_that_loads_and_evaluates(options, tmp_path):
    search, heads = SearchConfig(rescore_every=0.1), QueryHeadsConfig(share=0.4)
    compensation = CompensationConfig(method="least_squares")
    out = str(tmp_path / "pruned")
    config = PruneConfig(out=out, search=search, query_heads=heads, compensation=compensation, **options)
    pruned = prune.prune(config)
    loaded, keep = load_model(out), load_keep(out)
    assert count_parameters(loaded) == pruned.parameters[1] == pruned.parameters[0] - pruned.selection.removed
    assert min(w.q_per_kv for w in loaded.spec.layers) == 1
    assert pruned.runs == len(loaded.runs)
    jax.tree.map(np.testing.assert_array_equal, keep, pruned.selection.keep)
    rows = evaluate(EvaluateConfig(models=(out, options["model"].name), windows=3, length=16, batch_size=2))
    assert rows[out].ppl != rows[options["model"].name].ppl
    plain = prune.prune(PruneConfig(out=str(tmp_path / "plain"), search=SearchConfig(), **options))
    assert set(plain.selection.keep) == set(STRUCTURES)
    assert set(load_keep(tmp_path / "plain")) == set(STRUCTURES)


def test_on_the_command_line(options, tmp_path, capsys):
    words = ["--model.name", options["model"].name, "--calibration.examples", "3", "--calibration.length", "16"]
    words += ["--search.skip-layers", "--query-heads.share", "0.5", "--ratio", "0.2", "--estimator", "gate_fisher"]
    assert main.main(["prune", "--out", str(tmp_path / "pruned"), *words]) == 0
    assert "query heads" in capsys.readouterr().out
    for option, value, message in (
        ("--from-run", str(tmp_path / "run"), "query_heads.share: expected no from_run beside it"),
        ("--search.max-runs", "2", "query_heads.share: expected no search.max_runs beside it, got 2"),
        ("--search.max-shapes", "2", "query_heads.share: expected no search.max_shapes beside it, got 2"),
    ):
        assert main.main(["prune", "--out", str(tmp_path / "other"), *words, option, value]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
