"""A full disk: one line that says what to do, nothing half-written, and doing what it says works.

Writing fails at every writer in turn: the limit on the size of files that the system gives a process grows until the
command succeeds.
"""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saap_jax.cli import main
from tests.jobs.test_table import SMALL


def commands(model: str, place: Path) -> dict[str, list[str]]:
    runs = ["--runs", str(place), "--name", "run"]
    text = place.parent / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 100)
    return {
        "score": ["score", "--model.name", model, *runs, *SMALL[:6], "--estimators", "wanda",
                  "--keep-statistics", "all"],
        "compare": ["compare", "--model.name", model, *runs, *SMALL, "--methods", "wanda",
                    "--ratios", "0.2", "--cut"],
        "export": ["export", model, str(place / "run.gguf"), "--format", "gguf"],
        "padded": ["export", model, str(place / "run"), "--format", "padded"],
        "recover": ["recover", "--model", model, "--dense", "", *runs, "--method.name", "full",
                    "--data.sources", f"text:{text}", "--data.length", "32",
                    "--training.batch-size", "8", "--training.microbatch", "4",
                    "--training.warmup", "1", "--training.max-steps", "4", "--training.check-every", "2",
                    *SMALL[6:], "--new-tokens", "0"],
    }  # fmt: skip


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes; writing then fails in the middle of a file, as on a full disk."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def left_over(place: Path) -> list[str]:
    """Return the names of what is half-written or held below a directory, where results may be kept for other runs."""
    names = {name for _, folders, files in os.walk(place) for name in (*folders, *files)} - {".cache"}
    return [name for name in sorted(names)
            if name.startswith(".") or name.endswith(".partial") or "orbax-checkpoint-tmp" in name]  # fmt: skip


def results(place: Path) -> dict[str, bytes]:
    """Return the files below a directory whose bytes depend on neither time nor speed."""
    kept = (".npz", ".safetensors", ".gguf", "keep.json", "config.json", "curve.csv")
    return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.name.endswith(kept)}


def until_it_fits(words: list[str], place: Path, capsys, sizes: list[int]) -> int:
    """Run a command under growing limits until it succeeds; return how often it failed."""
    for failed, size in enumerate(sizes):
        capsys.readouterr()
        with files_of_at_most(size):
            code = main.main(words)
        error = capsys.readouterr().err
        assert left_over(place) == [], f"a limit of {size} bytes"
        if code == 0:
            return failed
        assert code == 2, error
        assert "File too large" in error or "no space left on the disk" in error
        lines = [line for line in error.splitlines() if line.startswith("saap: ")]
        assert len(lines) == 1
        assert "Traceback" not in error
    pytest.fail(f"failed with files of {sizes[-1]} bytes: {error}")


SIZES = [0, 1000, 4000, 12_000, 40_000, 10**7]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads of orbax that fail
@pytest.mark.parametrize(
    "name",
    ["score", *(pytest.param(name, marks=pytest.mark.slow) for name in ("export", "compare", "padded", "recover"))],
)
def test_at_every_writer(name, tiny_model_directory, tmp_path, capsys):
    place, whole = tmp_path / "limited", tmp_path / "whole"
    assert main.main(commands(str(tiny_model_directory), whole)[name]) == 0
    words = commands(str(tiny_model_directory), place)[name]
    failed = until_it_fits(words, place, capsys, SIZES)
    assert failed >= 3
    assert results(place) == results(whole)
    assert results(place)
