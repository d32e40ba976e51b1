"""What `saap prune` says of what it cost: the figures of `saap evaluate`, in the table, the card and what is next."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from saap_jax.cli import main
from saap_jax.config.judge import EvaluateConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.jobs import judged, prune
from saap_jax.jobs.evaluate import evaluate
from saap_jax.runs.origin import read_origin

WINDOWS = EvaluationConfig(windows=9, length=16, batch_size=4)


@pytest.fixture(autouse=True)
def judged_here(judged_nowhere, monkeypatch):
    monkeypatch.setattr(prune, "texts_of", judged.texts_of)


@pytest.fixture
def config(tiny_model_directory, tmp_path) -> PruneConfig:
    calibration = CalibrationConfig(examples=8, length=16, batch_size=2)
    return PruneConfig(
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=calibration,
        estimator="wanda",
        ratio=0.3,
        evaluation=WINDOWS,
        out=str(tmp_path / "pruned"),
    )


@pytest.mark.slow
def test_figures_are_those_of_evaluate(config):
    pruned = prune.prune(config)
    sources = (WINDOWS.in_domain, WINDOWS.out_of_domain)
    models = (config.model.name, config.out)
    rows = evaluate(EvaluateConfig(models=models, sources=sources, windows=9, length=16, batch_size=4))
    for name, model in zip((judged.DENSE, judged.PRUNED), models, strict=True):
        assert pruned.judged.models[name]["ppl"] == pytest.approx(rows[model].ppl, rel=1e-5)
    assert rows[models[0]].ppl != pytest.approx(rows[models[1]].ppl, rel=1e-5)  # control
    assert min(pruned.judged.seconds) > 0
    assert pruned.judged.tokens == 4 * 16
    said = dict(prune.summary_rows(pruned))
    for metric, value in rows[models[1]].ppl.items():
        assert f"-> {format_figure(value, scale_of(metric))} (" in said[metric]
    steps = read_origin(Path(config.out))["steps"]
    assert {figure["model"] for figure in steps[0]["figures"]} == {"dense", "pruned"}
    card = ModelCard.load(f"{config.out}/README.md").content
    assert all(metric in card for metric in pruned.judged.models["dense"]["ppl"])


def test_the_change_has_its_interval_and_too_few_windows_none():
    rng = np.random.default_rng(0)
    dense = rng.normal(3, 0.5, 12)
    worse = dense + rng.normal(0.3, 0.05, 12)
    name = "ppl@16 a"
    models = {
        key: {"ppl": {name: float(np.exp(each.mean()))}, "losses": {name: each.tolist()}}
        for key, each in ((judged.DENSE, dense), (judged.PRUNED, worse))
    }
    rows = judged.judged_rows(judged.Judged(models, (0.2, 0.1), 100))
    value, low, high = paired_difference(worse[None], dense[None]).percent
    assert rows[1] == ("", f"{value:+.1f} % ({low:+.1f} to {high:+.1f}, 95 % interval)")
    assert rows[-1][1] == "500 -> 1,000 (+100.0%)"
    few = {key: {"ppl": each["ppl"], "losses": {name: each["losses"][name][:4]}} for key, each in models.items()}
    assert not any("interval" in said for _, said in judged.judged_rows(judged.Judged(few, (0.2, 0.1), 100)))


@pytest.mark.slow
def test_on_the_command_line(config, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One sentence after the other, and another one. " * 200)
    words = ["prune", "--model.name", config.model.name, "--method", "wanda",
             "--calibration.length", "16", "--calibration.examples", "4", "--evaluation.length", "16",
             "--evaluation.windows", "8"]  # fmt: skip
    same = ["--calibration.scenarios", f"text:{text}", "--evaluation.in-domain", f"text:{text}"]
    assert main.main([*words, *same, "--out", str(tmp_path / "same")]) == 2
    assert not (tmp_path / "same").exists()
    capsys.readouterr()
    assert main.main([*words, "--out", config.out]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ppl@16 builtin:reference\s+[\d.,e+]+ \(.* to .*\) -> ", said)
    assert f"saap ab {config.out} {config.model.name}" in said
    assert main.main([*words, "--no-judge", "--out", str(tmp_path / "other")]) == 0
    assert "ppl@" not in capsys.readouterr().out
