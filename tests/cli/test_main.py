"""The command line as a user meets it: help, exit codes, one clear line for bad input."""

import csv
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings

import pytest

import saap_jax
from saap_jax.cli import main
from saap_jax.cli.arguments import imported
from saap_jax.errors import Doubt
from saap_jax.jobs import compare, score
from saap_jax.runs.directory import RunDirectory, read_run


@pytest.fixture
def options(tiny_model_directory, tmp_path) -> list[str]:
    """Fields that make a comparison tiny."""
    return [
        *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path / "runs")),
        *("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2"),
    ]


COMPARE = ["--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "2"]
METHODS = ["--methods", "magnitude", "gate_fisher"]


def refused(capsys, words: list[str]) -> str:
    """Run a command that must fail with code 2 and one line on the error stream, or what tyro says; return that."""
    assert main.main(words) == 2
    error = capsys.readouterr().err
    if "For full helptext" in error:
        return " ".join(error.split())
    assert error.startswith("saap: ")
    assert error.count("\n") == 1
    return error


def test_a_warning_of_ours_is_one_line(capsys):
    main.main(["--version"])
    assert warnings.formatwarning(Doubt("the model is another"), Doubt, "a.py", 1) == "saap: the model is another\n"
    assert warnings.formatwarning(UserWarning("b"), UserWarning, "a.py", 1).startswith("a.py:1: UserWarning: b\n")


def test_help(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}" in text and command.help in text for name, command in main.COMMANDS.items())
    for words, code in ([], 2), (["help"], 0), (["--help-all"], 0):
        assert main.main(words) == code
        assert capsys.readouterr().out == text


MODEL = {"jax", "flax", "optax"}
FILES = {"gguf", "huggingface_hub", "transformers", "tensorflow_datasets", "orbax", "fsspec", "tensorboardX"}
PAGES = {"scipy", "pandas", "matplotlib", "jinja2"}
EARLY = "from saap_jax.cli.main import main; "


@pytest.mark.parametrize(
    ("code", "heavy", "loaded"),
    [
        ("import saap_jax.__main__", MODEL | FILES | PAGES | {"numpy", "rich", "tyro"}, set()),
        (EARLY + "main(['--help'])", MODEL | FILES | PAGES | {"numpy"}, {"tyro"}),
        (EARLY + "main(['compare', '--help'])", MODEL | FILES | PAGES, {"numpy"}),
        (EARLY + "import saap_jax.jobs.compare", FILES | PAGES, MODEL),
    ],
)
def test_heavy_libraries_are_imported_where_they_are_used(code, heavy, loaded):
    """In a fresh process; that it tells what is `loaded` is the control."""
    code += "; import sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {*done.stderr.split()}
    assert not heavy & found
    assert loaded <= found


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(capsys, word):
    assert main.main([word]) == 0
    assert capsys.readouterr().out == f"saap {saap_jax.__version__}\n"
    assert importlib.metadata.version("saap_jax") == saap_jax.__version__


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command(name, capsys):
    """Without a description each option takes a line or two; `saap help` describes all; what runs it is there."""
    command = main.COMMANDS[name]
    assert main.main([name, "--help"]) == 0
    short = capsys.readouterr().out
    assert main.main(["help", name]) == 0
    whole = capsys.readouterr().out
    for field in dataclasses.fields(imported(command.config)):
        assert dataclasses.is_dataclass(field.type) or f"--{field.name.replace('_', '-')}" in short
    assert set(re.findall(r"--[a-z][\w.-]*", short)) <= set(re.findall(r"--[a-z][\w.-]*", whole)) | {"--help-verbose"}
    assert len(whole) > len(short) or name == "recipes"
    assert ">>>" not in whole
    assert callable(imported(command.job))


def test_completion_is_tyros(capsys):
    assert main.main(["--tyro-print-completion", "bash"]) == 0
    assert "--calibration.examples" in capsys.readouterr().out


@pytest.mark.slow
def test_compare(options, capsys, tmp_path):
    assert main.main(["compare", *options, *COMPARE, *METHODS]) == 0
    text = capsys.readouterr().out
    assert "in = ppl@16 builtin:reference, out = ppl@16 builtin:descriptions" in text
    assert len(re.findall(r"gate_fisher", text)) >= 2
    assert (tmp_path / "runs" / "compare" / "report.html").exists()
    assert main.main(["compare", *options, *COMPARE, *METHODS]) == 0, "the same again prints what is there"
    assert "gate_fisher" in capsys.readouterr().out
    other = ["compare", *options, *COMPARE, "--recipes", "wanda"]
    line = refused(capsys, [*other, "--name", "compare"])
    assert "another configuration" in line
    assert "--overwrite" in line
    assert main.main(other) == main.main(other) == 0, "a name of its own, and the same one again"
    assert sorted(path.name for path in (tmp_path / "runs").glob("[!.]*")) == ["compare", "compare-2"]
    rows = list(csv.DictReader((tmp_path / "runs" / "compare-2" / "results.csv").read_text().splitlines()))
    assert [row["candidate"] for row in rows] == ["dense", "wanda@0.2", "wanda@0.5"]
    where = ["--runs", str(tmp_path / "runs")]
    assert main.main(["runs", "compare", "compare-2", *where]) == 0
    assert "Best variants" in capsys.readouterr().out
    (tmp_path / "runs" / "compare-2" / "mine.txt").touch()
    assert "no run.json in" in refused(capsys, ["runs", "compare-2", "gone", *where, "--delete"])
    assert main.main(["runs", "compare-2", str(tmp_path / "runs" / "compare-2"), *where, "--delete"]) == 0
    assert [path.name for path in (tmp_path / "runs" / "compare-2").iterdir()] == ["mine.txt"]
    capsys.readouterr()
    (damaged := tmp_path / "runs" / "damaged" / "run.json").parent.mkdir()
    damaged.write_text("[]")
    assert main.main(["runs", *where]) == 0
    said = capsys.readouterr().out
    assert ".cache" in said
    assert "compare-2" not in said
    assert "unreadable" in said, "and the others are there"
    assert main.main(["compare", *options, *COMPARE, "--recipes", "wanda", "--name", "damaged", "--overwrite"]) == 0
    for cache in (tmp_path / "runs" / ".cache", tmp_path / ".cache"):
        cache.mkdir(exist_ok=True)
        (cache / "mine.txt").touch()
        assert main.main(["runs", str(cache), "--delete"]) == 0
        assert [path.name for path in cache.iterdir()] == ["mine.txt"], "what no command wrote stays"


def test_without_a_name_a_run_overwrites_its_own_alone(tmp_path, monkeypatch):
    def job(config, *, overwrite=False, track=None):
        return RunDirectory.open(tmp_path / config.name, dataclasses.asdict(config), overwrite=overwrite).begin()

    monkeypatch.setattr(score, "score_run", job)
    monkeypatch.setattr(score, "shown", lambda *_: ())
    words = ["score", "--runs", str(tmp_path), "--estimators"]
    for estimator in ("wanda", "random"):
        assert main.main([*words, estimator]) == 0
    RunDirectory(tmp_path / "score-2", read_run(tmp_path / "score-2")).update(status="finished")
    for estimator in ("random", "magnitude"):
        assert main.main([*words, estimator, "--overwrite"]) == 0
    records = {path.parent.name: read_run(path.parent) for path in tmp_path.glob("*/run.json")}
    found = {name: record["config"]["estimators"] for name, record in records.items()}
    assert found == {"score": ["wanda"], "score-2": ["random"], "score-3": ["magnitude"]}
    assert records["score-2"]["status"] == "running", "anew"
    assert main.main([*words, "magnitude", "--name", "score", "--overwrite"]) == 0
    assert read_run(tmp_path / "score")["config"]["estimators"] == ["magnitude"]
    (tmp_path / "score" / "run.json").write_text("[]")
    assert main.main(["runs", "score", "--runs", str(tmp_path), "--delete"]) == 0, "also where it is damaged"
    assert not (tmp_path / "score").exists()


def test_a_file_that_cannot_be_written_is_refused_before_any_work(capsys, tiny_model_directory):
    words = ["evaluate", str(tiny_model_directory), "--sources", "builtin:reference", "--json", "/proc/figures.json"]
    assert "json: expected a directory that can be written to, got /proc/figures.json" in refused(capsys, words)


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("comapre", "comapre"),
            ("help comapre", "comapre"),
            ("compare --ratoi 3", "--ratios"),
            ("ab m --zzz", "--zzz"),
            ("compare --name", "--name"),
            ("compare --calibration.examples 1e3", "1e3"),
            ("compare --calibration.examples 0", "calibration.examples: expected at least one"),
            ("compare --overwrite yes", "yes"),
            ("bench --distributed auto", "--distributed"),
        ],
    )
    def test_options_are_told_by_tyro(self, capsys, words, message):
        assert main.main(words.split()) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("compare --recipe fats", "unknown step 'fats'; did you mean 'fast'?"),
            ("compare none.py", "found none at none.py"),
            ("prune tiny --ratio 0.2", "(model and method are options: --model, --method), found none at tiny"),
            ("score --model tiny --runs short.txt", "short.txt, found a file; choose another place"),
            ("compare quickstart learned", "at most one"),
            ("recover a b", "at most one"),
            ("compare --model tiny wanda", "before them [MODULE:FACTORY] [CONFIG] [METHODS ...], got wanda in"),
            ("compare --resume", "--resume expected a run at runs/compare, found none"),
            ("compare --resume --overwrite", "got both"),
            ("compare --model.name none", "none"),
            ("compare --model.name bert", "bert"),
            ("compare --model.name tiny --calibration.scenarios short.txt", "ask for less or give a longer text"),
            ("compare --model.name tiny --calibration.scenarios empty.txt", "found none"),
            ("bench x[/y] --baseline=", "x[/y]"),
            ("report x[/y]", "x[/y]"),
        ],
    )
    def test_one_line_and_nothing_left_behind(
        self, capsys, words, message, tmp_path, monkeypatch, tiny_model_directory
    ):
        monkeypatch.chdir(tmp_path)
        for name, text in {"short.txt": "short", "empty.txt": "", "bert/config.json": '{"model_type": "bert"}'}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "tiny").symlink_to(tiny_model_directory)
        assert message in refused(capsys, words.split())
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected CONFIG of type CompareConfig, got NoneType"),
            ("1 / 0", "ZeroDivisionError"),
            ("raise BaseException('mine')", "BaseException: mine"),
            ("from saap_jax.config import *\nCONFIG = RecoverConfig()", "got RecoverConfig"),
        ],
    )  # fmt: skip
    def test_configuration_file(self, capsys, tmp_path, text, message):
        (tmp_path / "mine.py").write_text(text)
        assert message in refused(capsys, ["compare", str(tmp_path / "mine.py")])

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (KeyError("num_consts"), "saap: KeyError: 'num_consts'; nobody foresaw this: SAAP_TRACEBACK=1 .*\n"),
            (RuntimeError("RESOURCE_EXHAUSTED: Out\nof"), r"saap: out of memory \(RESOURCE_EXHAUSTED: Out of\); .*\n"),
            (MemoryError(), "saap: out of memory .*take smaller batches.*\n"),
            (ValueError("a\x1b[2J\u202eb\nc"), r"saap: a\\x1b\[2J\\u202eb c\n"),
            (ValueError("x" * 10**6), r"saap: x+ \.\.\. x+\n"),
        ],
    )
    def test_any_error(self, capsys, monkeypatch, error, message):
        monkeypatch.setattr(compare, "compare", lambda *_, **__: (_ for _ in ()).throw(error))
        assert re.fullmatch(message, refused(capsys, ["compare"]))
        monkeypatch.setenv("SAAP_TRACEBACK", "1")
        assert main.main(["compare"]) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_a_reader_that_has_gone(self, capsys, monkeypatch):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main.main(["--version"]) == 141
            monkeypatch.undo()
        assert capsys.readouterr().err == ""

    def test_interrupt(self, capsys, options, monkeypatch):
        monkeypatch.setattr(compare, "compare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main.main(["compare", *options]) == 130
        assert "the same command goes on" in capsys.readouterr().err
