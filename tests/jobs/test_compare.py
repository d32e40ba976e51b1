"""The comparison on a tiny model: what a run leaves behind, what it reuses, and what it compiles."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import SearchConfig

import saap_jax
from saap_jax.api import select_units
from saap_jax.config.jobs import CompareConfig, ScoreConfig
from saap_jax.config.judge import EvaluateConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, FusionConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.estimation.observe import observe_step
from saap_jax.evaluation.candidates import candidates_step
from saap_jax.evaluation.perplexity import loss_step
from saap_jax.jobs import compare, prune
from saap_jax.jobs.evaluate import evaluate
from saap_jax.jobs.score import score_run
from saap_jax.llama.files.load import load_keep
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.scores import read_scores
from saap_jax.subjects.llama import scenarios_of
from tests.fake_runs import fake_run


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return CompareConfig(
        name="tiny",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=5, length=16, batch_size=2),
        evaluation=EvaluationConfig(windows=5, length=16, batch_size=2),
        runs=str(tmp_path_factory.mktemp("runs")),
        best_ratio=0.2,
    )


@pytest.fixture(scope="module")
def run(config) -> RunDirectory:
    return compare.compare(config)


def test_the_run_holds_every_candidate(config, run):
    names = [candidate["candidate"] for candidate in run.candidates()]
    assert names == [f"{name}@{ratio}" for ratio in config.ratios for name in config.estimation.estimators]
    assert run.finished
    for candidate in run.candidates():
        assert candidate["ratio_asked"] <= candidate["ratio_actual"] < candidate["ratio_asked"] + 0.15
        assert set(candidate["ppl"]) == {"ppl@16 builtin:reference", "ppl@16 builtin:descriptions"}
    assert {path.name for path in run.path.iterdir()} == {
        "run.json", "metrics.jsonl", "scores.npz", "stability.npz", "keeps.npz", "keep.json", "report.html", "best",
        "tensorboard", "couplings.svg",
    }  # fmt: skip
    record = json.loads((run.path / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["load", "text", "score", "search", "evaluate", "cut"]
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))


def test_the_best_is_cut_and_loads(config, run):
    best = run.record["best"]
    out = "ppl@16 builtin:descriptions"
    at_ratio = [c for c in run.candidates() if c["ratio_asked"] == config.cut_ratio]
    assert best["ppl_masked"][out] == min(candidate["ppl"][out] for candidate in at_ratio)
    loaded = saap_jax.load_model(run.path / "best")
    assert saap_jax.count_parameters(loaded) == best["parameters"] < run.record["dense"]["parameters"]
    winner = next(c for c in at_ratio if c["candidate"] == best["candidate"])
    assert winner["parameters"] == best["parameters"]
    assert load_keep(run.path / "best")["mlp"].sum(axis=1).tolist() == winner["kept"]["mlp"]
    assert best["ppl"][out] == pytest.approx(best["ppl_masked"][out], rel=1e-3)


def test_a_cut_model_that_differs_from_the_masked_one_is_an_error(config, tmp_path, monkeypatch):
    """Negative control of the check above: cutting other units than those that were masked does not pass."""
    other = dataclasses.replace(config, runs=str(tmp_path), ratios=(0.5,), best_ratio=0.5)
    flipped = lambda model, keep: saap_jax.cut(model, {n: k[:, ::-1] for n, k in keep.items()})  # noqa: E731
    monkeypatch.setattr("saap_jax.subjects.llama.cut", flipped)
    monkeypatch.setattr("saap_jax.subjects.llama.save_model", lambda model, path, **_: saap_jax.save_model(model, path))
    with pytest.raises(ValueError, match="expected the cut model to have the masked one's"):
        compare.compare(other)


@pytest.mark.slow
def test_one_program_scores_and_one_evaluates_all_masked_candidates(config, tmp_path):
    observe_step.clear_cache()
    loss_step.clear_cache()
    candidates_step.clear_cache()
    compare.compare(dataclasses.replace(config, runs=str(tmp_path)))
    assert observe_step._cache_size() == 1
    assert candidates_step._cache_size() == 1, "the dense model and all masked candidates"
    assert loss_step._cache_size() == 1, "the cut model"


def test_the_best_where_nothing_is_asked_to_go_is_a_candidate(tmp_path):
    """Not the unpruned model, which stands before all others."""
    path = fake_run(tmp_path / "none")
    run = RunDirectory(path, json.loads((path / "run.json").read_text()) | {"seeds": {"calibration": [0]}})
    (row,) = run.candidates()
    run.append({**row, "candidate": "wanda@0", "ratio_asked": 0.0})
    assert compare.best_candidate(run, 0.0)["candidate"] == "wanda@0"


def test_the_same_configuration_picks_up_what_is_there(config, run, monkeypatch):
    monkeypatch.setattr("saap_jax.jobs.job.open_subject", lambda *_: pytest.fail("loaded a model for a finished run"))
    before = run.path.joinpath("metrics.jsonl").read_bytes()
    again = compare.compare(config)
    assert again.candidates() == run.candidates()
    assert run.path.joinpath("metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(config, run, tmp_path, monkeypatch):
    other = dataclasses.replace(config, runs=str(tmp_path))
    shutil.copytree(run.path, tmp_path / "tiny")
    record = json.loads((run.path / "run.json").read_text())
    record.pop("best")
    record |= {"status": "running", "config": {**record["config"], "runs": str(tmp_path)}}
    (tmp_path / "tiny" / "run.json").write_text(json.dumps(record))
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "tiny" / "metrics.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    for name in ("keep.json", "report.html"):
        (tmp_path / "tiny" / name).unlink()
    shutil.rmtree(tmp_path / "tiny" / "best")
    monkeypatch.setattr("saap_jax.subjects.llama.observe", lambda *_, **__: pytest.fail("scored again"))
    resumed = compare.compare(other)
    expected = [{k: v for k, v in c.items() if k != "seconds"} for c in run.candidates()]
    assert [{k: v for k, v in c.items() if k != "seconds"} for c in resumed.candidates()] == expected
    assert resumed.record["best"]["ppl"] == run.record["best"]["ppl"]


@pytest.mark.slow
def test_another_configuration_is_refused_and_overwrite_starts_anew(config, run, tmp_path):
    shutil.copytree(run.path, tmp_path / "tiny")
    other = dataclasses.replace(
        config, runs=str(tmp_path), estimation=EstimationConfig(estimators=("magnitude", "random(seed=3)"))
    )
    before = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another configuration: .*estimators"):
        compare.compare(other)
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == before
    anew = compare.compare(other, overwrite=True)
    assert len(anew.candidates()) == 4
    assert set(read_scores(anew).estimators) == {"magnitude", "random(seed=3)"}


def test_an_impossible_budget_is_refused_before_anything_is_evaluated(config, tmp_path, monkeypatch):
    monkeypatch.setattr("saap_jax.api.window_losses", lambda *_: pytest.fail("evaluated"))
    search = SearchConfig(skip_layers=(0, 1))
    with pytest.raises(ValueError, match="largest possible ratio is 0"):
        compare.compare(dataclasses.replace(config, runs=str(tmp_path), search=search))


def test_overlapping_texts_are_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    other = dataclasses.replace(
        config,
        runs=str(tmp_path),
        calibration=dataclasses.replace(config.calibration, scenarios=(f"text:{text}",)),
        evaluation=dataclasses.replace(config.evaluation, out_of_domain=str(text)),
    )
    with pytest.raises(ValueError, match="calibrate on one text and evaluate on another"):
        compare.compare(other)


@pytest.mark.slow
def test_fusion_and_adaptive_search(config, tmp_path):
    """`saap` fuses, attention apart, ranked by log score + λ · ASI; it differs from its parts, and λ = 0 from λ ≠ 0."""
    model, tokenizer = saap_jax.load_model(config.model.name), saap_jax.load_tokenizer(config.model.name)
    windows = scenarios_of(config.calibration, tokenizer)
    fused = "taylor_element+gate_taylor+wanda"
    names = ("saap", fused, "gate_fisher", "fisher")
    made = saap_jax.calibrate(model, windows, names, batch_size=2)
    scores = {name: made.scores(name) for name in names}
    np.testing.assert_array_equal(scores["saap"]["mlp"], scores[fused]["mlp"])
    np.testing.assert_array_equal(scores["saap"]["attention"], scores["gate_fisher"]["attention"])
    for structure in ("attention", "mlp"):
        assert not np.allclose(scores["saap"][structure], scores["fisher"][structure])
    whole = saap_jax.calibrate(model, windows, ["saap"], fusion=FusionConfig(attention=""), batch_size=2)
    np.testing.assert_allclose(whole.scores("saap")["attention"], scores[fused]["attention"], rtol=1e-5)
    searches = [SearchConfig(allocation="adaptive", stability_weight=weight) for weight in (1.0, 0.0)]
    kept = [select_units(model, scores["saap"], 0.5, s, made.stability).keep["mlp"] for s in searches]
    assert (kept[0] != kept[1]).any()
    estimation = EstimationConfig(estimators=("saap", "wanda"))
    run = compare.compare(dataclasses.replace(config, runs=str(tmp_path), estimation=estimation, search=searches[0]))
    assert set(run.record["fusions"]["reference"][fused]["weights"]) == {"taylor_element", "gate_taylor", "wanda"}
    assert len(run.candidates()) == 4


@pytest.mark.slow
def test_score_prune_evaluate(config, tmp_path):
    scored = ScoreConfig(
        name="scores",
        runs=str(tmp_path),
        model=config.model,
        calibration=config.calibration,
        estimation=EstimationConfig(estimators=("wanda", "gate_fisher")),
        keep_statistics="none",
    )
    run, calibrated = score_run(scored)
    assert calibrated.estimators == ["wanda", "gate_fisher"]
    assert run.finished
    options = {"model": config.model, "calibration": config.calibration, "ratio": 0.4, "estimator": "wanda"}
    options |= {"search": SearchConfig(), "compensation": CompensationConfig()}
    fresh = prune.prune(PruneConfig(out=str(tmp_path / "fresh"), **options))
    reused = prune.prune(PruneConfig(out=str(tmp_path / "reused"), from_run=str(run.path), **options))
    assert fresh.selection.actual == reused.selection.actual >= 0.4
    for name, kept in fresh.selection.keep.items():
        np.testing.assert_array_equal(kept, reused.selection.keep[name])
    with pytest.raises(ValueError, match="does not exist yet"):
        prune.prune(PruneConfig(out=str(tmp_path / "fresh"), **options))
    with pytest.raises(ValueError, match="has no scores of magnitude and no statistics"):
        prune.prune(
            PruneConfig(out=str(tmp_path / "x"), from_run=str(run.path), **{**options, "estimator": "magnitude"})
        )
    models = (config.model.name, str(tmp_path / "fresh"))
    rows = evaluate(EvaluateConfig(models=models, windows=3, length=16, batch_size=2))
    assert rows[models[1]].parameters == fresh.parameters[1] < rows[models[0]].parameters
    assert rows[models[0]].ppl != rows[models[1]].ppl


def test_ten_lines_of_python(tiny_model_directory, tmp_path, monkeypatch):
    """The session that the README shows, word for word, but for the model and the amount of text."""
    readme = Path(saap_jax.__file__).parent.parent / "README.md"
    block = readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    block = block.replace('"smollm2-135m"', repr(str(tiny_model_directory))).replace("length=128", "length=16")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert saap_jax.count_parameters(saap_jax.load_model(tmp_path / "pruned")) < saap_jax.count_parameters(
        names["model"]
    )
