"""Bad values are refused where they enter, with the value in the message."""

import contextlib

import pytest

from saap_jax import config as c
from saap_jax.checks import check_values
from saap_jax.config import method as o
from saap_jax.config import recover as r
from saap_jax.steps.chain import parse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.CompareConfig(ratios=(0.2, 1.0)), r"ratios: expected numbers in \[0, 1\), got 1.0"),
        (lambda: c.CompareConfig(ratios=(float("nan"),)), "got nan"),
        (lambda: c.CompareConfig(ratios=()), "got none"),
        (lambda: c.CompareConfig(ratios=(0.2, 0.2)), "each once"),
        (lambda: c.CompareConfig(best_ratio=0.3), r"best_ratio: expected one of ratios \[0.2, 0.5\], got 0.3"),
        (lambda: c.CompareConfig(name="a/b"), "name: expected letters, .* got 'a/b'"),
        (lambda: c.CompareConfig(name="NaN"), "no number's name, got 'NaN'"),
        (lambda: c.PruneConfig(ratio=1.5), r"ratio: expected a number in \[0, 1\), got 1.5; did you mean 0.015\?"),
        (lambda: c.CompareConfig(ratios=(20.0, 50.0)), r"got 20.0; did you mean 0.2 0.5\?"),
        (lambda: c.CompareConfig(best_ratio=50.0), r"got 50.0; did you mean 0.5\?"),
        (lambda: c.CompareConfig(new_tokens=64), "new_tokens: expected --cut, .* beside it, got 64; or leave it out"),
        (lambda: o.CalibrationConfig(seed=2**32), r"calibration.seed: expected a number in \[0, 2\^32\)"),
        (lambda: c.CompareConfig(seeds=(0, -1)), r"seeds: expected a number in"),
        (lambda: parse("wanda > uniform > rounds(10.0)"), r"rounds.every: .* got 10.0; did you mean 0.1\?"),
        (lambda: parse("wanda > within(attention=5.0)"), r"within.attention: .* did you mean 0.05\?"),
        (
            lambda: c.ScoreConfig(calibration=o.CalibrationConfig(examples=0)),
            "calibration.examples: expected at least one",
        ),
        (
            lambda: c.ScoreConfig(calibration=o.CalibrationConfig(scenarios=())),
            r"calibration.scenarios: expected at least one, or a model of a factory beside it, got \(\)",
        ),
        (lambda: c.CompareConfig(ratios=(0.3333333, 0.3333334)), "ratios: .* each once, got 0.333333, 0.333333"),
        (lambda: c.SensitivityConfig(fractions=(0.3333333, 0.3333334)), "fractions: .* each once, got 0.333333, 0.33"),
        (lambda: o.EvaluationConfig(batch_size=0), "evaluation.batch_size: expected at least 1, got 0"),
        (
            lambda: o.EvaluationConfig(in_domain="a.txt", out_of_domain="a.txt"),
            "another text than in_domain, got 'a.txt'",
        ),
        (lambda: o.EvaluationConfig(drawn=0, windows=0), "^evaluation.drawn: expected 1 window or more, .* got 0"),
        (lambda: r.MethodConfig(matrices=()), "method.matrices: expected at least one"),
        (lambda: r.MethodConfig(scale=float("nan")), "method.scale: expected a finite number"),
        (lambda: r.TrainingTextConfig(sources=("a.txt", "a.txt")), "data.sources: .* each once"),
        (lambda: r.TrainingTextConfig(held_out=1.0), r"data.held_out: expected a number in \[0, 1\), got 1.0"),
        (lambda: r.TrainingConfig(distillation=1.5), r"training.distillation: expected a number in \[0, 1\], got 1.5"),
        (lambda: r.TrainingConfig(batch_size=8, microbatch=3), "expected a divisor of batch_size 8, got 3"),
        (lambda: r.TrainingConfig(learning_rate=0.0), "training.learning_rate: expected a number above 0, got 0.0"),
        (lambda: r.TrainingConfig(clip=-1.0), "training.clip: expected a number of at least 0, got -1.0"),
        (lambda: r.TrainingConfig(temperature=1.0), "training.temperature: expected training.distillation above 0"),
        (lambda: r.MethodConfig(name="lora", bits=8), "method.bits: expected --method.name groupwise beside it, got 8"),
        (lambda: r.MethodConfig(name="full", rank=4), "method.rank: expected a --method.name with adapters beside it"),
        (
            lambda: r.RecoverConfig(training=r.TrainingConfig(patience=3), data=r.TrainingTextConfig(held_out=0.0)),
            "training.patience: expected held-out text",
        ),
        (lambda: c.FrontierConfig(race_margin=0.1), "race_margin: expected --race beside it, got 0.1; or leave it out"),
        (lambda: c.TargetsConfig(parameters="70%", at="8x64"), "targets.at: expected a target that counts prompts"),
        (lambda: c.TargetsConfig(macs="70%", repeats=9), "targets.repeats: expected a target of time beside it, got 9"),
        (lambda: c.PlanConfig(search=True, batch=8), "batch: expected no --search, .* got 8"),
        (lambda: c.PlanConfig(search=True, mesh=c.MeshConfig(data=-1)), "mesh.data: expected no --search, .* got -1"),
        (lambda: c.EvaluateConfig(limit=9), "limit: expected --tasks beside it, got 9"),
        (lambda: c.GenerateConfig(prompts=("a",), top_k=5), "top_k: expected a --temperature above 0 beside it, got 5"),
        (lambda: c.DiscoverConfig(details=True), "details: expected MODULE:FACTORY or FILE.py:FACTORY beside it"),
        (lambda: c.ScoreConfig(from_run="a", keep_statistics="none"), "keep_statistics: expected no --from-run"),
        (lambda: c.RunsConfig(delete=True), "delete: expected names of runs"),
        (lambda: r.RecoverConfig(new_tokens=1), "new_tokens: expected 0, or at least 2"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("ratios", "given", "cut"),
    [((0.2, 0.5), None, 0.2), ((0.3,), None, 0.3), ((0.5, 0.3), None, 0.3), ((0.0, 0.4), None, 0.4), ((0.0,), None, 0),
     ((0.3, 0.5), 0.5, 0.5)],
)  # fmt: skip
def test_the_ratio_of_the_cut_model_follows_from_the_ratios(ratios, given, cut):
    assert c.CompareConfig(ratios=ratios, best_ratio=given).cut_ratio == cut


def test_a_directory_that_lies_here_is_no_factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert o.ModelConfig(name="models:small").traced
    (tmp_path / "models:small").mkdir()
    assert not o.ModelConfig(name="models:small").traced
    assert o.is_factory(f"{'long' * 99}.py:made"), "longer than names of files are"


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (c.ScoreConfig, "runs", {}, "runs: expected str, got {}"),
        (c.ScoreConfig, "from_run", ("a",), r"from_run: expected str, got \('a',\)"),
        (c.ScoreConfig, "model", o.ModelConfig, "model: expected ModelConfig, got <class"),
        (c.ScoreConfig, "estimators", ("wanda", 1), "estimators: expected tuple"),
        (o.CalibrationConfig, "examples", 2.0, "examples: expected int, got 2.0"),
        (c.ScoreConfig, "keep_statistics", ["all"], "keep_statistics: expected one of"),
        (c.ScoreConfig, "keep_statistics", "some", "keep_statistics: expected one of .*, got 'some'"),
        (c.CompareConfig, "ratios", (True, 0.2), r"ratios: expected tuple\[float, ...\], got \(True, 0.2\)"),
        (c.PruneConfig, "method", None, "method: expected str, got None"),
        (c.AbConfig, "max_accuracy_drop", 2**53, r"max_accuracy_drop: expected float \| None"),
        (c.AbConfig, "max_accuracy_drop", -1, "max_accuracy_drop: expected a number of at least 0"),
        (c.TargetsConfig, "at", "8x0", "at: expected rows and tokens of each, such as 8x4096, got '8x0'"),
        (c.CompareConfig, "ratios", [0, 0.2], ""),
        (c.AbConfig, "max_accuracy_drop", 3, ""),
    ],
)
def test_types_of_fields(kind, field, value, message):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_values(kind, {field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": "70"}, "targets.latency: expected a percentage .* one of the units us, ms, s, such as 250ms, got"),
        ({"macs": "0G"}, "targets.macs: expected .* a number above 0 with one of the units M, G, T, such as 10G"),
        ({"parameters": "many"}, "targets.parameters: expected .* such as 100M, got 'many'"),
        ({"tokens_per_second": "-3"}, "targets.tokens_per_second: expected .* a number above 0, such as 40, got '-3'"),
    ],
)
def test_bad_targets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        c.TargetsConfig(**options)
