"""Tasks through the command line: `evaluate`, `ab` and `gate` on local tasks, with models whole, pruned and masked."""

import json
import re

import pytest

from saap_jax import cli
from saap_jax.evaluation.tasks.local import read_task, run_tasks
from saap_jax.llama import load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.surgery import cut
from tests.evaluation.tasks.items import choice_lines, context_lines, write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory as SAAP_DATA names one, with two tasks."""
    data = tmp_path_factory.mktemp("data")
    (data / "zeroshot").mkdir()
    write_lines(data / "zeroshot" / "choosing.jsonl", choice_lines(24))
    write_lines(data / "zeroshot" / "filling.jsonl", context_lines(16))
    return data


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.setenv("SAAP_DATA", str(data))


@pytest.fixture(scope="module")
def pruned(tiny_model_directory, tmp_path_factory):
    """A pruned model: layers of different widths, one without attention."""
    model = load_model(tiny_model_directory)
    keep = existing_units(model.runs)
    keep["mlp"][:, ::2] = False
    keep["attention"][1] = False
    tokenizer = load_tokenizer(tiny_model_directory)
    return save_model(cut(model, keep), tmp_path_factory.mktemp("pruned") / "half", tokenizer=tokenizer, keep=keep)


def refused(capsys, words: list[str]) -> str:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("saap: ")
    assert error.count("\n") == 1
    return error


class TestEvaluate:
    def test_tables_and_json(self, capsys, tiny_model_directory, pruned, tmp_path, data):
        out = tmp_path / "found.json"
        words = ["--sources", "--tasks", "choosing,filling", "--limit", "10", "--json", str(out)]
        assert cli.main(["evaluate", str(tiny_model_directory), str(pruned), *words]) == 0
        text = capsys.readouterr().out
        assert "perplexity" not in text
        assert len(re.findall("mean of tasks", re.sub(r"\s+", " ", text))) == 2
        found = json.loads(out.read_text())["models"]
        for each, directory in zip(found, (tiny_model_directory, pruned), strict=True):
            tasks = [read_task(name, data / "zeroshot" / f"{name}.jsonl", 10) for name in ("choosing", "filling")]
            expected = run_tasks(load_model(directory), load_tokenizer(directory), tasks, batch_size=2)
            assert each["model"] == str(directory)
            for task, result in zip(each["tasks"], expected, strict=True):
                assert [item["acc"] for item in task["items"]] == result.values["acc"].tolist()
                assert task["metrics"]["acc"]["value"] == result.mean("acc")
                shown = f"{100 * result.mean('acc'):.1f} ± {100 * result.standard_error('acc'):.1f}"
                assert shown in text
        first, second = ([task["items"] for task in each["tasks"]] for each in found)
        assert first != second, "the pruned model answers otherwise"

    def test_beside_perplexity(self, capsys, tiny_model_directory, data):
        words = ["--windows", "2", "--length", "16", "--batch-size", "2", "--sources", "builtin:reference"]
        path = str(data / "zeroshot" / "choosing.jsonl")
        assert cli.main(["evaluate", str(tiny_model_directory), *words, "--tasks", path, "--limit", "3"]) == 0
        text = capsys.readouterr().out
        assert "perplexity" in text
        assert "acc_norm" in text

    def test_bad_input(self, capsys, tiny_model_directory, tmp_path, monkeypatch):
        words = ["evaluate", str(tiny_model_directory), "--tasks"]
        assert "found none at none.jsonl" in refused(capsys, [*words, "none.jsonl"])
        assert "tasks: expected each once" in refused(capsys, [*words, "choosing", "filling,choosing"])
        assert "limit: expected at least 0, got -1" in refused(capsys, [*words, "choosing", "--limit", "-1"])
        assert "make the directory first" in refused(capsys, [*words, "choosing", "--json", str(tmp_path / "n" / "a")])
        assert "at least one source or task" in refused(capsys, ["evaluate", str(tiny_model_directory), "--sources"])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "'other' is no local task" in refused(capsys, [*words, "other"])
