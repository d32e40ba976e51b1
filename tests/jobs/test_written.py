"""What models write for people to look at: what `generate` says of each, as far as positions go, on page and card."""

import dataclasses
from pathlib import Path

import pytest

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.config.use import GenerateConfig
from saap_jax.jobs import compare, judged, prune, recover
from saap_jax.jobs import written as module
from saap_jax.jobs.generate import write_texts
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.report.pages.common import written_section
from saap_jax.report.write import render_report
from saap_jax.runs.origin import read_origin
from saap_jax.runtime.progress import quiet


@pytest.fixture(autouse=True)
def written_here(monkeypatch):
    monkeypatch.setattr(module, "PROMPTS", ("the cat sat", "a dog ran far on"))
    for job in (compare, prune):
        monkeypatch.setattr(job, "written_by", module.written_by)
    monkeypatch.setattr(recover, "written", module.written)


@pytest.fixture
def config(tiny_model_directory, tmp_path) -> CompareConfig:
    return CompareConfig(
        name="written",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=4, length=16, batch_size=2),
        methods=("magnitude",),
        evaluation=EvaluationConfig(windows=2, length=16, batch_size=2),
        ratios=(0.5,),
        new_tokens=6,
        runs=str(tmp_path),
    )


@pytest.mark.slow
def test_it_is_what_generate_says(config):
    run = compare.compare(config)
    models = {"dense": config.model.name, "pruned": str(run.path / "best")}
    texts = run.record["written"]
    assert [text["prompt"] for text in texts] == list(module.PROMPTS)
    for name, model in models.items():
        options = GenerateConfig(model=model, prompts=module.PROMPTS, max_new_tokens=6)
        said: list[str] = []
        write_texts(options, said.append, with_prompts=False)
        assert said == [f"--- {number}\n{text['texts'][name]}\n" for number, text in enumerate(texts, 1)]
    assert len({text["texts"][name] for text in texts for name in models}) > 1, "negative control"
    assert read_origin(run.path / "best")["steps"][0]["written"] == texts
    page, card = render_report(run.path), (run.path / "best" / "README.md").read_text()
    assert "What they write" in page
    assert "What they write" in card
    none = compare.compare(dataclasses.replace(config, new_tokens=0, name="none"))
    assert "written" not in none.record
    assert "What they write" not in render_report(none.path)


def test_no_more_than_the_positions(tiny_model_directory, monkeypatch):
    model, tokenizer = load_model(tiny_model_directory), load_tokenizer(tiny_model_directory)
    longest = max(len(tokenizer.encode(prompt)) for prompt in module.PROMPTS)
    asked: list[int] = []
    monkeypatch.setattr(
        module, "stream_texts", lambda *_, max_new_tokens: asked.append(max_new_tokens) or iter([(0, "x"), (0, "y")])
    )
    short = [load_model(tiny_model_directory) for _ in range(2)]
    for each, more in zip(short, (3, 0), strict=True):
        each.constants = dataclasses.replace(each.constants, max_positions=longest + more)
    assert module.written({"dense": model, "pruned": short[0]}, tokenizer, 64, quiet)[0]["texts"]["pruned"] == "xy"
    assert asked == [3, 3]
    assert module.written({"dense": model, "pruned": short[1]}, tokenizer, 64, quiet) == []
    assert written_section([]) == []
    monkeypatch.setattr(module, "PROMPTS", ("the cat sat", ""))
    assert module.written({"dense": model}, tokenizer, 64, quiet) == [], "a prompt without a token"


@pytest.mark.slow
def test_prune_lets_both_models_write_where_it_judges(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "texts_of", judged.texts_of)
    options = PruneConfig(
        model=config.model,
        calibration=config.calibration,
        evaluation=config.evaluation,
        method="magnitude",
        runs=str(tmp_path),
        ratio=0.3,
        out=str(tmp_path / "pruned"),
    )
    pruned = prune.prune(options)
    steps = read_origin(Path(options.out))["steps"]
    assert steps[0]["written"] == pruned.written
    assert {name for text in pruned.written for name in text["texts"]} == {"dense", "pruned"}
    unjudged = prune.prune(dataclasses.replace(options, judge=False, out=str(tmp_path / "other")))
    assert unjudged.written == []


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
    assert [text["prompt"] for text in texts] == list(module.PROMPTS)
    assert all(text["texts"]["dense"] == text["texts"]["pruned"] for text in texts), "one model under two names"
    assert any(text["texts"]["recovered"] != text["texts"]["pruned"] for text in texts), "negative control"
    assert read_origin(run.path / "model")["steps"][-1]["written"] == texts
    assert "What they write" in (run.path / "report.html").read_text()
