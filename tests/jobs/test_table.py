"""Commands that keep a run: they show it, go on after a kill, refuse in one line, and then leave nothing."""

import dataclasses
import itertools

import pytest

from saap_jax.cli import main
from saap_jax.config.jobs import CompareConfig, FrontierConfig, SensitivityConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.contrib.frontier import command as frontier
from saap_jax.contrib.sensitivity import command as sensitivity
from saap_jax.jobs import candidates, compare
from tests.cli.test_main import refused

SMALL = [
    *("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2"),
    *("--evaluation.windows", "8", "--evaluation.length", "16", "--evaluation.batch-size", "2"),
]
JOBS = {
    "compare": (compare.compare, CompareConfig(
        methods=("magnitude", "{wanda,gate_fisher} > {uniform,global}", "wanda > global > least_squares"), new_tokens=0,
    ), 6),
    "race": (compare.compare, CompareConfig(
        methods=("{magnitude,gate_taylor,random,wanda}", "wanda > uniform > bias"), ratios=(0.6,), race=True,
    ), 5),
    "frontier": (frontier.frontier, FrontierConfig(
        methods=("gate_fisher > global", "wanda > global"), ratios=(0.1, 0.3, 0.5), max_ppl_increase="6%",
        tolerance=0.05, resamples=50, seeds=(0, 3),
    ), 9),
    "sensitivity": (sensitivity.sensitivity, SensitivityConfig(
        method="gate_fisher > uniform", fractions=(0.2, 0.5, 1.0), ratio=0.15,
    ), 5),
}  # fmt: skip
"""Job, configuration, and a late moment to be killed at: so many results are kept by then."""


def found(run) -> tuple:
    """Return what a run found, without times, in whatever order candidates came."""
    rows = sorted(({**row, "seconds": 0} for row in run.candidates()), key=lambda row: row["candidate"])
    trials = [{**trial, "seconds": 0} for trial in run.record.get("trials", [])]
    return rows, trials, run.record.get("frontier"), run.record.get("race"), {**run.record["dense"], "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_killed_it_goes_on_to_the_same_end(name, tiny_model_directory, tmp_path, monkeypatch):
    """To the last bit of what is measured; what was kept is not made again, and a finished run is shown at once."""
    job, config, late = JOBS[name]
    config = dataclasses.replace(
        config,
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=8, length=16, batch_size=2),
        evaluation=EvaluationConfig(windows=16, length=16, batch_size=8),
    )
    whole = job(dataclasses.replace(config, runs=str(tmp_path / "whole")))
    killed, keep, kept = dataclasses.replace(config, runs=str(tmp_path / "killed")), candidates.FileCache.keep, []
    for moment in (0, 2, late):
        count = itertools.count()

        def dying(self, key, value, count=count, moment=moment):
            if next(count) == moment:
                raise KeyboardInterrupt
            assert key not in kept, "made again"
            kept.append(key)
            keep(self, key, value)

        with monkeypatch.context() as patch:
            patch.setattr(candidates.FileCache, "keep", dying)
            with pytest.raises(KeyboardInterrupt):
                job(killed)
    again = job(killed)
    assert found(again) == found(whole)
    before = (again.path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("saap_jax.jobs.job.open_subject", lambda *_, **__: pytest.fail("loaded a model"))
    assert job(killed).finished
    assert (again.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("frontier --methods magnitude --ratios 0.2 0.4 0.6 --max-ppl-increase 20%", "largest ratio within +20 %"),
        ("sensitivity --fractions 0.25 0.5", "25 % of the units of one place"),
    ],
)
def test_what_is_shown(words, said, tiny_model_directory, tmp_path, capsys):
    """The same again prints what is there; commands to copy are one line, however long."""
    command = [*words.split(), "--model.name", str(tiny_model_directory), "--runs", str(tmp_path), *SMALL]
    for _ in range(2):
        assert main.main(command) == 0
        text = capsys.readouterr().out
        assert said in text
        assert "magnitude" in text or "wanda" in text
        assert "report.html" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frontier --max-ppl-increase 10", "max_ppl_increase: expected a percentage with its sign, got '10'"),
        ("frontier --ratios 0.0 0.2", "ratios: expected numbers above 0"),
        ("frontier --tolerance 0", "tolerance: expected a ratio in [0.0005, 1), got 0.0"),
        (
            "frontier --ratios 0.2 0.99",
            "ratio: 0.99 of the prunable parameters cannot be removed; the largest possible ratio is 0.7",
        ),
        ("frontier --methods gate_fischer", "did you mean 'gate_fisher'"),
        ("sensitivity --fractions 0.0 0.5", "fractions: expected numbers in (0, 1], got [0.0, 0.5]"),
        (
            "sensitivity --method magnitude>within(attention=0.0,multiple_of={mlp:4096})>uniform",
            "the largest possible ratio is 0.0000",
        ),
        ("sensitivity --method fast", "method: expected a chain that scores units once, got fast, which chooses"),
        ("sensitivity --method magnitude>within(protect=(2,))", "protect: expected layers in [-2, 2) of this model"),
        ("compare --methods wanda>within(protect=(0,1))", "largest possible ratio is 0"),
        ("compare --methods wanda>learn", "learn: expected at"),
        ("compare --methods wanda>within(max_ratio={heads:0})", "within.max_ratio: expected some of attention, mlp"),
        ("compare --race --evaluation.windows 7", "evaluation.windows: expected at least 8 for a race, got 7"),
    ],
)
def test_refused_before_anything_is_scored(words, message, tiny_model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("saap_jax.subjects.llama.observe", lambda *_, **__: pytest.fail("scored"))
    name, *rest = words.split()
    more = ["--model.name", str(tiny_model_directory), "--runs", str(tmp_path / "runs"), *SMALL]
    assert message in refused(capsys, [name, *more, *rest])
    assert not (tmp_path / "runs").exists()
