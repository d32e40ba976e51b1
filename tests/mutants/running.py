"""Tests on another copy of the package: a folder that has all that the repository has, but for the package itself."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

FAILED = 1
"""Exit code of pytest where tests ran and some failed; others stand for what could not be collected or run."""

_OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
_MARKED = _OPTIONS.split("-m 'not slow and ")[1].rstrip("'")
"""The tests of the default suite, and those that are slow."""

_LIMIT = 900
"""Seconds, far more than any of these tests takes."""

_APART = {"saap_jax", ".git", ".venv", ".pytest_cache", "build", "dist", "runs"}

_COMMAND = """
import sys, pytest
code = pytest.main(sys.argv[1:])
import saap_jax  # which the tests have imported from wherever they found it
print(saap_jax.__file__)
sys.exit(code)
"""


class Outcome(NamedTuple):
    """What tests said of a copy."""

    code: int
    """That of pytest."""
    package: str
    """The file of the package that they imported."""
    said: str
    """All that was printed."""


def package_beside_links(folder: Path) -> Path:
    """Copy the package into a folder, link what else the repository has beside it, and return the copy."""
    for each in ROOT.iterdir():
        if each.name not in _APART:
            (folder / each.name).symlink_to(each)
    copy = folder / "saap_jax"
    # with what Python compiled of it, which saves seconds, but for files that it is about to rename
    shutil.copytree(ROOT / "saap_jax", copy, ignore=shutil.ignore_patterns("*.pyc.*"))
    return copy


def changed(file: Path, old: str, new: str) -> None:
    """Replace what a file has exactly once, and forget what was compiled of it.

    Raises:
        ValueError: it has it more often, or not at all.
    """
    text = file.read_text()
    if (count := text.count(old)) != 1:
        raise ValueError(f"{file.name}: expected {old!r} once, got it {count} times; say more of its line")
    file.write_text(text.replace(old, new))
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()


def run_tests(folder: Path, tests: str) -> Outcome:
    """Run tests, slow ones too, until the first fails, by the package in a folder alone."""
    given = [*shlex.split(tests), "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", _MARKED]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *given],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return Outcome(done.returncode, lines[-1] if lines else "", done.stdout)
