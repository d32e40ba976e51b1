"""Tasks through the command line: `evaluate` and `ab` on local tasks, with models whole, pruned and masked."""

import json
import re

import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.evaluation.tasks import read_task, run_tasks
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.runs.ab import together
from saap_jax.runs.directory import read_candidates, read_run
from tests.cli.test_main import refused
from tests.evaluation.items import choice_lines, context_lines, write_lines


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


class TestEvaluate:
    @pytest.mark.slow
    def test_tables_and_json(self, capsys, tiny_model_directory, pruned, tmp_path, data, monkeypatch):
        out = tmp_path / "found.json"
        words = ["--sources", "--tasks", "choosing,filling", "--limit", "10", "--json", str(out)]
        assert main.main(["evaluate", str(tiny_model_directory), str(pruned), *words]) == 0
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

    def test_bad_input(self, capsys, tiny_model_directory, tmp_path, monkeypatch):
        words = ["evaluate", str(tiny_model_directory), "--tasks"]
        assert "found none at none.jsonl" in refused(capsys, [*words, "none.jsonl"])
        assert "tasks: expected each once" in refused(capsys, [*words, "choosing", "filling,choosing"])
        assert "make the directory first" in refused(capsys, [*words, "choosing", "--json", str(tmp_path / "n" / "a")])
        assert "at least one source, or a task" in refused(capsys, ["evaluate", str(tiny_model_directory), "--sources"])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "'other', which is no local task" in refused(capsys, [*words, "other"])


def accuracy(directory, data, name: str, metric: str = "acc") -> np.ndarray:
    task = read_task(name, data / "zeroshot" / f"{name}.jsonl")
    result = run_tasks(load_model(directory), load_tokenizer(directory), [task], batch_size=8)[0]
    return result.values[metric]


TASKS = ["--tasks", "choosing", "filling"]


class TestAb:
    @pytest.mark.slow
    def test_two_models(self, capsys, tiny_model_directory, pruned, tmp_path, data):
        out = tmp_path / "ab.json"
        words = ["ab", str(tiny_model_directory), str(pruned), "--sources", *TASKS, "--json", str(out)]
        assert main.main(words) == 0
        text = capsys.readouterr().out
        assert "ppl" not in text
        found = json.loads(out.read_text())
        assert found["metrics"] == []
        assert [row["task"] for row in found["tasks"]] == ["choosing", "filling", "all tasks"]
        for row, name in zip(found["tasks"], ("choosing", "filling"), strict=False):
            a, b = (accuracy(directory, data, name) for directory in (tiny_model_directory, pruned))
            assert (row["accuracy_a"], row["accuracy_b"]) == pytest.approx((100 * a.mean(), 100 * b.mean()))
            assert row["points"]["value"] == pytest.approx(100 * (a.mean() - b.mean()))
            assert row["win_rate"] == pytest.approx(0.5 + (a.mean() - b.mean()) / 2)
            assert (a != b).any()
        assert found["tasks"][2]["items"] == 24 + 16
        assert main.main([*words[:4], "--tasks", "choosing", "--task-metric", "acc_norm", "--json", str(out)]) == 0
        (row,) = json.loads(out.read_text())["tasks"]
        assert row["accuracy_a"] == pytest.approx(
            100 * accuracy(tiny_model_directory, data, "choosing", "acc_norm").mean()
        )
        assert "task filling: expected acc_norm" in refused(capsys, [*words[:4], *TASKS, "--task-metric", "acc_norm"])

    @pytest.mark.slow
    def test_candidates_of_a_run_are_cut(self, capsys, compared, tmp_path, data):
        """The best candidate, cut by what the run keeps, answers as the model that the run saved; others do not."""
        out, best = tmp_path / "ab.json", read_run(compared)["best"]["candidate"]
        assert main.main(["ab", f"{compared}:{best}", f"{compared}/best", *TASKS, "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        assert len(found["metrics"]) == 2
        assert [row["sentence"] for row in found["tasks"]] == ["A and B are the same: the difference is exactly 0"] * 3
        other = "random@0.5" if best.startswith("magnitude") else "magnitude@0.5"
        assert main.main(["ab", f"{compared}:{other}", f"{compared}:dense", *TASKS, "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        assert found["seeds"] == 2
        names = [row["candidate"] for row in read_candidates(compared) if together(row) == other]
        assert len(names) == 2
        each = []
        for name in names:
            assert (
                main.main(["ab", f"{compared}:{name}", f"{compared}:dense", *TASKS, "--json", str(tmp_path / "n")]) == 0
            )
            each.append(json.loads((tmp_path / "n").read_text())["tasks"])
        for number, row in enumerate(found["tasks"]):
            values = [one[number]["points"]["value"] for one in each]
            assert row["points"]["value"] == pytest.approx(np.mean(values)), "seeds count the same"


class TestLimits:
    def test_a_planted_drop_is_caught(self, capsys, tiny_model_directory, pruned, tmp_path, data):
        """What the pruned model loses breaks a limit just below it, and holds one just above."""
        drops = []
        for name in ("choosing", "filling"):
            a, b = (accuracy(directory, data, name) for directory in (tiny_model_directory, pruned))
            drops.append(100 * (a.mean() - b.mean()))
        model, baseline = (pruned, tiny_model_directory) if max(drops) > 0 else (tiny_model_directory, pruned)
        worst = max(drops) if max(drops) > 0 else -min(drops)
        assert worst > 0
        out = tmp_path / "ab.json"
        words = ["ab", str(model), str(baseline), "--sources", *TASKS, "--json", str(out)]
        assert main.main([*words, "--max-accuracy-drop", str(worst + 0.01)]) == 0
        assert "PASS: all 3 limits hold" in capsys.readouterr().out
        assert main.main([*words, "--max-accuracy-drop", str(worst - 0.01)]) == 1
        limits = json.loads(out.read_text())["limits"]
        assert [(row["name"], row["what"]) for row in limits] == [
            ("max_accuracy_drop", name) for name in ("choosing", "filling", "all tasks")
        ]
        assert 1 <= sum(not row["passed"] for row in limits) <= 2
        name = str(tiny_model_directory)
        assert main.main(["ab", name, f"{name}/", "--sources", *TASKS, "--max-accuracy-drop", "0"]) == 0
        assert capsys.readouterr().out.count("0 points") >= 3
