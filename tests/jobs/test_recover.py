"""`saap recover` as a user meets it: a model that loads, a table, a run that goes on, one line for bad input."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from saap_jax.cli import main
from saap_jax.evaluation.scales import format_ppl
from saap_jax.llama.files.load import load_model
from saap_jax.llama.quantized import Quantized
from saap_jax.records import RECOVERY
from saap_jax.recovery import command as job
from saap_jax.recovery import loop
from saap_jax.recovery.page import recovery_table, summary
from saap_jax.runs.directory import read_candidates, read_run
from saap_jax.runs.origin import read_origin
from saap_jax.structures.discovery import weight_bytes
from tests.cli.test_main import refused
from tests.runs.test_directory import scalars_in


@pytest.fixture
def options(tiny_model_directory, tmp_path) -> list[str]:
    """Fields that make a recovery tiny: all parameters, on 12 steps of text that holds little new."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 250)
    return [
        *("--model", str(tiny_model_directory), "--dense", str(tiny_model_directory), "--runs", str(tmp_path / "runs")),
        *("--method.name", "full", "--data.sources", f"text:{text}", "--data.length", "32", "--training.epochs", "3"),
        *("--training.batch-size", "8", "--training.microbatch", "4", "--training.warmup", "2"),
        *("--training.learning-rate", "0.01", "--training.check-every", "4", "--training.max-steps", "12"),
        *("--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "2"),
        *("--new-tokens", "0"),
    ]


@pytest.mark.slow
def test_recover(options, capsys, tmp_path):
    assert main.main(["recover", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"(?s)dense .* pruned .* recovered ", text)
    assert "ppl@16 builtin:reference (in)" in text
    assert "decoding (tokens a second)" not in text
    run = read_run(tmp_path / "runs" / "recover")
    assert (run["kind"], run["status"]) == ("recover", "finished")
    assert {name: len(each) for name, each in run["articles"].items()} == {each["name"]: 3 for each in run["metrics"]}
    assert run["before"]["ppl"] == run["dense"]["ppl"]
    training = run["training"]
    assert training["first_loss"] > 5
    assert training["best_loss"] < 0.6 * training["first_loss"]
    rows = read_candidates(tmp_path / "runs" / "recover")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "held_out" in row] == [4, 8, 12]
    points = scalars_in(tmp_path / "runs" / "recover" / "tensorboard")
    assert {tag for tag, *_ in points} > {"training/loss", "training/held_out", "training/tokens_per_second"}
    losses = {step: value for tag, step, value in points if tag == "training/loss"}
    np.testing.assert_allclose([losses[row["step"]] for row in rows], [row["loss"] for row in rows], rtol=1e-6)
    model = load_model(tmp_path / "runs" / "recover" / "model")
    assert model.spec == load_model(options[1]).spec
    assert (
        main.main(["evaluate", str(tmp_path / "runs" / "recover" / "model"), "--windows", "3", "--length", "16"]) == 0
    )
    assert format_ppl(run["after"]["ppl"]["ppl@16 builtin:reference"]) in capsys.readouterr().out
    assert main.main(["report", str(tmp_path / "runs" / "recover")]) == 0
    assert "Loss of training" in (tmp_path / "runs" / "recover" / "report.html").read_text()
    assert "| recovered |" in (tmp_path / "runs" / "recover" / "recovery.md").read_text()
    origin = read_origin(tmp_path / "runs" / "recover" / "model")
    assert origin is not None
    (step,) = origin["steps"]
    assert {figure["model"]: figure["value"] for figure in step["figures"] if "reference" in figure["metric"]} == {
        label: pytest.approx(run[key]["ppl"]["ppl@16 builtin:reference"]) for key, label in RECOVERY.items()
    }
    card = (tmp_path / "runs" / "recover" / "model" / "README.md").read_text()
    assert "here are 3" in card
    assert "| recovered |" in card


@pytest.fixture
def there(monkeypatch) -> list[list[bool]]:
    """Which of the models that were loaded have their matrices in memory when a training begins."""
    loaded: list[weakref.ref] = []
    there: list[list[bool]] = []

    def load(*words, **more):
        model = load_model(*words, **more)
        loaded.append(weakref.ref(jax.tree.leaves(model.segments[0].mlp)[0]))
        return model

    def train(training, checkpoints, **more):
        gc.collect()
        there.append([each() is not None for each in loaded])
        return loop.train(training, checkpoints, **more)

    monkeypatch.setattr(job, "load_model", load)
    monkeypatch.setattr(job, "train", train)
    return there


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "groupwise"])
def test_adapters_end_in_a_model_without_them(method, options, there, capsys, tmp_path):
    """What is saved is the merged model: the one that the last held-out loss was measured on, quantised or not."""
    words = ["--method.name", method, *(("--method.group-size", "8") if method == "groupwise" else ())]
    assert main.main(["recover", *options, *words, "--training.learning-rate", "0.05"]) == 0
    assert there == [[method == "lora", False]]  # neither floats that were quantised nor the dense model
    run = read_run(tmp_path / "runs" / "recover")
    assert run["training"]["best_loss"] < 0.9 * run["training"]["first_loss"]
    made, base = load_model(tmp_path / "runs" / "recover" / "model"), load_model(options[1])
    assert isinstance(made.segments[0].mlp.down, Quantized if method == "groupwise" else nnx.Param)
    assert made.spec == base.spec
    assert (weight_bytes(made) == weight_bytes(base)) == (method == "lora")
    np.testing.assert_array_equal(made.embedding[...], base.embedding[...])
    assert not np.allclose(made.segments[0].mlp.down[...], base.segments[0].mlp.down[...], atol=1e-3)
    assert run["after"]["ppl"] != run["before"]["ppl"]


@pytest.mark.slow
def test_the_model_and_a_file_come_first(options, tiny_model_directory, capsys, tmp_path):
    """On instruction data, beside the dense model's logits and hidden states. A finished run is shown again."""
    data = tmp_path / "data.jsonl"
    lines = [{"instruction": f"Count {n}.", "input": "", "output": f"{n} and {n}"} for n in range(30)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "mine.py"
    file.write_text(
        "from saap_jax.config.recover import RecoverConfig\nCONFIG = RecoverConfig(name='mine', new_tokens=0)\n"
    )
    more = [f"instruct:{data}" if word.startswith("text:") else word for word in options[2:]]
    words = ["recover", str(tiny_model_directory), str(file), *more, "--training.max-steps", "3"]
    words += ["--data.length", "200", "--training.distillation", "0.5", "--training.hidden", "0.1"]
    assert main.main(words) == 0
    first = capsys.readouterr().out
    assert "30 documents" in first
    first_step, *_, last_step = read_candidates(tmp_path / "runs" / "mine")
    shown = {(tag, step): value for tag, step, value in scalars_in(tmp_path / "runs" / "mine" / "tensorboard")}
    for name in ("divergence", "distance"):
        assert abs(first_step[name]) < 1e-5  # the model is still the dense one
        assert last_step[name] > 1e-4
        assert shown[f"training/{name}", last_step["step"]] == pytest.approx(last_step[name])
    assert main.main([*words, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.warmup", "100"], "training.warmup: expected fewer than the 12 steps"),
        (["--new-tokens", "99999"], "evaluation.length + new_tokens"),
        (["--data.held-out", "0", "--training.patience", "1"], "expected held-out text"),
        (["--evaluation.in-domain", "builtin:none"], "did you mean"),
        (["--data.sources", "instruct:none.jsonl"], "expected a file none.jsonl"),
        (
            ["--dense", "", "--training.distillation", "0.5"],
            "training.distillation: expected a dense model to learn from beside it",
        ),
        (["--out", "here"], "out: expected a directory that does not exist yet"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    at = options.index(words[0]) if words[0] in options else len(options)
    assert message in refused(capsys, ["recover", *options[:at], *options[at + 2 :], *words])
    assert not (tmp_path / "runs").exists()


def test_a_keep_set_of_another_model_is_refused_before_any_work(options, capsys, tmp_path):
    model = Path(shutil.copytree(options[1], tmp_path / "kept"))
    keep = {"attention": {"units": 2, "kept": [[0], [0]]}, "mlp": {"units": 24, "kept": [[], []]}}
    (model / "keep.json").write_text(json.dumps(keep))
    said = "keep: expected attention units a layer [2, 2], as in the model, got [1, 1]"
    assert said in refused(capsys, ["recover", *options, "--model", str(model)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_another_run_wrote_meanwhile_is_not_taken_for_its_own(options, tiny_model_directory, capsys, tmp_path):
    out = tmp_path / "out"
    own = [*options, "--training.max-steps", "3", "--name", "one", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "save_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main.main(["recover", *own]) == 130
    capsys.readouterr()
    shutil.copytree(tiny_model_directory, out)
    assert f"expected the model of this run at {out}, found another" in refused(capsys, ["recover", *own, "--resume"])
    shutil.rmtree(out)
    assert main.main(["recover", *own, "--resume"]) == 0
    run = read_run(tmp_path / "runs" / "one")
    assert run["after"]["ppl"] != run["before"]["ppl"]


DATA = {"documents": 1, "rows": 1, "filled": 1.0, "predicted": 1, "held_out_rows": 1, "cut": 1, "left_out": 1}


def test_one_of_a_thing_is_not_several():
    training = {"trained": 2, "best_step": None, "steps": 1, "rows": 1}
    run = {"data": DATA, "training": training, "config": {"data": {"length": 16}, "method": {"name": "full"}}}
    run |= {"model": {"parameters": 9}, "before": {"ppl": {}}}
    text, _ = summary(run)
    assert text == (
        "text: 1 document in 1 row of 16 tokens, 100.0 % filled; 1 token to predict an epoch; 1 row held out; "
        "1 response cut, 1 piece without a token to predict left out"
    )
    assert recovery_table(run).title == "full, 1 step of 1 row"


@pytest.mark.parametrize(
    ("first", "end"), [(3.0, "at first 3.0000"), (2.0, "at first 2.0000, which no step came below")]
)
def test_a_training_that_did_not_help_is_called_so(first, end):
    training = {"trained": 2, "best_step": 4, "steps": 5, "stopped": False, "best_loss": 2.5, "first_loss": first}
    run = {"data": DATA, "training": training, "config": {"data": {"length": 16}}, "model": {"parameters": 9}}
    assert summary(run)[1].endswith(f"the held-out loss was lowest: 2.5000, {end}")
