"""Commands on models at addresses: the same models as on paths; what dies while it is sent goes on by the same."""

import json
from importlib.util import find_spec

import pytest

from saap_jax.cli import main
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.sources import resolve
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.runs.directory import read_candidates, read_run
from saap_jax.runs.origin import read_origin
from saap_jax.runtime.remote import exists, send
from tests.buckets import use
from tests.cli.test_main import refused

CALIBRATION = ("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2")
PRUNE = ("--method", "wanda", "--ratio", "0.2")
DENSE, PRUNED = "gs://bucket/models/dense", "gs://bucket/models/pruned"


@pytest.fixture
def bucket(tiny_model_directory, tmp_path, monkeypatch):
    """Return a bucket with a model in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = use(monkeypatch)
    send(tiny_model_directory, DENSE)
    return found


@pytest.mark.slow
def test_prune_evaluate_and_export_from_address_to_address(bucket, tiny_model_directory, tmp_path, capsys):
    words = ("prune", *PRUNE, *CALIBRATION)
    assert main.main([*words, "--model.name", DENSE, "--out", PRUNED]) == 0
    assert f"model: {PRUNED}" in capsys.readouterr().out
    assert main.main([*words, "--model.name", str(tiny_model_directory), "--out", str(tmp_path / "pruned")]) == 0
    here, there = tmp_path / "pruned", bucket.contents(PRUNED)
    for name in ("model.safetensors", "config.json", "keep.json", "tokenizer.json"):
        assert (here / name).read_bytes() == there[name]
    assert "# pruned\n" in there["README.md"].decode()
    assert load_keep(resolve(PRUNED)).keys() == {"attention", "mlp"}
    assert load_tokenizer(PRUNED).encode("the cat") == load_tokenizer(here).encode("the cat")
    line = refused(capsys, [*words, "--model.name", DENSE, "--out", PRUNED])
    assert f"{PRUNED}: exists already" in line
    assert main.main(["export", PRUNED, "gs://bucket/x.gguf", "--format", "gguf"]) == 0
    assert load_model("gs://bucket/x.gguf").spec.layers == load_model(here).spec.layers
    assert not list((tmp_path / "cache" / "saap_jax" / "outputs").rglob("*.safetensors"))


def test_bad_words_leave_nothing_at_an_address(bucket, capsys):
    assert "[0, 1)" in refused(capsys, ["prune", "--model.name", DENSE, "--out", PRUNED, "--ratio", "1"])
    refused(capsys, ["prune", *PRUNE, *CALIBRATION, "--model.name", DENSE, "--out", PRUNED, "--method", "wandaa"])
    assert bucket.names(PRUNED) == set()


@pytest.mark.slow
def test_a_recovery_whose_sending_died_goes_on_without_training_again(bucket, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 100)
    words = [
        *("recover", "--model", DENSE, "--dense", "", "--runs", str(tmp_path / "runs"), "--out", PRUNED),
        *("--method.name", "full", "--data.sources", f"text:{text}", "--data.length", "32", "--training.epochs", "1"),
        *("--training.batch-size", "8", "--training.microbatch", "4", "--training.warmup", "1"),
        *("--training.max-steps", "2", "--evaluation.windows", "2", "--evaluation.length", "16", "--new-tokens", "0"),
    ]
    bucket.dies_at = "pruned/model.safetensors"
    assert "the line went dead" in refused(capsys, words)
    assert not exists(PRUNED)
    before = read_candidates(tmp_path / "runs" / "recover")
    assert len(before) == 2
    assert read_run(tmp_path / "runs" / "recover")["status"] == "running"
    bucket.dies_at = ""
    assert main.main(words) == 0
    run = read_run(tmp_path / "runs" / "recover")
    assert (run["status"], run["out"]) == ("finished", PRUNED)
    assert read_candidates(tmp_path / "runs" / "recover") == before, "no step was done again"
    origin = read_origin(resolve(PRUNED))
    assert origin is not None
    assert [step["kind"] for step in origin["steps"]] == ["recover"]
    assert load_model(PRUNED).spec == load_model(DENSE).spec
    taken = [*words, "--name", "other"]
    assert "expected a directory that does not exist yet, found gs://bucket/models/pruned" in refused(capsys, taken)


def test_where_addresses_are_not_taken(bucket, tiny_model_directory, capsys):
    with pytest.raises(ValueError, match="directory: expected a path of this machine, got the address gs://"):
        save_model(load_model(DENSE), PRUNED)
    line = refused(capsys, ["compare", "--model.name", DENSE, "--runs", "gs://bucket/runs"])
    assert "runs: expected a path of this machine, got the address gs://bucket/runs" in line


def test_the_settings_of_maxtext_name_the_address(bucket):
    assert main.main(["export", DENSE, "gs://bucket/student", "--format", "maxtext"]) == 0
    settings = bucket.contents("gs://bucket/student")["maxtext.yml"].decode()
    assert json.dumps("gs://bucket/student/0/items") in settings
    assert load_model("gs://bucket/student").spec.layers == load_model(DENSE).spec.layers


@pytest.mark.skipif(bool(find_spec("gcsfs")), reason="what reaches gs:// is installed")
def test_without_the_package_that_reaches_it(capsys):
    assert "pip install gcsfs" in refused(capsys, ["evaluate", DENSE])
