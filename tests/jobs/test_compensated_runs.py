"""Compensation in comparisons and in `saap prune`: same units, other weights, the same model masked, cut and saved."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import SearchConfig

import saap_jax
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, GridConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.data import concatenated, pairs
from saap_jax.estimation import GRAM, observe
from saap_jax.jobs import compare
from saap_jax.jobs import prune as pruning
from saap_jax.jobs.task_comparison import models_of
from saap_jax.report import csv_table
from saap_jax.runs.references import find
from saap_jax.subjects.llama import LlamaSubject, scenarios_of, texts_of
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.cut import cut
from saap_jax.types import STRUCTURES

pytestmark = pytest.mark.slow

CALIBRATION = CalibrationConfig(examples=8, length=16, batch_size=2)
METHODS = ("none", "bias", "least_squares", "scales")


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return CompareConfig(
        name="compensated",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CALIBRATION,
        estimation=EstimationConfig(estimators=("wanda", "magnitude")),
        grid=GridConfig(compensations=METHODS, seeds=(0, 1)),
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2, candidates_at_once=3),
        ratios=(0.5,),
        best_ratio=0.5,
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def run(config):
    return compare.compare(config)


def test_compensation_changes_quality_and_not_the_units(run):
    rows = {(row["estimator"], row["seed"], row["compensation"]): row for row in run.candidates()}
    assert len(rows) == 2 * 2 * len(METHODS)
    for estimator in ("wanda", "magnitude"):
        none, *others = (rows[estimator, 0, method] for method in METHODS)
        assert {row["keep"] for row in others} == {none["keep"]}
        assert len({json.dumps(row["ppl"]) for row in (none, *others)}) == len(METHODS)
        assert {row["same_as"] for row in others} == {None}
    of_seeds = [rows["magnitude", seed, "least_squares"] for seed in (0, 1)]
    assert of_seeds[0]["keep"] == of_seeds[1]["keep"]  # magnitude reads no text, compensation does
    assert of_seeds[0]["ppl"] != of_seeds[1]["ppl"]
    assert rows["magnitude", 0, "none"]["ppl"] == rows["magnitude", 1, "none"]["ppl"]


def test_a_candidate_with_weights_of_its_own_is_refused_where_masks_are_not_enough(run):
    """As `saap ab --tasks` needs a candidate: of those that were not cut and saved there are masks alone."""
    best = run.record["best"]["candidate"]
    others = [each for each in run.candidates() if each["candidate"] != best and each["compensation"] != "none"]
    with pytest.raises(ValueError, match="compensation gives a candidate weights of its own"):
        next(models_of(find(f"{run.path}:{others[0]['candidate']}"), "float32"))
    plain = next(each for each in run.candidates() if each["compensation"] == "none")
    assert next(models_of(find(f"{run.path}:{plain['candidate']}"), "float32")).spec.layers


def test_its_perplexity_is_that_of_the_compensated_model_when_cut(config, run):
    model, tokenizer = saap_jax.load_model(config.model.name), saap_jax.load_tokenizer(config.model.name)
    texts, arrays = texts_of(config.evaluation, tokenizer), run.load_arrays("keeps")
    windows = scenarios_of(dataclasses.replace(CALIBRATION, seed=1), tokenizer)
    for method in METHODS:
        (row,) = (r for r in run.candidates() if (r["estimator"], r["seed"], r["compensation"]) == ("wanda", 1, method))
        keep = {structure: arrays[f"{row['candidate']}/{structure}"] for structure in STRUCTURES}
        text, size = concatenated(windows.values()), CALIBRATION.batch_size
        own, _ = LlamaSubject(model).compensated(keep, text, CompensationConfig(method=method), batch_size=size)
        pruned = cut(own.model, keep)
        for metric, text in texts.items():
            assert saap_jax.perplexity(pruned, text) == pytest.approx(row["ppl"][metric], rel=1e-5)


def test_the_moments_of_a_text_are_observed_once_for_all_candidates(config, tmp_path, monkeypatch):
    """With `dense`, in any order of candidates; the rows are those of models compensated on the text itself."""
    passes = []

    def counted(*arguments, **options):
        passes.extend(arguments[2:3] if GRAM in arguments[2] else ())
        return observe(*arguments, **options)

    monkeypatch.setattr("saap_jax.subjects.llama.observe", counted)
    dense = CompensationConfig(propagate="dense")
    made = compare.compare(
        dataclasses.replace(config, name="dense", ratios=(0.25, 0.5), compensation=dense, runs=str(tmp_path))
    )
    assert passes == [frozenset({GRAM})] * 2 + passes[2:]  # a seed each, of 16 candidates
    assert len(passes) <= 3  # the best, cut at the end, may be of the first seed
    model, tokenizer = saap_jax.load_model(config.model.name), saap_jax.load_tokenizer(config.model.name)
    texts, arrays = texts_of(config.evaluation, tokenizer), made.load_arrays("keeps")
    windows = scenarios_of(dataclasses.replace(CALIBRATION, seed=1), tokenizer)
    wanted = {"estimator": "wanda", "seed": 1, "ratio_asked": 0.5, "compensation": "least_squares"}
    (row,) = (row for row in made.candidates() if wanted.items() <= row.items())
    keep = {structure: arrays[f"{row['candidate']}/{structure}"] for structure in STRUCTURES}
    options = dataclasses.replace(dense, method="least_squares")
    pruned = cut(
        compensate(model, keep, pairs(concatenated(windows.values()), CALIBRATION.batch_size), options).model, keep
    )
    for metric, text in texts.items():
        assert saap_jax.perplexity(pruned, text) == pytest.approx(row["ppl"][metric], rel=1e-4)


def test_taken_up_again_bit_for_bit(config, run, tmp_path):
    again = dataclasses.replace(config, runs=str(tmp_path))
    partial = compare.compare(again)
    lines = (partial.path / "metrics.jsonl").read_text().splitlines()
    (partial.path / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    record = json.loads((partial.path / "run.json").read_text())
    (partial.path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    resumed = compare.compare(again)
    assert csv_table(resumed.record, resumed.candidates()) == csv_table(run.record, run.candidates())


def test_pruned_models_are_compensated(tiny_model_directory, tmp_path):
    def prune(name: str, **options):
        return pruning.prune(
            PruneConfig(
                out=str(tmp_path / name),
                model=ModelConfig(name=str(tiny_model_directory)),
                estimator="wanda",
                ratio=0.5,
                calibration=CALIBRATION,
                search=SearchConfig(),
                compensation=CompensationConfig(**options),
            )
        )

    plain, least, biased = prune("plain"), prune("least", method="least_squares"), prune("biased", method="bias")
    scaled = prune("scaled", method="scales", steps=6)
    assert [len(each.corrections) for each in (plain, least, biased, scaled)] == [0, 4, 4, 0]
    assert [each.scaled is not None for each in (plain, least, scaled)] == [False, False, True]
    assert min(scaled.scaled.divergences) < scaled.scaled.divergences[0]
    said = dict(row for row in pruning.summary_rows(scaled))
    assert " -> " in said["KL to the unpruned model, nats a token, before and after scales"]
    assert all(each.corrected < each.error for each in biased.corrections[:1])
    models = {name: saap_jax.load_model(tmp_path / name) for name in ("plain", "least", "biased")}
    assert models["least"].spec == models["plain"].spec
    assert [model.spec.output_biases for model in models.values()] == [False, False, True]
    same = [np.array_equal(m.segments[0].mlp.up[...], models["plain"].segments[0].mlp.up[...]) for m in models.values()]
    assert all(same)
    assert (
        float(jnp.abs(models["least"].segments[0].mlp.down[...] - models["plain"].segments[0].mlp.down[...]).max())
        > 1e-4
    )


@pytest.mark.parametrize("kind", ["compare", "prune"])
def test_too_little_text_is_refused_before_any_work(kind, config, tmp_path):
    few = dataclasses.replace(CALIBRATION, examples=6)
    least = CompensationConfig(method="least_squares")
    calls = {
        "compare": lambda: compare.compare(dataclasses.replace(config, runs=str(tmp_path), calibration=few)),
        "prune": lambda: pruning.prune(PruneConfig(out=str(tmp_path / "out"), calibration=few, compensation=least)),
    }
    with pytest.raises(ValueError, match="expected at least 4 microbatches .*, got 3"):
        calls[kind]()
    assert not list(tmp_path.iterdir())
