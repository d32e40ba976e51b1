"""Query heads inside KV heads, in every command: what goes, against direct ablation; exact budgets; what composes."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import calibrate
from saap_jax.cli import main
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.judge import EvaluateConfig
from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.search import PerStructure, QueryHeadsConfig, SearchConfig, SharePerStructure
from saap_jax.data import Windows, pairs
from saap_jax.estimation.ablation import Unit, ablate
from saap_jax.jobs import chosen as selection
from saap_jax.jobs import prune
from saap_jax.jobs.evaluate import evaluate
from saap_jax.jobs.task_comparison import models_of
from saap_jax.llama import load_keep, load_model
from saap_jax.llama.segments import existing_query_heads, existing_units, masks, ones_gates
from saap_jax.llama.ungroup import ungrouped
from saap_jax.runs.commands import prune_command
from saap_jax.runs.references import find
from saap_jax.runtime.progress import quiet
from saap_jax.selection.calibrate import calibrate as calibrate_by
from saap_jax.selection.choose import choose_calibrated
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.counting import kept_parameters
from saap_jax.surgery.cut import cut
from saap_jax.types import QUERY_HEADS, RESIDUAL, STRUCTURES
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
        model = changed(model, "segments/0/attention/output", lambda value: value * factor)
    return model


def subject_of(model) -> LlamaSubject:
    return LlamaSubject(model, further=(QUERY_HEADS,))


def with_share(search: SearchConfig, share: float, min_keep: int = 1) -> SearchConfig:
    return dataclasses.replace(search, query_heads=QueryHeadsConfig(share=share, min_keep=min_keep))


def chosen(model, ratio: float, search: SearchConfig, share: float, estimator: str = "gate_fisher", min_keep: int = 1):
    config = PruneConfig(ratio=ratio, estimator=estimator, search=with_share(search, share, min_keep))
    return selection.chosen_units(config, subject_of(model), SCENARIOS, CALIBRATION, quiet)


def removed_heads(heads: np.ndarray) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(np.flatnonzero(~row).tolist()) for layer, row in enumerate(heads) if not row.all()}


def direct_ablation(model) -> np.ndarray:
    """Return the change of the loss a token without each query head, by one forward pass each."""
    tokens, mask = jnp.asarray(WINDOWS.tokens), jnp.asarray(WINDOWS.mask)
    ones, heads = ones_gates(model.segments), np.ones((3, 6), np.float32)
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
    weak = chosen(model, 2 * block / whole, SearchConfig(), 1.0, estimator)
    assert removed_heads(weak.keep[QUERY_HEADS]) == WEAK
    assert weak.keep["attention"].all()
    assert weak.keep["mlp"].all()
    strong = chosen(model_of(), 2 * block / whole, SearchConfig(), 1.0, estimator)
    assert removed_heads(strong.keep[QUERY_HEADS]) != WEAK


def test_heads_in_another_order_give_the_same_model(x64):
    model, order = model_of(dtype=np.float64), np.array([2, 0, 1])
    permuted = changed(model, "segments/0/attention/query", lambda value: value[:, :, :, order])
    permuted = changed(permuted, "segments/0/attention/output", lambda value: value[:, :, order])
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
    assert count_parameters(pruned) == kept_parameters(model, selection.keep).all
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
    keep = chosen(model, 0.3, SearchConfig(max_ratio=SharePerStructure(attention=0.0)), share).keep
    gone = int((~keep[QUERY_HEADS]).sum()) * block // 2
    assert share * 0.3 * whole <= gone < share * 0.3 * whole + block


def test_query_heads_are_scored_as_units_of_the_model_without_groups():
    model = model_of()
    calibrated = calibrate(subject_of(model), WINDOWS, ["saap", "wanda", "random"], stability=True, batch_size=4)
    alone = calibrate(ungrouped(model), WINDOWS, ["gate_fisher", "wanda", "random"], stability=True, batch_size=4)
    for name, own in (("saap", "gate_fisher"), ("wanda", "wanda"), ("random", "random")):
        np.testing.assert_array_equal(calibrated.scores(name)[QUERY_HEADS], alone.scores(own)["attention"])
    np.testing.assert_array_equal(calibrated.stability[QUERY_HEADS], alone.stability["attention"])
    plain = calibrate(model, WINDOWS, ["saap", "wanda"], stability=True, batch_size=4)
    for name, structure in itertools.product(("saap", "wanda"), STRUCTURES):
        np.testing.assert_array_equal(calibrated.scores(name)[structure], plain.scores(name)[structure])
    assert QUERY_HEADS not in plain.scores("saap")


def test_the_oracle_scores_them_and_takes_no_channel_out_twice(monkeypatch):
    model, taken, ablated = model_of(), [], LlamaSubject.ablate

    def counted(subject, examples, units, **options):
        taken.append({unit.structure for unit in units})
        return ablated(subject, examples, units, **options)

    monkeypatch.setattr(LlamaSubject, "ablate", counted)
    scores = calibrate_by(subject_of(model), SCENARIOS, ["ablation"], batch_size=4).scores("ablation")
    assert taken == [{"attention", "mlp"}, {"attention"}], "of the model, and of its query heads"
    np.testing.assert_allclose(scores[QUERY_HEADS], direct_ablation(model), rtol=0, atol=1e-5)
    assert np.abs(scores[QUERY_HEADS]).max() > 1e-3


def test_on_a_path_scores_are_those_of_the_model_without_what_went(x64):
    """By masks as of the cut model: the same units go then."""
    model = model_of(dtype=np.float64)
    search = with_share(SearchConfig(allocation="global"), 0.4)
    subject = subject_of(model)
    first = choose_calibrated(
        subject, calibrate(subject, WINDOWS, ["gate_fisher"], batch_size=4), "gate_fisher", 0.2, search
    )
    masked = calibrate(subject, WINDOWS, ["gate_fisher"], keep=first.keep, batch_size=4).scores("gate_fisher")
    small = cut(model, first.keep)
    smaller = calibrate(small, WINDOWS, ["gate_fisher"], batch_size=4).scores("gate_fisher")
    for name in STRUCTURES:
        for layer, kept in enumerate(first.keep[name]):
            of_cut = np.asarray(smaller[name])[layer, : int(kept.sum())]
            np.testing.assert_allclose(np.asarray(masked[name])[layer][kept], of_cut, rtol=1e-6)
            assert np.isnan(np.asarray(masked[name])[layer][~kept]).all()
    kept = first.keep[QUERY_HEADS]
    assert np.isfinite(masked[QUERY_HEADS][kept]).all()
    assert np.isnan(masked[QUERY_HEADS][~kept]).all()
    dense = calibrate(subject, WINDOWS, ["gate_fisher"], batch_size=4).scores("gate_fisher")[QUERY_HEADS]
    assert not np.allclose(masked[QUERY_HEADS][kept], dense[kept], rtol=1e-3)  # control


def test_candidates_by_masks_are_the_cut_models(x64):
    """Of several keep-sets in one batch, with and without query heads told apart."""
    model = model_of(dtype=np.float64)
    subject = subject_of(model)
    keeps = [
        chosen(model, ratio, SearchConfig(allocation="global"), share).keep for ratio, share in ((0.2, 0.5), (0.3, 0.2))
    ]
    keeps += [subject.existing, {name: subject.existing[name] for name in STRUCTURES}]
    found = {n: losses for group in subject.losses(WINDOWS, keeps, batch_size=4) for n, losses in group.items()}
    for number, keep in enumerate(keeps):
        expected = subject.cut(keep).losses(WINDOWS, 4)
        np.testing.assert_allclose(found[number].sums, expected.sums, rtol=1e-9)
    assert not np.allclose(found[0].sums, found[2].sums, rtol=1e-3)


def test_the_oracle_tells_of_query_heads_and_channels(x64):
    model = model_of(dtype=np.float64)
    subject = LlamaSubject(model, further=(QUERY_HEADS, RESIDUAL))
    units = [Unit(QUERY_HEADS, layer, head) for layer, head in np.ndindex(3, 6)] + [
        Unit("mlp", 1, 3),
        Unit(RESIDUAL, 0, 5),
    ]
    saved: dict = {}
    found = subject.ablate(WINDOWS, units, batch_size=4, save=saved.update)
    assert saved == found
    direct = direct_ablation(model)
    np.testing.assert_allclose([found[unit] for unit in units[:18]], direct.ravel(), rtol=0, atol=1e-8)
    keep = {**subject.existing, RESIDUAL: subject.existing[RESIDUAL].copy()}
    keep[RESIDUAL][0, 5] = False
    losses = [subject.cut(each).losses(WINDOWS, 4).mean for each in (subject.existing, keep)]
    assert found[units[-1]] == pytest.approx(losses[1] - losses[0], abs=1e-9)
    again = subject.ablate(WINDOWS, units, batch_size=4, done=found, save=lambda changes: pytest.fail("computed again"))
    assert again == found


@pytest.mark.parametrize("method", ["bias", "least_squares"])
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_compensation_is_that_of_the_ungrouped_model(method, propagate, x64):
    model = model_of(dtype=np.float64)
    keep = existing_units(model.segments) | {QUERY_HEADS: existing_query_heads(model.segments)}
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
        new.model.segments[0].attention.output[...].reshape(3, 6, 1, 4, 8),
        expected.model.segments[0].attention.output[...],
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
    with pytest.raises(ValueError, match=r"search.query_heads.share: .* got a model with one each"):
        chosen(alone, 0.2, SearchConfig(), 0.5)
    with pytest.raises(
        ValueError, match=r"search.query_heads.share: expected at most 256 parameters .* lower it or the ratio"
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
    search = with_share(SearchConfig(rescore_every=0.1), 0.4)
    compensation = CompensationConfig(method="least_squares")
    out = str(tmp_path / "pruned")
    pruned = prune.prune(PruneConfig(out=out, search=search, compensation=compensation, **options))
    loaded, keep = load_model(out), load_keep(out)
    assert count_parameters(loaded) == pruned.parameters[1] == pruned.parameters[0] - pruned.selection.removed
    assert min(w.q_per_kv for w in loaded.spec.layers) == 1
    assert pruned.query_heads == (keep[QUERY_HEADS].size, keep[QUERY_HEADS].sum())
    assert pruned.segments == len(loaded.segments)
    jax.tree.map(np.testing.assert_array_equal, keep, pruned.selection.keep)
    rows = evaluate(EvaluateConfig(models=(out, options["model"].name), windows=3, length=16, batch_size=2))
    assert rows[out].ppl != rows[options["model"].name].ppl
    plain = prune.prune(PruneConfig(out=str(tmp_path / "plain"), search=SearchConfig(), **options))
    assert set(plain.selection.keep) == set(STRUCTURES)
    assert set(load_keep(tmp_path / "plain")) == set(STRUCTURES)


def test_on_the_command_line(options, tmp_path, capsys):
    words = ["--model.name", options["model"].name, "--calibration.examples", "3", "--calibration.length", "16"]
    words += [
        "--search.skip-layers",
        "--search.query-heads.share",
        "0.5",
        "--ratio",
        "0.2",
        "--estimator",
        "gate_fisher",
        "--compensation.method",
        "none",
    ]
    assert main.main(["prune", "--out", str(tmp_path / "pruned"), *words]) == 0
    assert "query heads" in capsys.readouterr().out
    for option, value, message in (
        ("--search.max-segments", "2", "search.query_heads.share: expected no search.max_segments beside it, got 2"),
        ("--search.max-shapes", "2", "search.query_heads.share: expected no search.max_shapes beside it, got 2"),
        ("--targets.parameters", "70%", "search.query_heads.share: expected no targets beside it, got parameters"),
        ("--search.query-heads.share", "0.99", "search.query_heads.share: expected at most"),
    ):
        assert main.main(["prune", "--out", str(tmp_path / "other"), *words, option, value]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()


# --- every command -------------------------------------------------------------------------------

PARTS = ["--calibration.examples", "8", "--calibration.length", "16", "--calibration.batch-size", "2"]
JUDGED = ["--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "3"]
SHARES = ["--search.query-heads.share", "0.15", "--search.residual.share", "0.3", "--search.residual.multiple-of", "2"]


def row_of(rows: list[dict], name: str) -> dict:
    return next(row for row in rows if row["candidate"] == name)


@pytest.fixture
def words(options, tmp_path):
    return ["--model.name", options["model"].name, "--runs", str(tmp_path), "--name", "run", *PARTS]


def test_a_comparison_searches_them_and_a_prune_takes_its_scores(words, options, tmp_path, capsys):
    estimators = ["--estimation.estimators", "wanda", "saap", "--grid.query-heads", "0", "0.15"]
    assert main.main(["compare", *words, *JUDGED, *estimators, "--ratios", "0.3", "0.4", *SHARES]) == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    assert record["further"] == [QUERY_HEADS, RESIDUAL]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["shares"].get("query_heads", 0) for row in rows} == {0, 0.15}
    for row in rows:
        assert row["ratio_actual"] >= row["ratio_asked"]
        assert set(row["kept"]) == {*STRUCTURES, QUERY_HEADS, RESIDUAL}
        assert row["kept"][RESIDUAL][0] < record["model"]["units"][RESIDUAL]
    best = load_model(str(run / "best"))
    chosen_row = next(row for row in rows if row["candidate"] == record["best"]["candidate"])
    assert best.spec.embed == chosen_row["kept"][RESIDUAL][0]
    assert count_parameters(best) == chosen_row["parameters"] == record["best"]["parameters"]
    assert "--search.query-heads.share 0.15" in prune_command(record, row_of(rows, "wanda,query_heads=0.15@0.3"))
    assert "query-heads" not in prune_command(record, row_of(rows, "wanda,query_heads=0@0.3"))
    page = (run / "report.html").read_text()
    assert f"{QUERY_HEADS} kept, by layer" in page
    assert f"{RESIDUAL} kept" in page
    assert f"{RESIDUAL} kept, by layer" not in page, "it is of the whole model"
    assert f"<h3>{QUERY_HEADS}</h3>" in page
    assert f"<h3>{RESIDUAL}</h3>" not in page, "no estimator of the table scores it"
    for name in ("wanda,query_heads=0.15@0.4", "saap,query_heads=0@0.3"):  # as `saap ab --tasks` has them
        (model,) = models_of(find(f"{run}:{name}"), "float32")
        assert count_parameters(model) == row_of(rows, name)["parameters"]
    capsys.readouterr()
    command = ["prune", "--model.name", options["model"].name, "--from-run", str(run), "--estimator", "wanda"]
    command += ["--search.skip-layers", "--search.attention-share", "None", "--search.rescore-every", "None"]
    command += ["--search.attention-from", "0", "--compensation.method", "none"]
    assert main.main([*command, "--ratio", "0.3", "--out", str(tmp_path / "out"), *SHARES]) == 0
    keep, row = load_keep(tmp_path / "out"), row_of(rows, "wanda,query_heads=0.15@0.3")
    assert {name: kept.sum(axis=1).tolist() for name, kept in keep.items()} == row["kept"]
    assert main.main(["score", *words[:4], "--name", "plain", *PARTS, "--estimation.estimators", "wanda"]) == 0
    capsys.readouterr()
    command[command.index(str(run))] = str(tmp_path / "plain")
    assert main.main([*command, "--ratio", "0.3", "--out", str(tmp_path / "other"), *SHARES]) == 2
    assert "has no scores of query_heads, embed" in capsys.readouterr().err


def test_frontier_sensitivity_score_and_fidelity_tell_them_apart(words, tmp_path, capsys):
    ways = ["--estimation.estimators", "wanda"]
    assert main.main(["frontier", *words, *JUDGED, *ways, "--ratios", "0.2", "0.4", "--tolerance", "0.2", *SHARES]) == 0
    assert main.main(["sensitivity", *words[:4], "--name", "places", *PARTS, *JUDGED, "--estimator", "wanda",
                      "--fractions", "0.5", "--search.skip-layers", *SHARES]) == 0  # fmt: skip
    further = ["--model.further", "query_heads", "embed"]
    assert main.main(["score", *words[:4], "--name", "scores", *PARTS, *ways, *further]) == 0
    with np.load(tmp_path / "scores" / "scores.npz") as arrays:
        assert {key.rpartition("/")[2] for key in arrays} == {*STRUCTURES, QUERY_HEADS, RESIDUAL}
    small = [*words[:4], "--name", "fidelity", *PARTS, *ways, "--channels-per-layer", "2", *further]
    assert main.main(["fidelity", *small]) == 2
    assert "model.further: expected no embed" in capsys.readouterr().err
    assert main.main(["fidelity", *small[:-1]]) == 0
    record = json.loads((tmp_path / "fidelity" / "fidelity.json").read_text())
    assert QUERY_HEADS in {row["scope"] for row in record}
