"""The command line as a user meets it: help, tables, one clear line and exit code 2 for bad input."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import saap_jax
from saap_jax.cli import main
from saap_jax.cli.arguments import option_names, parse
from saap_jax.cli.short_help import SHORT, field_docs
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.judge import AbConfig
from saap_jax.config.plan import PlanConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import RecoverConfig
from saap_jax.config.use import BenchConfig
from saap_jax.jobs import compare


@pytest.fixture
def options(tiny_model_directory, tmp_path) -> list[str]:
    """Fields that make a comparison tiny."""
    return [
        *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path / "runs")),
        *("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2"),
    ]


COMPARE = ["--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "2"]
FEW = ["--estimation.estimators", "magnitude", "gate_fisher"]


def refused(capsys, words: list[str]) -> str:
    """Run a command that must fail with one line on the error stream and code 2; return the line."""
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("saap: ")
    assert error.count("\n") == 1
    return error


def test_help(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in main.COMMANDS:
        assert f"saap {command}" in text
    assert main.main([]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(["help", "export"])
    assert stop.value.code == 0
    short = capsys.readouterr().out
    assert "usage: saap export MODEL OUT" in short
    with pytest.raises(SystemExit):
        main.main(["help", "recover"])
    assert "usage: saap recover [MODEL] [CONFIG]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main.main(["help", "compare", "--help-all"])
    assert stop.value.code == 0
    assert "--evaluation.candidates-at-once" in capsys.readouterr().out
    assert main.main(["help", "help"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(capsys, word):
    assert main.main([word]) == 0
    assert capsys.readouterr().out == f"saap {saap_jax.__version__}\n"
    assert importlib.metadata.version("saap_jax") == saap_jax.__version__


@pytest.mark.parametrize("command", ["compare", "score", "prune", "evaluate", "fidelity"])
def test_help_of_a_command_tells_every_field(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: saap {command}" in text
    assert "Tokens a window" in text


def test_help_of_a_command_tells_first_what_people_use(capsys):
    """Of every command with a short help: fifteen options at most, all of which it takes, and examples of such."""
    for command, short in SHORT.items():
        with pytest.raises(SystemExit) as stop:
            main.main(["help", command])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        told = re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE)
        assert 7 <= len(told) <= 15
        assert text.rstrip().endswith(f"saap {command} --help-all")
        with pytest.raises(SystemExit):
            main.main([command, "--help-all"])
        every = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
        assert set(told) < every
        assert len(short.examples) == 3
        for example in short.examples:
            assert example.split()[:2] == ["saap", command]
            assert set(re.findall(r"--[\w.-]+", example)) <= every


def test_strings_below_fields_are_what_tyro_reads():
    """Each field of the configurations has one; those of a class take the place of its base's."""

    @dataclasses.dataclass
    class Base:
        one: int = 1
        """Of the base."""
        two: int = 2
        """Two, over
        two lines."""

    @dataclasses.dataclass
    class Derived(Base):
        one: int = 3
        """Of its own."""
        three: int = 4

    assert field_docs(Derived) == {"one": "Of its own.", "two": "Two, over two lines."}
    assert {"ratio", "estimator", "out"} <= field_docs(PruneConfig).keys()


def test_compare(options, capsys, tmp_path):
    assert main.main(["compare", *options, *COMPARE, *FEW]) == 0
    text = capsys.readouterr().out
    assert "ppl@16: in = builtin:reference, out = builtin:descriptions" in text
    assert len(re.findall(r"gate_fisher", text)) >= 2
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    assert (tmp_path / "runs" / "compare" / "report.html").exists()
    assert main.main(["compare", *options, *COMPARE, *FEW]) == 0, "the same again prints what is there"
    assert "gate_fisher" in capsys.readouterr().out
    line = refused(capsys, ["compare", *options, *COMPARE, "--estimation.estimators", "wanda"])
    assert "another configuration" in line
    assert "--overwrite" in line
    assert main.main(["compare", *options, *COMPARE, "--estimation.estimators", "wanda", "--overwrite"]) == 0


@pytest.mark.slow
def test_a_configuration_file_with_fields_overridden(options, capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from saap_jax.config import CompareConfig, EstimationConfig\n"
        "CONFIG = CompareConfig(name='mine', estimation=EstimationConfig(estimators=('magnitude',)))\n"
    )
    words = ["compare", str(file), *options, *COMPARE, "--ratios", "0.3"]
    assert main.main(words) == 0
    record = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert (record["config"]["ratios"], record["config"]["best_ratio"]) == ([0.3], 0.3)
    assert record["best"]["candidate"] == "magnitude@0.3"
    assert record["config"]["estimation"]["estimators"] == ["magnitude"]


@pytest.mark.slow
def test_score_prune_evaluate_discover(options, capsys, tmp_path, tiny_model_directory):
    assert main.main(["score", *options, *FEW]) == 0
    assert "2 gate_fisher" in capsys.readouterr().out
    out = str(tmp_path / "pruned")
    words = [word for word in options if word != "--runs" and not word.endswith("runs")]
    words += ["--ratio", "0.5", "--out", out, "--estimator", "magnitude"]
    assert main.main(["prune", *words]) == 2
    few = "expected at least 4 microbatches of calibration text to hold every 4th out, got 2; give more"
    assert few in capsys.readouterr().err.replace("\n", " ")
    words += ["--compensation.method", "none"]
    assert main.main(["prune", *words, "--search.skip-layers", "2"]) == 2
    assert "skip_layers: expected layers in [-2, 2) of this model, got 2" in capsys.readouterr().err.replace("\n", " ")
    assert main.main(["prune", *words]) == 0
    assert "asked 50.00%" in capsys.readouterr().out
    tokens = ["--windows", "3", "--length", "16", "--batch-size", "2"]
    assert main.main(["evaluate", str(tiny_model_directory), out, *tokens]) == 0
    assert "ppl@16 builtin:reference" in re.sub(r"\s+", " ", capsys.readouterr().out.replace("│", ""))
    assert main.main(["discover", out]) == 0
    text = capsys.readouterr().out
    assert "mlp/down, 1" in text
    assert "prunable" in text
    assert main.main(["discover", "--help"]) == 0


@pytest.mark.slow
def test_fidelity(options, capsys, tmp_path):
    words = ["fidelity", *options, *FEW, "--channels-per-layer", "3", "--resamples", "20"]
    assert main.main(words) == 0
    text = capsys.readouterr().out
    assert "gate_fisher" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    run = tmp_path / "runs" / "fidelity"
    assert len((run / "ablation.jsonl").read_text().split()) == (2 * 2 + 2 * 3) * 4  # four words a line
    assert (run / "fidelity.svg").read_text().startswith("<svg")
    before = (run / "ablation.jsonl").read_bytes()
    assert main.main(words) == 0
    assert (run / "ablation.jsonl").read_bytes() == before, "nothing is ablated twice"


class TestBadInput:
    def test_command(self, capsys):
        assert refused(capsys, ["comapre"]) == "saap: unknown command 'comapre'; did you mean compare?\n"
        assert "unknown command 'zzz'; `saap help` lists" in refused(capsys, ["zzz"])
        assert "did you mean score?" in refused(capsys, ["help", "scor"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["compare", "--ratoi", "3"], "compare: unrecognised option --ratoi; did you mean --ratios?"),
            (["compare", "--exampels", "3"], "unrecognised option --exampels; did you mean --calibration.examples?"),
            (["compare", "--length=3"],
             "--length; did you mean --calibration.length or --evaluation.length?"),
            (["ab", "m", "--zzz"], "ab: unrecognised option --zzz"),
            (["compare", "--name"], "compare: Missing value for argument '--name'"),
            (["compare", "--ratios", "a/" * 100], f"compare: --ratios: Could not find valid parse for arguments: "
             f"['{'a/' * 100}']; expected [FLOAT [FLOAT ...]]"),
            (["compare", "--calibration.examples", "1e3"], "'1e3'; expected INT"),
            (["compare", "--calibration.examples", "0"],
             "calibration.examples: expected at least 1, got 0"),
            (["compare", "--search.min-keep.mlp", "-1"], "compare: search.min_keep.mlp: expected at least 0, got -1"),
            (["compare", "--search.allocation", "all"],
             "compare: search.allocation: expected one of uniform, uniform_floor, log, softmax, "
             "global, adaptive, got 'all'"),
            (["compare", "--overwrite", "yes"], "compare: unexpected yes"),
            (["prune", "--ratio", "30"], "ratio: expected a number in [0, 1), got 30.0; did you mean 0.3?"),
        ],
    )  # fmt: skip
    def test_words(self, capsys, words, message):
        assert message in refused(capsys, words)

    @pytest.mark.parametrize("kind", [CompareConfig, AbConfig, RecoverConfig, PlanConfig, BenchConfig])
    def test_options_are_those_of_the_help(self, capsys, monkeypatch, kind):
        """What is suggested is what tyro takes: both lists agree, but for what takes no name of its own."""
        monkeypatch.setenv("COLUMNS", "300")
        default = kind()
        with pytest.raises(SystemExit):
            parse("x", default, ["--help-all"])
        told = set(re.findall(r"(?<![\w`])--[a-z][\w.-]*", capsys.readouterr().out.partition("options")[2]))
        assert set(option_names(kind)) <= told
        assert len(set(option_names(kind))) > 5

    def test_configuration_file(self, capsys, tmp_path):
        assert "found none at" in refused(capsys, ["compare", str(tmp_path / "none.py")])
        empty = tmp_path / "empty.py"
        empty.write_text("")
        assert "expected CONFIG of type CompareConfig, got none" in refused(capsys, ["compare", str(empty)])
        broken = tmp_path / "broken.py"
        broken.write_text("1 / 0")
        assert "ZeroDivisionError" in refused(capsys, ["compare", str(broken)])
        broken.write_text("raise BaseException('mine')")
        assert "BaseException: mine" in refused(capsys, ["compare", str(broken)])
        broken.write_text(
            "from saap_jax.config import CompareConfig\nCONFIG = CompareConfig()\nobject.__setattr__(CONFIG, 'runs', 1)"
        )
        assert "broken.py: runs: expected str, got 1" in refused(capsys, ["compare", str(broken)])
        assert "at most one" in refused(capsys, ["compare", str(empty), str(broken)])

    def test_resume(self, capsys, options):
        words = ["compare", *options, *COMPARE, "--name", "nothing", "--resume"]
        assert "--resume expected a run at" in refused(capsys, words)
        assert "got both" in refused(capsys, [*words, "--overwrite"])

    @pytest.mark.parametrize("ratio", ["1.0", "-0.1", "nan"])
    def test_ratio(self, capsys, options, ratio):
        words = ["compare", *options, *COMPARE, "--ratios", ratio, "--best-ratio", ratio]
        assert "[0, 1)" in refused(capsys, words)

    def test_estimator(self, capsys, options):
        words = ["compare", *options, *COMPARE, "--estimation.estimators", "gate_fischer"]
        assert "did you mean 'gate_fisher'" in refused(capsys, words)

    def test_model(self, capsys, options, tmp_path):
        words = ["compare", *options[2:], *COMPARE, "--model.name"]
        assert "none" in refused(capsys, [*words, str(tmp_path / "none")])
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        assert "bert" in refused(capsys, [*words, str(tmp_path / "bert")])

    def test_damaged_model(self, capsys, options, tmp_path, tiny_model_directory):
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tiny_model_directory.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        weights = copy / "model.safetensors"
        tensors = load_file(weights)
        name = "model.layers.1.mlp.down_proj.weight"
        words = ["compare", *options[2:], *COMPARE, "--model.name", str(copy)]
        save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, weights)
        assert name in refused(capsys, words)
        weights.write_bytes((tiny_model_directory / "model.safetensors").read_bytes()[:-100])
        assert "model.safetensors" in refused(capsys, words)

    def test_text(self, capsys, options, tmp_path):
        (tmp_path / "short.txt").write_text("short")
        (tmp_path / "empty.txt").write_text("")
        words = ["compare", *options, *COMPARE, "--calibration.scenarios"]
        assert "ask for less or give a longer text" in refused(capsys, [*words, str(tmp_path / "short.txt")])
        assert "found none" in refused(capsys, [*words, str(tmp_path / "empty.txt")])
        assert "did you mean builtin:reference" in refused(capsys, [*words, "builtin:referense"])

    def test_nothing_is_left_behind(self, capsys, options, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        refused(capsys, ["compare", *options, *COMPARE, "--calibration.scenarios", str(tmp_path / "empty.txt")])
        assert not (tmp_path / "runs").exists()

    @pytest.mark.slow
    def test_full_disk(self, capsys, options, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

        monkeypatch.setattr("saap_jax.subjects.llama.save_model", full)
        line = refused(capsys, ["compare", *options, *COMPARE, *FEW])
        assert "no space left on the disk while writing model.safetensors" in line
        assert not (tmp_path / "runs" / "compare" / "best").exists()
        monkeypatch.undo()
        assert main.main(["compare", *options, *COMPARE, *FEW]) == 0, "with space again, it goes on"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (KeyError("num_consts"), r"saap: KeyError: 'num_consts'; nobody foresaw this error, .* traceback: (\S+)\n"),
            (RecursionError("maximum"), r"saap: what was given is nested too deeply to be read; traceback: (\S+)\n"),
            (
                RuntimeError("RESOURCE_EXHAUSTED: Out\nof memory"),
                r"saap: out of memory \(RESOURCE_EXHAUSTED: Out of .*\n",
            ),
            (MemoryError(), "saap: out of memory; take smaller batches.*\n"),
            (ValueError("a\x1b[2J\u202eb\nc"), r"saap: a\\x1b\[2J\\u202eb c\n"),
            (ValueError("x" * 10**6), r"saap: x+ \.\.\. \(998,000 characters left out\) \.\.\. x+\n"),
        ],
    )
    def test_any_error(self, capsys, monkeypatch, tmp_path, error, message):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(compare, "compare", lambda *_, **__: (_ for _ in ()).throw(error))
        found = re.fullmatch(message, refused(capsys, ["compare"]))
        assert found is not None
        if found.groups():
            assert type(error).__name__ in Path(found[1]).read_text()
        else:
            assert not list(tmp_path.iterdir())
        monkeypatch.setenv("SAAP_DEBUG", "1")
        with pytest.raises(type(error)):
            main.main(["compare"])

    def test_a_traceback_that_cannot_be_written(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        monkeypatch.setattr(compare, "compare", lambda *_, **__: (_ for _ in ()).throw(KeyError("a")))
        assert "SAAP_DEBUG=1 shows the traceback" in refused(capsys, ["compare"])

    def test_markup_in_a_path(self, capsys, tmp_path):
        assert "x[/y]" in refused(capsys, ["bench", str(tmp_path / "x[/y]"), "--baseline", ""])
        assert "x[/y]" in refused(capsys, ["report", str(tmp_path / "x[/y]")])

    def test_a_reader_that_has_gone(self, capsys, monkeypatch):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main.main(["--help"]) == 141
            monkeypatch.undo()
        assert capsys.readouterr().err == ""

    def test_interrupt(self, capsys, options, monkeypatch):
        monkeypatch.setattr(compare, "compare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main.main(["compare", *options]) == 130
        assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "saap"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "saap compare" in done.stdout
