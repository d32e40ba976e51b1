"""What commands say of what pruning cost: figures of `saap evaluate`, and what `generate` says, on page and card."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard

from saap_jax.config.jobs import CompareConfig, PruneConfig
from saap_jax.config.method import EvaluationConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.config.use import EvaluateConfig, GenerateConfig
from saap_jax.contrib.serving.generate import generate
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.jobs import compare, judged, prune
from saap_jax.jobs.evaluate import evaluate
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.recovery import command as recover
from saap_jax.report.write import render_report
from saap_jax.runs.origin import read_origin
from saap_jax.runtime.progress import quiet
from saap_jax.subjects.base import Size
from saap_jax.types import WindowLosses
from tests.jobs.conftest import tiny

WINDOWS = EvaluationConfig(windows=9, length=16, batch_size=4)


@pytest.fixture(autouse=True)
def judged_here(judged_nowhere, monkeypatch):
    monkeypatch.setattr(judged, "PROMPTS", ("the cat sat", "a dog ran far on"))
    monkeypatch.setattr(prune, "texts_of", judged.texts_of)
    for job in (compare, prune):
        monkeypatch.setattr(job, "written_by", judged.written_by)
    monkeypatch.setattr(recover, "written", judged.written)


@pytest.fixture
def config(tiny_model_directory, tmp_path) -> PruneConfig:
    options = {"method": "wanda", "ratio": 0.3, "evaluation": WINDOWS, "out": str(tmp_path / "pruned")}
    return tiny(PruneConfig, tiny_model_directory, tmp_path, examples=8, **options)


@pytest.mark.slow
def test_figures_are_those_of_evaluate(config, tmp_path):
    pruned = prune.prune(config)
    sources = (WINDOWS.in_domain, WINDOWS.out_of_domain)
    models = (config.model.name, config.out)
    rows = evaluate(EvaluateConfig(models=models, sources=sources, windows=9, length=16, batch_size=4))
    for name, model in zip((judged.DENSE, judged.PRUNED), models, strict=True):
        assert pruned.judged.models[name]["ppl"] == pytest.approx(rows[model].ppl, rel=1e-5)
    assert rows[models[0]].ppl != pytest.approx(rows[models[1]].ppl, rel=1e-5)  # control
    assert min(map(min, pruned.judged.seconds)) > 0
    assert pruned.judged.tokens == 4 * 16
    said = dict(pruned.rows)
    for metric, value in rows[models[1]].ppl.items():
        assert f"-> {format_figure(value, scale_of(metric))} (" in said[metric]
    (step,) = read_origin(Path(config.out))["steps"]
    assert {figure["model"] for figure in step["figures"]} == {"dense", "pruned"}
    assert step["written"] == pruned.written
    assert {name for text in pruned.written for name in text["texts"]} == {"dense", "pruned"}
    card = ModelCard.load(f"{config.out}/README.md").content
    assert all(metric in card for metric in pruned.judged.models["dense"]["ppl"])
    unjudged = prune.prune(dataclasses.replace(config, judge=False, out=str(tmp_path / "other")))
    assert (unjudged.judged, unjudged.written) == (None, [])


def test_the_change_has_its_interval_and_too_few_windows_none():
    rng = np.random.default_rng(0)
    dense = rng.normal(3, 0.5, 12)
    worse = dense + rng.normal(0.3, 0.05, 12)
    name = "ppl@16 a"
    models = {
        key: {"ppl": {name: float(np.exp(each.mean()))}, "losses": {name: each.tolist()}}
        for key, each in ((judged.DENSE, dense), (judged.PRUNED, worse))
    }
    times = [0.2, 0.2, 0.2], [0.1, 0.12, 0.1]
    found = set()
    for articles in ([], [0, 0, 1, 1, 2, 2, *range(3, 9)]):
        rows = judged.judged_rows(judged.Judged(models, times, 100, {name: articles}))
        value, low, high = paired_difference(worse[None], dense[None], articles=articles).percent
        assert rows[1] == ("", f"{value:+.1f} % ({low:+.1f} to {high:+.1f} %, 95 % interval)")
        found.add(tuple(rows[:2]))
    assert len(found) == 2, "control"
    assert rows[-1][1] == "200.0 -> 100.0, −50.0 % (−50.0 to −40.0 %, 3 rounds)"
    few = {key: {"ppl": each["ppl"], "losses": {name: each["losses"][name][:4]}} for key, each in models.items()}
    assert not any("interval" in said for _, said in judged.judged_rows(judged.Judged(few, times, 100, {})))


@pytest.mark.parametrize(
    ("count", "most", "turns"),
    [(9, None, (4, 4)), (9, 2, (2, 4)), (3, None, (3, 3)), (12, None, (3, 3)), (14, 3, (3, 4)), (18, 3, (3, 5))],
)
def test_both_models_take_turns_and_every_window_counts_once(count, most, turns, monkeypatch):
    text, order, clock = np.arange(count, dtype=float), [], [0]
    monkeypatch.setattr(judged, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def losses(self, part, rows):
            order.append(self.name)
            clock.append(len(part))
            return WindowLosses(part * 2, np.full(len(part), 2))

    subject = SimpleNamespace(size=lambda text: Size(rows=len(text), length=1, tokens=len(text)))
    (dense, cut), seconds = judged.in_turns.__wrapped__(subject, Model("dense"), Model("cut"), text, 4, most)
    assert cut.means.tolist() == text.tolist()
    assert dense.means.tolist() == text[: len(dense.means)].tolist()
    assert (order.count("dense"), order.count("cut")) == turns
    assert order[:4] == ["dense", "cut"] * 2
    assert [len(each) for each in seconds] == [min(2, (most or 3) - 1)] * 2, "in the same turns"
    assert {*seconds[0], *seconds[1]} == {min(count, 4)}, "a pass over fewer windows is another program"


@pytest.mark.slow
def test_what_models_write_is_what_generate_says(config, tmp_path):
    evaluation = EvaluationConfig(windows=2, length=16, batch_size=2)
    shared = {"model": config.model, "calibration": config.calibration, "evaluation": evaluation}
    asked = CompareConfig(methods=("magnitude",), ratios=(0.5,), cut=True, new_tokens=6, runs=str(tmp_path), **shared)
    run = compare.compare(asked)
    models = {"dense": config.model.name, "pruned": str(run.path / "best")}
    texts = run.record["written"]
    assert [text["prompt"] for text in texts] == list(judged.PROMPTS)
    for name, model in models.items():
        options = GenerateConfig(model=model, prompts=judged.PROMPTS, new_tokens=6)
        said = [f"--- {number}\n{text['texts'][name]}\n" for number, text in enumerate(texts, 1)]
        assert [*generate(options)] == said
    assert len({text["texts"][name] for text in texts for name in models}) > 1, "negative control"
    assert read_origin(run.path / "best")["steps"][0]["written"] == texts
    for page in (render_report(run.path), (run.path / "best" / "README.md").read_text()):
        assert "What they write" in page
    none = compare.compare(dataclasses.replace(asked, new_tokens=0, name="none"))
    assert "written" not in none.record
    assert "What they write" not in render_report(none.path)


def test_no_more_is_written_than_the_positions(tiny_model_directory, monkeypatch):
    model, tokenizer = load_model(tiny_model_directory), load_tokenizer(tiny_model_directory)
    longest = max(len(tokenizer.encode(prompt)) for prompt in judged.PROMPTS)
    asked: list[int] = []

    def written(*_, max_new_tokens):
        asked.append(max_new_tokens)
        return iter([(0, "x"), (0, "y")])

    monkeypatch.setattr("saap_jax.llama.generate.stream_texts", written)
    short = [load_model(tiny_model_directory) for _ in range(2)]
    for each, more in zip(short, (3, 0), strict=True):
        each.constants = dataclasses.replace(each.constants, max_positions=longest + more)
    assert judged.written({"dense": model, "pruned": short[0]}, tokenizer, 64, quiet)[0]["texts"]["pruned"] == "xy"
    assert asked == [3, 3]
    assert judged.written({"dense": model, "pruned": short[1]}, tokenizer, 64, quiet) == []
    monkeypatch.setattr(judged, "PROMPTS", ("the cat sat", ""))
    assert judged.written({"dense": model}, tokenizer, 64, quiet) == [], "a prompt without a token"


@pytest.mark.slow
def test_recover_lets_all_three_models_write(tiny_model_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    options = RecoverConfig(
        model=str(tiny_model_directory),
        dense=str(tiny_model_directory),
        method=MethodConfig(name="full"),
        data=TrainingTextConfig(sources=(f"text:{text}",), length=16),
        training=TrainingConfig(max_steps=4, batch_size=4, microbatch=4, warmup=1, check_every=2, learning_rate=0.05),
        evaluation=EvaluationConfig(windows=2, length=16, batch_size=2),
        new_tokens=2,
        repeats=1,
        runs=str(tmp_path),
    )
    run = recover.recover(options)
    texts = run.record["written"]
    assert [text["prompt"] for text in texts] == list(judged.PROMPTS)
    assert all(text["texts"]["dense"] == text["texts"]["pruned"] for text in texts), "one model under two names"
    assert any(text["texts"]["recovered"] != text["texts"]["pruned"] for text in texts), "negative control"
    assert read_origin(run.path / "model")["steps"][-1]["written"] == texts
    assert run.record["after"]["tokens_per_second"] > 0
