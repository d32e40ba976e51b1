"""Runs that go on: only with the weights and the text that they were begun on, and only from what they wrote."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from saap_jax.config.search import SearchConfig
from saap_jax.runs.keeps import read_keeps, save_keeps

from saap_jax.cli import main
from saap_jax.config.jobs import CompareConfig, FidelityConfig, FrontierConfig, ScoreConfig, SensitivityConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.config.traced import for_factory
from saap_jax.jobs import compare, fidelity, frontier, recover, sensitivity
from saap_jax.jobs.score import score_run
from saap_jax.llama import load_model, save_model
from saap_jax.llama.segments import existing_units
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runtime.digests import model_digest
from saap_jax.subjects.llama import LlamaSubject
from tests.cli.test_main import refused
from tests.helpers import changed

SCENARIO = "reference=text:{}"
TRACED = Path(__file__).parents[1] / "traced" / "problems.py"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 100)
    return path


@pytest.fixture
def score(tiny_model_directory, text, tmp_path) -> ScoreConfig:
    """Scores of a model and a text that a test may change."""
    shutil.copytree(tiny_model_directory, tmp_path / "model")
    return ScoreConfig(
        name="run",
        runs=str(tmp_path / "runs"),
        model=ModelConfig(name=str(tmp_path / "model")),
        calibration=CalibrationConfig(scenarios=(SCENARIO.format(text),), examples=3, length=16, batch_size=2),
        estimation=EstimationConfig(estimators=("wanda",)),
    )


def killed(run: RunDirectory) -> None:
    """Make a finished run one that was killed before its end."""
    RunDirectory(run.path, read_run(run.path)).update(status="running")


def other_weights(directory: Path, tokenizer) -> None:
    model = changed(load_model(directory), "segments/0/mlp/up", lambda value: value.at[0, 0, 0].add(1e-3))
    shutil.rmtree(directory)
    save_model(model, directory, tokenizer=tokenizer)


def other_constant(directory: Path, tokenizer) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def other_text(directory: Path, tokenizer) -> None:
    path = directory.parent / "text.txt"
    path.write_text(path.read_text().replace("cat", "cow"))


@pytest.mark.slow
def test_small_statistics_do_not_stand_for_a_pass_that_was_killed(score):
    config = dataclasses.replace(
        score, estimation=EstimationConfig(estimators=("taylor_element", "wanda")), keep_statistics="small"
    )
    run, before = score_run(config)
    (run.path / "scores.npz").unlink()
    killed(run)
    _, again = score_run(config)
    for scenario, by_estimator in before.scenarios.items():
        for estimator, scores in by_estimator.items():
            for structure, values in scores.items():
                np.testing.assert_allclose(again.scenarios[scenario][estimator][structure], values, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_weights, "by the digests of model ("),
        (other_constant, "by the digests of model ("),
        (other_text, "by the digests of calibration text 'reference' of seed 0 ("),
    ],
)
def test_scores_of_something_else_are_refused(change, said, score, tokenizer, tmp_path):
    run, before = score_run(score)
    killed(run)
    again, _ = score_run(score)
    assert again.finished, "nothing has changed"
    killed(run)
    change(tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="was begun on something else than is there now") as caught:
        score_run(score)
    assert said in str(caught.value)
    assert read_run(run.path)["status"] == "running"
    _, after = score_run(score, overwrite=True)
    assert not np.array_equal(before.scores("wanda")["mlp"], after.scores("wanda")["mlp"])


def jobs_of(model: str, text: Path, runs: str) -> dict:
    """Return each job that has a run, with a configuration for the tiny model, and what its run is of."""
    common = {"name": "run", "runs": runs, "model": ModelConfig(name=model)}
    calibration = CalibrationConfig(examples=3, length=16, batch_size=2)
    evaluation = EvaluationConfig(windows=2, length=16, batch_size=2)
    swept = {**common, "calibration": calibration, "evaluation": evaluation}
    estimation = EstimationConfig(estimators=("wanda",))
    texts = {"evaluation text of 'ppl@16 builtin:reference'", "evaluation text of 'ppl@16 builtin:descriptions'"}
    drawn = {"model", "calibration text 'reference' of seed 0"}
    data = TrainingTextConfig(sources=(f"text:{text}",), length=32)
    return {
        "compare": (
            compare.compare,
            CompareConfig(**swept, estimation=estimation, ratios=(0.2,), best_ratio=0.2),
            drawn | texts,
        ),
        "frontier": (
            frontier.frontier,
            FrontierConfig(**swept, estimation=estimation, ratios=(0.2,)),
            drawn | texts,
        ),
        "sensitivity": (
            sensitivity.sensitivity,
            SensitivityConfig(**swept, estimator="wanda", search=SearchConfig()),
            drawn | texts,
        ),
        "fidelity": (
            fidelity.judge,
            FidelityConfig(**common, calibration=calibration, estimation=estimation),
            drawn,
        ),
        "score": (
            score_run,
            ScoreConfig(**common, calibration=calibration, estimation=estimation),
            drawn,
        ),
        "recover": (
            recover.recover,
            RecoverConfig(
                name="run", runs=runs, model=model, dense=model, data=data, evaluation=evaluation, new_tokens=0,
                training=TrainingConfig(warmup=0), method=MethodConfig(name="full"),
            ),
            {"model", "dense model", "training text"} | texts,
        ),
        "traced": (
            compare.compare,
            for_factory(CompareConfig, f"{TRACED}:stacked", name="run", runs=runs, best_ratio=0.2),
            {"parameters", "program", "loss", "calibration text 'calibration' of seed 0",
             "evaluation text of 'loss held_out'"},
        ),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "frontier", "sensitivity", "fidelity", "score", "recover", "traced"])
def test_every_job_asks_what_its_run_was_begun_on(name, tiny_model_directory, text, tmp_path, monkeypatch):
    job, config, of = jobs_of(str(tiny_model_directory), text, str(tmp_path / "runs"))[name]
    run = RunDirectory.open(tmp_path / "runs" / "run", dataclasses.asdict(config)).begin({"a": "0" * 64})
    asked = {}
    monkeypatch.setattr(RunDirectory, "_check_inputs", lambda self, inputs: asked.update(inputs) or stop())

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        job(config)
    assert asked.keys() == of
    assert len(set(asked.values())) >= len(of) - ("dense model" in of)
    assert read_run(run.path)["inputs"] == {"a": "0" * 64}


def test_a_digest_tells_all_weights_and_constants(tiny_model_directory):
    model = load_model(tiny_model_directory)
    assert model_digest(model) == model_digest(load_model(tiny_model_directory))
    assert model_digest(model) != model_digest(load_model(tiny_model_directory, "bfloat16"))
    for path in ("embedding", "norm", "segments/0/attention/output"):
        other = changed(model, path, lambda value: value.at[(0,) * value.ndim].add(1e-6))
        assert model_digest(other) != model_digest(model)


class TestKeptScores:
    def test_a_finished_run_is_shown_and_mended_without_its_model(self, score, monkeypatch, capsys, tmp_path):
        run, _ = score_run(score)
        page = (run.path / "report.html").read_bytes()
        (run.path / "report.html").unlink()
        monkeypatch.setattr("saap_jax.jobs.job.open_subject", None)
        score_run(score)
        assert (run.path / "report.html").read_bytes() == page
        (run.path / "scores.npz").unlink()
        with pytest.raises(TypeError):
            score_run(score)
        monkeypatch.undo()
        score_run(score)
        assert read_run(run.path)["status"] == "finished"

    def test_scores_that_do_not_fit_are_refused(self, score):
        run, _ = score_run(score)
        good = run.load_arrays("scores")
        for name, arrays in {
            "of shape": good | {"reference/wanda/mlp": np.ones((2, 23), np.float32)},
            "int64 of": good | {"reference/wanda/mlp": np.ones((2, 24), int)},
            "got none": {key: value for key, value in good.items() if key != "reference/wanda/mlp"},
            "expected arrays named": good | {"x": np.ones(1)},
        }.items():
            run.save_arrays("scores", arrays)
            killed(run)
            with pytest.raises(ValueError, match=rf"{name}.*scores\.npz|scores\.npz.*{name}|{name}"):
                score_run(score)
        run.save_arrays("scores", good)
        assert score_run(score)[0].finished

    def test_damage_is_one_line(self, score, capsys):
        words = ["score", "--runs", score.runs, "--name", "run", "--model.name", score.model.name]
        words += ["--calibration.scenarios", *score.calibration.scenarios, "--calibration.examples", "3"]
        words += ["--calibration.length", "16", "--calibration.batch-size", "2", "--estimation.estimators", "wanda"]
        assert main.main(words) == 0
        path = Path(score.runs) / "run"
        (path / "scores.npz").write_bytes((path / "scores.npz").read_bytes()[:-40])
        assert "scores.npz" in refused(capsys, words)
        (path / "scores.npz").unlink()
        assert main.main(words) == 0, "as the message said"
        capsys.readouterr()
        (path / "run.json").write_text("[" * 10**5)
        assert "nested too deeply" in refused(capsys, words)


def test_scores_of_a_changed_estimator_are_refused(score, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from saap_jax.estimation.activations import wanda, fluctuation\n")
    score = dataclasses.replace(score, estimation=EstimationConfig(estimators=(f"{mine}:wanda",)))
    run, _ = score_run(score)
    killed(run)
    assert score_run(score)[0].finished, "nothing has changed"
    killed(run)
    mine.write_text("from saap_jax.estimation.activations import fluctuation as wanda\n")
    with pytest.raises(ValueError, match=rf"by the digests of estimators of {mine} \(.* -> "):
        score_run(score)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "frontier", "sensitivity"])
def test_records_of_other_candidates_are_refused(name, tiny_model_directory, text, tmp_path):
    call, config, _ = jobs_of(str(tiny_model_directory), text, str(tmp_path))[name]
    call(config)
    run = RunDirectory(tmp_path / "run", read_run(tmp_path / "run"))
    killed(run)
    call(config)
    killed(run)
    row = run.candidates()[0]
    run.append(row | {"candidate": "WANDA@0.2"})
    with pytest.raises(ValueError, match="expected candidates of this configuration, got 'WANDA@0.2'; the file was"):
        call(config)


def test_keep_sets_are_held_against_ratio_and_units(tiny_model_directory, tmp_path):
    model = load_model(tiny_model_directory)
    run = RunDirectory.open(tmp_path / "run", {})
    whole = existing_units(model.segments)
    half = {name: np.arange(units.shape[1]) % 2 < np.ones_like(units) for name, units in whole.items()}
    ratios = {"half@0.4": 0.4, "none@0": 0.0}
    save_keeps(run, {"half@0.4": half, "none@0": whole})
    found = read_keeps(run, LlamaSubject(model), ratios | {"other@0.1": 0.1})
    assert found.keys() == ratios.keys()
    np.testing.assert_array_equal(found["half@0.4"]["mlp"], half["mlp"])
    for keep, said in (
        (whole, "removes 0.0000 of the prunable parameters, less than 0.4"),
        (half | {"mlp": np.ones((3, 24), bool)}, "is not of this model"),
        (half | {"mlp": half["mlp"].astype(float)}, "is not of this model"),
    ):
        save_keeps(run, {"half@0.4": keep})
        with pytest.raises(ValueError, match=rf"keeps\.npz: the keep-set of half@0\.4 {said}"):
            read_keeps(run, LlamaSubject(model), ratios)


@pytest.mark.slow
def test_fidelity_is_shown_and_mended_without_its_model(tiny_model_directory, text, tmp_path, monkeypatch):
    config = dataclasses.replace(
        jobs_of(str(tiny_model_directory), text, str(tmp_path))["fidelity"][1], channels_per_layer=2, resamples=20
    )
    run, rows, *_ = fidelity.judge(config)
    figure = (run.path / "fidelity.svg").read_bytes()
    (run.path / "fidelity.svg").unlink()
    monkeypatch.setattr("saap_jax.jobs.job.open_subject", None)
    np.testing.assert_equal(fidelity.judge(config)[1], rows)
    assert (run.path / "fidelity.svg").read_bytes() == figure
    monkeypatch.undo()
    lines = (run.path / "ablation.jsonl").read_bytes()
    (run.path / "ablation.jsonl").write_bytes(
        b'["mlp", 0]\n{"a": 1}\n["mlp", 99, 0, 1.0]\n["x", 0, 0, 1.0]\n\xff\n' + lines[:40]
    )
    killed(run)
    np.testing.assert_equal(fidelity.judge(config)[1], rows)
