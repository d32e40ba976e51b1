"""The comparison on a tiny model: what a run leaves behind, what it does not do twice, what it compiles."""

import dataclasses
import datetime
import json
import shlex
import shutil
import time
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import saap_jax
from saap_jax.cli.arguments import parse as parse_words
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.errors import Doubt
from saap_jax.estimation.observe import observe_step
from saap_jax.evaluation.perplexity import candidates_step, loss_step
from saap_jax.jobs import compare, prune
from saap_jax.llama.files.load import load_keep
from saap_jax.runs.commands import prune_command
from saap_jax.runs.directory import RunDirectory
from saap_jax.structures.discovery import weight_bytes
from saap_jax.subjects.llama import LlamaSubject, open_subject, scenarios_of, texts_of
from saap_jax.surgery.compensation import compensate
from tests.jobs.conftest import tiny

IN, OUT = "ppl@16 builtin:reference", "ppl@16 builtin:descriptions"
REPAIRED = "wanda > global > learn(steps=4) > least_squares > scales(steps=2)"
METHODS = ("magnitude", "{wanda,gate_fisher} > {uniform,global}", REPAIRED)


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    runs = tmp_path_factory.mktemp("runs")
    options = {"name": "tiny", "methods": METHODS, "cut": True, "best_ratio": 0.2}
    return tiny(CompareConfig, tiny_model_directory, runs, examples=8, windows=5, **options)


@pytest.fixture(scope="module")
def run(config) -> RunDirectory:
    for step in (observe_step, loss_step, candidates_step):
        step.clear_cache()
    run = compare.compare(config)
    assert candidates_step._cache_size() <= 2, "the dense model and all masked candidates; those with other weights"
    return run


def rows_of(run) -> list[dict]:
    """Return what was measured, without times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.candidates()]


def model_and_text(config):
    model, tokenizer = saap_jax.load_model(config.model.name), saap_jax.load_tokenizer(config.model.name)
    return model, scenarios_of(config.calibration, tokenizer), texts_of(config.evaluation, tokenizer)


def test_the_run_holds_every_candidate(config, run):
    names = ["magnitude", *(f"{a} > {b}" for a in ("wanda", "gate_fisher") for b in ("uniform", "global")), REPAIRED]
    assert [row["candidate"] for row in run.candidates()] == [f"{n}@{r}" for r in config.ratios for n in names]
    assert run.finished
    for row in run.candidates():
        assert row["ratio_asked"] <= row["ratio_actual"] < row["ratio_asked"] + 0.15
        assert set(row["ppl"]) == {IN, OUT}
    files = {path.name for path in run.path.iterdir()}
    assert files >= {"run.json", "metrics.jsonl", "scores.npz", "keeps.npz", "keep.json", "report.html", "best"}
    record = json.loads((run.path / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["load", "text", "score", "search", "evaluate", "cut"]
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert record["divergences"].keys() == {f"{REPAIRED}@{ratio}" for ratio in config.ratios}


def test_candidates_are_what_python_makes_of_their_chains(config, run):
    """Keep-sets, weights and losses of a session that knows no run; another chain has others."""
    model, scenarios, texts = model_and_text(config)
    for row in run.candidates():
        state = saap_jax.run_chain(model, row["variant"], scenarios, row["ratio_asked"], batch_size=2)
        assert {name: kept.sum(axis=1).tolist() for name, kept in state.keep.items()} == row["kept"]
        for metric, windows in texts.items():
            ppl = saap_jax.perplexity(state.subject.model, windows, state.keep, batch_size=2)
            assert row["ppl"][metric] == pytest.approx(ppl, rel=1e-5)
    by_name = {row["variant"]: row["losses"][OUT] for row in run.candidates() if row["ratio_asked"] == 0.5}
    assert not np.allclose(by_name[REPAIRED], by_name["wanda > global"]), "control"


def test_the_best_is_cut_and_loads(config, run):
    best = run.record["best"]
    at_ratio = [row for row in run.candidates() if row["ratio_asked"] == config.cut_ratio]
    assert best["ppl_masked"][OUT] == min(row["ppl"][OUT] for row in at_ratio)
    loaded, dense = (saap_jax.load_model(each) for each in (run.path / "best", config.model.name))
    assert (best["bytes"], best["dense_bytes"]) == (weight_bytes(loaded), weight_bytes(dense)), "both in memory"
    assert saap_jax.count_parameters(loaded) == best["parameters"] < run.record["dense"]["parameters"]
    winner = next(row for row in at_ratio if row["candidate"] == best["candidate"])
    assert load_keep(run.path / "best")["mlp"].sum(axis=1).tolist() == winner["kept"]["mlp"]
    assert best["ppl"][OUT] == pytest.approx(best["ppl_masked"][OUT], rel=1e-3)


@pytest.mark.slow
def test_parameters_and_bytes_are_those_of_the_cut_model(config, tmp_path):
    """With the biases that a repair adds, and without what a file has beside the weights."""
    changes = {"methods": ("random > uniform > bias",), "ratios": (0.5,), "best_ratio": 0.5}
    run = compare.compare(dataclasses.replace(config, runs=str(tmp_path), **changes))
    (row,), best, dense = run.candidates(), run.record["best"], run.record["dense"]["parameters"]
    assert row["parameters"] == best["parameters"]
    assert row["parameters"] > dense - row["ratio_actual"] * run.record["model"]["prunable_parameters"], "control"
    assert (best["bytes"], best["dense_bytes"]) == (4 * best["parameters"], 4 * dense)


def test_a_cut_model_that_differs_from_the_masked_one_is_an_error(config, tmp_path, monkeypatch):
    """Negative control of the check above: cutting other units than those that were masked does not pass."""
    other = dataclasses.replace(config, runs=str(tmp_path), methods=("wanda",), ratios=(0.5,), best_ratio=0.5)
    flipped = lambda model, keep: saap_jax.cut(model, {n: k[:, ::-1] for n, k in keep.items()})  # noqa: E731
    monkeypatch.setattr("saap_jax.subjects.llama.cut", flipped)
    monkeypatch.setattr("saap_jax.subjects.llama.save_model", lambda model, path, **_: saap_jax.save_model(model, path))
    with pytest.raises(ValueError, match="expected the cut model to have the masked one's"):
        compare.compare(other)


class TestTheCache:
    def test_another_run_does_only_what_is_new(self, config, run, monkeypatch):
        """In one directory of runs neither scores nor losses are made twice; another option is another thing."""
        monkeypatch.setattr("saap_jax.subjects.llama.observe", lambda *_, **__: pytest.fail("scored again"))
        asked = []
        evaluate = LlamaSubject.losses
        monkeypatch.setattr(
            LlamaSubject,
            "losses",
            lambda self, *args, **options: (asked.append(args), evaluate(self, *args, **options))[1],
        )
        less = dataclasses.replace(config, name="less", methods=("wanda > uniform", "magnitude"), ratios=(0.2,))
        assert (
            rows_of(compare.compare(less))
            == [row for row in rows_of(run) if row["variant"] in less.methods and row["ratio_asked"] == 0.2][::-1]
        )
        assert asked == []
        more = dataclasses.replace(less, name="more", methods=("wanda > within(protect=(0,)) > uniform",))
        (row,) = compare.compare(more).candidates()
        assert len(asked) == 1
        assert row["kept"] != run.candidates()[1]["kept"]

    @pytest.mark.slow
    @pytest.mark.parametrize("change", [
        {"calibration": CalibrationConfig(examples=8, length=16, batch_size=2, seed=1)},
        {"evaluation": EvaluationConfig(windows=4, length=16, batch_size=2)},
        {"model": ModelConfig(name="", dtype="bfloat16")},
    ])  # fmt: skip
    def test_a_changed_input_is_never_served_an_old_result(self, config, run, change):
        """Text, windows, weights: in the same directory of runs each gives what it gives in a directory of its own."""
        change = {k: dataclasses.replace(v, name=config.model.name) if k == "model" else v for k, v in change.items()}
        options = {"methods": ("wanda",), "ratios": (0.5,), "best_ratio": 0.5}
        other = dataclasses.replace(config, name="-".join(change), **options, **change)
        found = compare.compare(other, overwrite=True)
        fresh = compare.compare(dataclasses.replace(other, runs=f"{config.runs}-{'-'.join(change)}"))
        assert rows_of(found) == rows_of(fresh)
        before = next(row for row in rows_of(run) if row["candidate"] == "wanda > uniform@0.5")
        assert rows_of(found)[0]["losses"] != before["losses"]

    def test_what_is_cut_is_not_repaired_again(self, config, tmp_path, monkeypatch):
        """Nor after a kill; where a run that cuts nothing left no model, one repair is done again."""
        repairs, killed = [], mock.Mock(side_effect=KeyboardInterrupt)
        count = lambda *args, **options: repairs.append(1) or compensate(*args, **options)  # noqa: E731
        monkeypatch.setattr("saap_jax.subjects.llama.compensate", count)
        methods = ("random > uniform > least_squares", "wanda > uniform > least_squares", "magnitude")
        asked = dataclasses.replace(config, runs=str(tmp_path / "a"), methods=methods)
        with mock.patch.object(compare, "_cut_best", killed), pytest.raises(KeyboardInterrupt):
            compare.compare(asked)
        run = compare.compare(asked)
        assert "least_squares" in run.record["best"]["candidate"]
        assert len(repairs) == 2 * len(config.ratios)
        assert not [each for each in (tmp_path / "a" / ".cache").iterdir() if each.is_dir()]
        other = dataclasses.replace(asked, runs=str(tmp_path / "b"))
        compare.compare(dataclasses.replace(other, name="uncut", cut=False))
        again = compare.compare(other)
        assert len(repairs) == 4 * len(config.ratios) + 1, "control"
        first, second = ((each.path / "best" / "model.safetensors").read_bytes() for each in (run, again))
        assert first == second


ESTIMATOR = """
import jax.numpy as jnp
from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.base import score_writers

def energy():
    def score(statistics, params):
        square = statistics.of(ACTIVATION_MOMENTS).square
        return score_writers(lambda w, s: {sign} * jnp.einsum("lucd,luc->lu", jnp.square(w), s), params, square)

    return Estimator(needs=frozenset({{ACTIVATION_MOMENTS}}), score=score)
"""


def test_a_run_goes_on_with_the_estimators_that_it_was_begun_with_alone(config, tmp_path):
    def killed(*_, **__):
        raise KeyboardInterrupt

    path, runs = tmp_path / "mine.py", str(tmp_path / "runs")
    path.write_text(ESTIMATOR.format(sign=1))
    asked = dataclasses.replace(config, runs=runs, methods=(f"{path}:energy", "magnitude"), cut=False)
    with mock.patch.object(compare, "save_keeps", killed), pytest.raises(KeyboardInterrupt):
        compare.compare(asked)
    path.write_text(ESTIMATOR.format(sign=-1))
    with pytest.raises(ValueError, match="on something else than is there now, by the digests of: code of .*mine.py"):
        compare.compare(asked)
    path.write_text(ESTIMATOR.format(sign=1))
    assert compare.compare(asked).finished, "control"


@pytest.fixture
def shown_again(config, tiny_model_directory, tmp_path):
    """Run a small comparison on files of its own, older than the run; return its configuration and the files."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_model_directory, model)
    text.write_text("the cat sat on the mat. " * 200)
    calibration = dataclasses.replace(config.calibration, scenarios=(f"text:{text}",))
    options = {"runs": str(tmp_path / "runs"), "calibration": calibration, "methods": ("magnitude",), "cut": False}
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(model)), **options)
    run = compare.compare(asked)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    run.update(started=later.isoformat(timespec="seconds"))
    time.sleep(2)
    return asked, model / "model.safetensors", text


@pytest.mark.slow
def test_a_finished_run_is_shown_at_once(shown_again, monkeypatch):
    """Files that are as old as it are not read, and it is shown without them."""
    asked, weights, text = shown_again
    monkeypatch.setattr("saap_jax.jobs.job.open_subject", lambda *_, **__: pytest.fail("read the model"))
    first, *_ = compare.shown(asked, compare.compare(asked))
    texts = f"calibrated on text:{text}, evaluated on builtin:reference and builtin:descriptions"
    assert first == f"{weights.parent}, {texts}"
    monkeypatch.undo()
    for gone in (weights, text, weights.parent / "config.json"):
        gone.unlink()
        assert compare.compare(asked).finished


@pytest.mark.slow
def test_a_finished_run_of_another_model_is_said(shown_again):
    asked, weights, text = shown_again
    opened = mock.Mock(side_effect=open_subject)
    with mock.patch("saap_jax.jobs.job.open_subject", opened):
        for file in (weights, text):
            file.write_bytes(file.read_bytes())
            assert compare.compare(asked).finished  # control: warnings are errors here
    assert opened.call_count == 2, "control: it was looked at"
    text.write_text("the dog sat on the log. " * 200)
    with pytest.warns(Doubt, match="what is shown is of another calibration text 'text' of seed 0 than is there now"):
        compare.compare(asked)
    tensors = load_file(weights)
    save_file({name: 2 * value for name, value in tensors.items()}, weights)
    with pytest.warns(Doubt, match="is of another model, calibration text 'text' of seed 0 than"):
        assert compare.compare(asked).finished


def test_overlapping_texts_are_refused(config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    calibration = dataclasses.replace(config.calibration, scenarios=(f"text:{text}",))
    evaluation = dataclasses.replace(config.evaluation, out_of_domain=str(text))
    with pytest.raises(ValueError, match="calibrate on one text and evaluate on another"):
        compare.compare(dataclasses.replace(config, runs=str(tmp_path), calibration=calibration, evaluation=evaluation))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [REPAIRED, "gate_fisher > global"])
def test_what_compare_ranks_is_what_prune_makes(config, run, tmp_path, variant):
    """By the command that the run hands out, in a directory without a cache: the same units, weights, perplexity."""
    row = next(r for r in run.candidates() if (r["variant"], r["ratio_asked"]) == (variant, 0.5))
    words = shlex.split(prune_command(run.record, row))
    asked = parse_words("prune", COMMANDS["prune"], words[2:])[0]
    assert asked.method == variant
    asked = dataclasses.replace(asked, out=str(tmp_path / "out"), runs=str(tmp_path), judge=False)
    pruned = prune.prune(asked)
    assert pruned.selection.actual == row["ratio_actual"]
    keep = {name: run.load_arrays("keeps")[f"{row['candidate']}/{name}"] for name in ("attention", "mlp")}
    assert all(np.array_equal(pruned.selection.keep[name], kept) for name, kept in keep.items())
    model, _, texts = model_and_text(config)
    ppl = saap_jax.perplexity(saap_jax.load_model(tmp_path / "out"), texts[OUT], batch_size=2)
    assert ppl == pytest.approx(row["ppl"][OUT], rel=1e-5)
    assert (
        ppl != pytest.approx(saap_jax.perplexity(saap_jax.cut(model, keep), texts[OUT]), rel=1e-5)
        or variant != REPAIRED
    )
