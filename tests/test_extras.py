"""What is installed on demand: without it the core works, and one line names the extra that a wish takes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from saap_jax.extras import EXTRAS, missing, need

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
BARE = """
import sys
sys.modules |= dict.fromkeys({absent!r})
from saap_jax.cli.main import main
for words in {commands!r}:
    print("exit", main(words), flush=True)
"""
TEXT = ["--calibration.examples", "8", "--calibration.length", "16", "--evaluation.length", "16"]
TEXT += ["--evaluation.windows", "8", "--calibration.scenarios", "a.txt"]
TEXT += ["--evaluation.in-domain", "b.txt", "--evaluation.out-of-domain", "c.txt"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_named_in_one_line(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    with pytest.raises(ValueError, match="a wish: expected the package") as refused:
        need(extra, "a wish")
    line = f"a wish: expected the package {EXTRAS[extra]}, which is not installed; run pip install 'saap_jax[{extra}]'"
    assert str(refused.value) == missing(extra, "a wish") == line


@pytest.mark.parametrize("extra", ["figures", "gguf", "tensorboard", "tfds"])
def test_an_extra_that_is_installed_is_not_missing(extra):
    assert missing(extra, "a wish") == ""
    need(extra, "a wish")


def test_extras_are_those_that_are_declared():
    declared = PROJECT["optional-dependencies"]
    assert EXTRAS.keys() <= declared.keys()
    names = {re.split(r"[>=\[ ]", each)[0].replace("-", "_").lower() for each in PROJECT["dependencies"]}
    assert "jax" in names, "control"
    assert not names & {module.lower() for module in EXTRAS.values()}, "what is always there is no extra"


def run_bare(absent, commands, folder) -> subprocess.CompletedProcess:
    """Run commands in one process that finds none of the modules `absent`."""
    code = BARE.format(absent=sorted(absent), commands=commands)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.fixture
def folder(tmp_path):
    """Return a directory with three texts that have no sentence in common."""
    for name, what in (("a", "birds"), ("b", "rivers"), ("c", "stones")):
        lines = [f"Sentence {n * len(what)} of {n} is about {what}, and so are {n * n} others." for n in range(60)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_the_core_works_without_extras(folder, tiny_model_directory):
    model = str(tiny_model_directory)
    commands = [
        ["compare", "wanda", "random", "--model", model, "--ratios", "0.5", *TEXT],
        ["prune", "--model", model, "--method", "wanda", "--ratio", "0.5", "--out", "pruned", *TEXT],
        ["evaluate", model, "pruned", "--sources", "b.txt", "--length", "16", "--windows", "8"],
        ["evaluate", model, "--sources", "builtin:descriptions"],
        ["evaluate", model, "--sources", "tfds:lm1b"],
        ["export", model, "out.gguf", "--format", "gguf"],
        ["report", "runs/compare", "--figures", "figures"],
    ]
    (folder / "some.gguf").write_bytes(b"GGUF")
    commands.append(["evaluate", "some.gguf", "--sources", "b.txt"])
    done = run_bare({*EXTRAS.values(), "array_record", "grain"}, commands, folder)
    assert re.findall(r"^exit (\d)", done.stdout, re.M) == ["0"] * 3 + ["2"] * 5, done.stderr[-3000:]
    named = re.findall(r"^saap: .*run pip install 'saap_jax\[([a-z]+)\]'$", done.stderr, re.M)
    assert named == ["figures", "tfds", "tfds", "gguf", "figures", "gguf"], done.stderr[-3000:]
    page = (folder / "runs" / "compare" / "report.html").read_text()
    assert "saap_jax[figures]" in page
    assert "<figure" not in page
    assert not (folder / "runs" / "compare" / "tensorboard").exists()


@pytest.mark.slow
def test_with_extras_a_page_has_its_figures(folder, tiny_model_directory):
    words = ["compare", "wanda", "random", "--model", str(tiny_model_directory), "--ratios", "0.5", *TEXT]
    done = run_bare((), [words], folder)
    assert done.stdout.endswith("exit 0\n"), done.stderr[-3000:]
    page = (folder / "runs" / "compare" / "report.html").read_text()
    assert "saap_jax[figures]" not in page + done.stderr
    assert "<figure" in page
    assert (folder / "runs" / "compare" / "tensorboard").exists()
