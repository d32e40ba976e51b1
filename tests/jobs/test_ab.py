"""`ab` through the command line: planted differences are found, equal models are equal, limits give its exit code."""

import json
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.config.packaged import packaged
from saap_jax.config.use import AbConfig, EvaluateConfig
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.evaluation.task_results import TaskResult
from saap_jax.jobs import ab
from saap_jax.jobs.evaluate import evaluate
from saap_jax.llama import attention
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from tests.cli.test_main import refused
from tests.fake_runs import METRICS, fake_run

TEXT = ["--sources", "builtin:reference", "--windows", "4", "--length", "16", "--batch-size", "2"]


@pytest.fixture
def run(tmp_path):
    """A run whose candidate has a perplexity 2 % above the unpruned model's."""
    return fake_run(tmp_path / "run", shift=math.log(1.02))


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ab, "load_model", refuse)
    monkeypatch.setattr(ab, "load_tokenizer", refuse)


class TestAb:
    def test_two_candidates_load_no_model(self, capsys, run, tmp_path, no_model):
        out = tmp_path / "ab.json"
        assert main.main(["ab", f"{run}:wanda@0.2", f"{run}:dense", "--json", str(out)]) == 0
        text = capsys.readouterr().out
        assert "A has a higher perplexity than B by 2.0 % (2.0 to 2.0 %)" in text
        assert max(map(len, text.splitlines())) <= 100 + len(str(run))
        found = json.loads(out.read_text())
        assert [row["domain"] for row in found["metrics"]] == ["in", "out"]
        for row in found["metrics"]:
            assert row["percent"]["value"] == pytest.approx(2)
            assert row["ppl_a"] / row["ppl_b"] == pytest.approx(1.02)
            assert (row["win_rate"], row["sure"], row["windows"]) == (0, True, 24)
        line = refused(capsys, ["ab", f"{run}:wanda@0.2", f"{run}:dense", "--windows", "7"])
        assert "text, type and batch size of its run are taken, got 7; leave it out" in line

    def test_seeds_are_paired(self, tmp_path, no_model):
        three = fake_run(tmp_path / "three", seeds=(2, 0, 1), shift=0.1)
        against_dense = ab.ab(AbConfig(a=f"{three}:wanda@0.2", b=f"{three}:dense"))
        assert against_dense.seeds == 3
        difference = against_dense.metrics[0].difference
        assert difference.value == pytest.approx(0.1, abs=0.01)
        swapped = ab.ab(AbConfig(a=f"{three}:dense", b=f"{three}:wanda@0.2")).metrics[0]
        assert swapped.difference.low == pytest.approx(-difference.high)
        ppl_a, ppl_b = against_dense.metrics[0].values
        assert 100 * (ppl_a / ppl_b - 1) == pytest.approx(difference.percent[0])

    def test_seeds_that_differ_are_refused(self, capsys, tmp_path, run):
        three = fake_run(tmp_path / "three", seeds=(0, 1, 2))
        line = refused(capsys, ["ab", f"{three}:wanda@0.2", f"{run}:wanda@0.2"])
        assert "expected the same calibration seeds of both models" in line
        assert "got 0, 1, 2 of" in line
        others = fake_run(tmp_path / "others", seeds=(3, 4, 5))
        assert "0, 1, 2 of" in refused(capsys, ["ab", f"{three}:wanda@0.2", f"{others}:wanda@0.2"])
        one, other = f"{three}:wanda, seed 1@0.2", f"{others}:wanda, seed 3@0.2"
        assert main.main(["ab", one, other]) == 0, "single candidates are compared whatever their seeds"

    def test_articles_are_the_units_whichever_run_knows_them(self, tmp_path, no_model):
        """A raced run has none on record."""
        plain, raced = (fake_run(tmp_path / name, seeds=(0, 1)) for name in ("plain", "raced"))
        articles = {"articles": {metric: [window // 2 for window in range(24)] for metric in METRICS}}
        (plain / "run.json").write_text(json.dumps(json.loads((plain / "run.json").read_text()) | articles))
        names = [f"{plain}:wanda, seed 1@0.2", f"{raced}:wanda, seed 0@0.2"]
        (first, second) = (ab.ab(AbConfig(a=a, b=b)).metrics[0].difference for a, b in (names, names[::-1]))
        assert (first.windows, first.low, first.high) == pytest.approx((second.windows, -second.high, -second.low))
        assert first.windows == 12

    def test_articles_are_the_units_of_models_that_are_loaded(self, tiny_model_directory, pruned, tmp_path):
        texts = [
            " ".join(["the cat sat on the mat and the dog sat on the log"] * many) for many in (3, 5, 4, 6, 3, 4, 5, 3)
        ]
        (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
        asked = AbConfig(
            a=str(pruned),
            b=str(tiny_model_directory),
            sources=(f"jsonl:{tmp_path}/docs.jsonl#text",),
            length=16,
            windows=0,
        )
        (found,) = ab.ab(asked).metrics
        assert (found.difference.windows, found.size > 16) == (8, True)

    def test_tasks_are_of_models_of_the_runs_type(self, run, monkeypatch):
        file, dtypes = run / "run.json", []
        record = json.loads(file.read_text())
        record["config"]["model"]["dtype"] = "bfloat16"
        file.write_text(json.dumps(record))
        result = TaskResult("boolq", "a file", ("1", "2"), {"acc": np.array([1.0, 0.0])})
        monkeypatch.setattr(ab, "load_model", lambda name, dtype: dtypes.append(dtype))
        for name, found in (("load_tokenizer", None), ("find_tasks", None), ("run_named", (result,))):
            monkeypatch.setattr(ab, name, lambda *_, found=found, **__: found)
        ab.ab(AbConfig(a="mine", b=f"{run}:dense", sources=(), tasks=("boolq",)))
        assert dtypes == ["bfloat16", "bfloat16"]

    def test_two_models(self, capsys, tiny_model_directory, pruned):
        a, b = str(tiny_model_directory), str(pruned)
        assert main.main(["ab", a, a, *TEXT]) == 0
        assert "exactly 0" in capsys.readouterr().out
        found = ab.ab(AbConfig(a=a, b=b, sources=("builtin:reference",), windows=4, length=16, batch_size=2))
        assert found.metrics[0].difference.value != 0
        assert found.metrics[0].size == 4

    def test_a_model_beside_a_run_takes_the_runs_text(self, capsys, tmp_path, tiny_model_directory, pruned):
        run = real_run(tmp_path / "run", tiny_model_directory)
        found = ab.ab(AbConfig(a=str(pruned), b=f"{run}:dense"))
        assert [row.name for row in found.metrics] == ["ppl@16 builtin:reference"]
        assert found.metrics[0].size == 5
        assert not found.metrics[0].difference.same
        copy = ab.ab(AbConfig(a=f"{tiny_model_directory}/", b=f"{run}:dense"))
        assert copy.metrics[0].difference.value == 0, "evaluated again, by the same program"
        drawn = real_run(tmp_path / "drawn", tiny_model_directory, drawn=3)
        copy = ab.ab(AbConfig(a=f"{tiny_model_directory}/", b=f"{drawn}:dense"))
        assert copy.metrics[0].difference.value == 0, "on the windows that the run drew"
        line = refused(capsys, ["ab", str(pruned), f"{run}:dense", "--windows", "7"])
        assert "windows: beside" in line
        assert "got 7; leave it out" in line

    @pytest.mark.slow
    def test_other_tokenizers_are_refused(self, capsys, monkeypatch, tiny_model_directory, pruned):
        tokenizer = load_tokenizer(pruned)
        tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
        real = ab.load_tokenizer
        monkeypatch.setattr(ab, "load_tokenizer", lambda name: tokenizer if name == str(pruned) else real(name))
        assert "expected the same tokens" in refused(capsys, ["ab", str(tiny_model_directory), str(pruned), *TEXT])

    def test_other_windows_of_a_text_are_refused(self, capsys, tmp_path, no_model):
        """As another `bos` cuts them."""
        runs = [str(fake_run(tmp_path / name, shift=0.1)) for name in ("one", "other", "older")]
        for place, digest in ((runs[0], "beef" * 16), (runs[1], "f00d" * 16)):
            file = Path(place) / "run.json"
            inputs = {"inputs": {f"evaluation text of {METRICS[1]!r}": digest}}
            file.write_text(json.dumps(json.loads(file.read_text()) | inputs))
        line = refused(capsys, ["ab", f"{runs[0]}:wanda@0.2", f"{runs[1]}:wanda@0.2"])
        assert f"{METRICS[1]}: expected the same windows of both models" in line
        assert "was cut otherwise, as evaluation.bos does" in line
        for other in (runs[0], runs[2]):
            assert main.main(["ab", f"{runs[0]}:wanda@0.2", f"{other}:dense"]) == 0, "negative control"


def real_run(path: Path, model: Path, drawn: int | None = None) -> Path:
    """Write a run whose unpruned model's losses were measured."""
    config = {
        "model": {"name": str(model), "dtype": "float32"},
        "evaluation": {"windows": 5, "length": 16, "batch_size": 2, "drawn": drawn},
    }
    run, metric = RunDirectory.open(path, config), "ppl@16 builtin:reference"
    windows = ab.evaluation_windows("builtin:reference", load_tokenizer(model), 16, 5, drawn=drawn)
    losses = window_losses(load_model(model), ab.pairs(windows, 2))
    run.update(
        metrics=[{"name": metric, "domain": "in"}],
        dense={"parameters": 1, "ppl": {metric: losses.perplexity}, "losses": {metric: losses.sums / losses.counts}},
    )
    return path


class TestOnARealComparison:
    def test_candidates(self, compared):
        found = ab.ab(AbConfig(a=f"{compared}:magnitude@0.5", b=f"{compared}:random@0.5"))
        assert len(found.metrics) == 2
        assert all(row.difference.value != 0 for row in found.metrics)
        for row in read_candidates(compared):
            for each in ab.ab(AbConfig(a=f"{compared}:{row['candidate']}", b=f"{compared}:dense")).metrics:
                assert each.values[0] == pytest.approx(row["ppl"][each.name], rel=1e-12)

    def test_masks_and_cut_are_the_same_but_for_rounding(self, compared):
        best = read_run(compared)["best"]["candidate"]
        for row in ab.ab(AbConfig(a=f"{compared}:{best}", b=f"{compared}/best")).metrics:
            assert row.difference.same
        other = next(row["candidate"] for row in read_candidates(compared) if row["variant"] not in best)
        for row in ab.ab(AbConfig(a=f"{compared}:{other}", b=f"{compared}/best")).metrics:
            assert not row.difference.same

    def test_limits(self, compared, capsys):
        words = [f"{compared}:dense", "--max-size", "99%", "--max-memory", "100%"]
        best = read_run(compared)["best"]["candidate"]
        assert main.main(["ab", f"{compared}:{best}", *words]) == 0
        of_run = re.findall(r"[0-9.]+ KiB", capsys.readouterr().out)
        assert main.main(["ab", f"{compared}/best", *words]) == 0
        assert re.findall(r"[0-9.]+ KiB", capsys.readouterr().out) == of_run, "bytes on record are those measured"
        assert main.main(["ab", f"{compared}:{best}", f"{compared}/best", "--max-ppl-increase", "0%"]) == 0


class TestLimits:
    def test_a_planted_regression_is_caught(self, capsys, run, tmp_path, no_model):
        words, out = ["ab", f"{run}:wanda@0.2", f"{run}:dense"], tmp_path / "ab.json"
        assert main.main([*words, "--max-ppl-increase", "1%", "--max-size", "85%", "--json", str(out)]) == 1
        text = capsys.readouterr().out
        assert (text.count("PASS"), text.count("FAIL")) == (1, 2 + 1)  # two metrics, and the verdict
        assert "FAIL: 2 of 3 limits are broken: max_ppl_increase (ppl@128 builtin:reference)" in text
        found = json.loads(out.read_text())
        assert [(row["name"], row["passed"]) for row in found["limits"]] == [
            ("max_ppl_increase", False), ("max_ppl_increase", False), ("max_size", True)
        ]  # fmt: skip
        assert (found["held"], found["verdict"][:4]) == (False, "FAIL")
        for limits, code in (
            (["--max-ppl-increase", "2%"], 0), (["--max-size", "79 %"], 1),
            (["--max-size", "320B"], 0), (["--max-size", "319B"], 1),
        ):  # fmt: skip
            assert main.main([*words, *limits]) == code
        for name in ("dense", "wanda@0.2"):
            same = ["ab", f"{run}:{name}", f"{run}:{name}", "--max-ppl-increase", "0%", "--max-size", "100%"]
            assert main.main(same) == 0, "identical models hold limits of nothing"

    def test_models_are_timed_with_the_attention_that_was_asked_for(self, tmp_path, tiny_model_directory, monkeypatch):
        paths, run = [], fake_run(tmp_path / "run", model=str(tiny_model_directory))

        def timed(models, tokens, repeats):
            jax.eval_shape(lambda tokens: models[0](tokens), tokens)
            return 1.0, 1.0

        def told(name, of):
            monkeypatch.setattr(attention, name, lambda *inputs: [paths.append(name), of(*inputs)][1])

        told("plain", attention.plain)
        told("in_blocks", attention.in_blocks)
        monkeypatch.setattr(ab, "forward_seconds", timed)
        for asked, taken in (("auto", "plain"), ("blocks", "in_blocks")):
            paths.clear()
            assert ab.ab(AbConfig(a=f"{run}:dense", b=f"{run}:dense", max_latency="100%", attention=asked)).held
            assert paths[0] == taken

    @pytest.mark.slow
    def test_models_are_measured(self, capsys, tiny_model_directory, pruned):
        limits = ["--max-latency", "10000%", "--max-size", "100%", "--max-memory", "1GiB", "--max-ppl-increase", "900%"]
        assert main.main(["ab", str(pruned), str(tiny_model_directory), *limits, "--repeats", "2", *TEXT]) == 0
        assert len(re.findall("PASS", capsys.readouterr().out)) == 4 + 1
        words = [str(pruned), "--max-size", "100%", "--max-memory", "100%", *TEXT]
        assert main.main(["ab", str(tiny_model_directory), *words]) == 1, "the whole is larger than the pruned one"
        assert main.main(["ab", str(pruned), *words]) == 0

    def test_of_a_run_the_unpruned_model_can_be_run_and_masks_cannot(
        self, capsys, tmp_path, tiny_model_directory, pruned
    ):
        run = fake_run(tmp_path / "run", model=str(tiny_model_directory))
        words = [f"{run}:dense", "--max-latency", "10000%", "--repeats", "1"]
        assert main.main(["ab", f"{run}:dense", *words]) == 0
        line = refused(capsys, ["ab", f"{run}:wanda@0.2", *words])
        assert "max_latency needs a model that can be run" in line
        command = re.search(r"cut it \((saap prune .*)\) and name", line)
        assert command
        assert {"--method", "wanda > uniform", "--ratio", "0.2"} < set(shlex.split(command[1]))
        (run / "best").symlink_to(pruned)
        assert main.main(["ab", f"{run}:wanda@0.2", *words]) == 0, "the best was cut"

    def test_bytes_are_held_without_a_text(self, run, monkeypatch):
        monkeypatch.setattr(ab, "compare_tasks", lambda *_: ())
        words = ["ab", f"{run}:wanda@0.2", f"{run}:dense", "--sources", "--tasks", "boolq"]
        assert [main.main([*words, "--max-size", size]) for size in ("85%", "75%")] == [0, 1]

    def test_not_finite_is_broken(self, run, capsys):
        directory = RunDirectory(run, json.loads((run / "run.json").read_text()))
        row = directory.candidates()[0]
        row["losses"][METRICS[0]][0] = row["ppl"][METRICS[0]] = math.nan
        directory.append(row)
        assert main.main(["ab", f"{run}:wanda@0.2", f"{run}:dense", "--max-ppl-increase", "50%"]) == 1
        assert "1 of 2 limits is broken" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (["--max-ppl-increase", "5"], "expected a percentage with its sign, got '5'; write 5%"),
            (["--max-latency", "300ms"], "max_latency: expected a percentage"),
            (["--max-size", "300MiP"], "such as 300MiB, got '300MiP'"),
            (["--max-accuracy-drop", "1"], "max_accuracy_drop: expected --tasks beside it, got 1.0"),
            (
                ["--sources", "--tasks", "boolq", "--max-ppl-increase", "5%"],
                "max_ppl_increase: expected text, --sources, beside it, got '5%'",
            ),
            (["--limits", "none.toml"], "none at none.toml; check the path, or name one of the package: gates/default"),
            (["--max-size", "80%", "--repeats", "3"], "repeats: expected --max-latency beside it, got 3"),
            (["--limits", "gates/size", "--repeats", "3"], "repeats: expected --max-latency beside it, got 3"),
            (["--json", "none/ab.json"], "make the directory first"),
        ],
    )
    def test_bad_limits(self, capsys, run, limits, message):
        assert message in refused(capsys, ["ab", f"{run}:wanda@0.2", f"{run}:dense", *limits])


class TestLimitsFile:
    def test_the_command_line_comes_first(self, capsys, run, tmp_path):
        file = tmp_path / "mine.toml"
        file.write_text('max_ppl_increase = "1%"\nmax_size = "85%"\n')
        words = ["ab", f"{run}:wanda@0.2", f"{run}:dense", "--limits", str(file)]
        assert main.main(words) == 1
        assert main.main([*words, "--max-ppl-increase", "3%"]) == 0
        assert "85 % of B" in capsys.readouterr().out, "the file's other limit holds on"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('max_pl_increase = "1%"', "unknown limit 'max_pl_increase', .*did you mean 'max_ppl_increase'"),
            ('max-size = "1%"', "did you mean 'max_size'"),
            ("max_ppl_increase = 5", "max_ppl_increase: expected str, got 5"),
            ("max_size = '5'", "max_size: expected a percentage"),
            ("max_accuracy_drop = 1", "max_accuracy_drop: expected --tasks beside it, got 1.0"),
            ("max_size = ", "limits .*mine.toml: "),
            ('[gate]\nmax_size = "1%"', "unknown limit 'gate'"),
            ("", "expected at least one limit"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        file = tmp_path / "mine.toml"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            ab.with_limits(AbConfig(limits=str(file)))

    @pytest.mark.parametrize("name", sorted(packaged(".toml")))
    def test_every_template_builds(self, name):
        config = ab.with_limits(AbConfig(limits=name))
        assert config.max_ppl_increase.endswith("%")
        assert f"--limits {name}`" in packaged(".toml")[name].read_text()


def test_losses_are_those_of_evaluate(tiny_model_directory, capsys):
    """The perplexity that `ab` shows is that of `evaluate`."""
    name, text = str(tiny_model_directory), {"sources": ("builtin:reference",), "windows": 4, "length": 16}
    row = ab.ab(AbConfig(a=name, b=name, batch_size=2, **text)).metrics[0]
    ppl = evaluate(EvaluateConfig(models=(name,), batch_size=2, **text))[name].ppl
    assert ppl == {row.name: pytest.approx(row.values[0], rel=1e-12)}
    assert np.isfinite(row.values[0])
