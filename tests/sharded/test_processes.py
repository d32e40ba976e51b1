"""Several processes, started as a user would on one machine: they give what one process gives, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from saap_jax.cli import main
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.runs.directory import read_candidates, read_run
from tests.helpers import changed
from tests.xla_flags import forced

pytestmark = pytest.mark.sharded

PROJECT = Path(__file__).parents[2]
SCORE = [
    *("--calibration.examples", "8", "--calibration.length", "12", "--calibration.batch-size", "4"),
    *("--estimators", "gate_fisher", "fisher"),
]
PRUNE = ["--method", "gate_fisher > uniform > self_calibration(8, 4) > bias", "--ratio", "0.3"]
EVALUATE = ["--windows", "4", "--length", "12", "--batch-size", "4"]
RECOVER = [
    *("--dense", "", "--method.name", "full", "--new-tokens", "0", "--data.length", "12", "--training.warmup", "1"),
    *("--training.batch-size", "8", "--training.microbatch", "4", "--training.learning-rate", "0.01"),
    *("--evaluation.windows", "4", "--evaluation.length", "12", "--evaluation.batch-size", "4"),
]
GROUPWISE = [{"full": "groupwise"}.get(word, word) for word in RECOVER]
GROUPWISE += ["--name", "groupwise", "--method.group-size", "8"]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | forced(devices) | {"PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}


def started(commands: list[list[str]], devices: int = 1) -> list[subprocess.Popen]:
    return [
        subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(devices),
        )
        for words in commands
    ]


def together(processes: int, devices: int, jobs: list[list[str]], directory: Path) -> list[str]:
    """Run jobs in several processes; return what each said."""
    file, at = directory / "jobs.json", str(port())
    file.write_text(json.dumps(jobs))
    worker = str(Path(__file__).with_name("worker.py"))
    running = started([[worker, at, str(processes), str(number), str(file)] for number in range(processes)], devices)
    said = [each.communicate(timeout=400)[0] for each in running]
    assert [each.returncode for each in running] == [0] * processes, "\n".join(said)
    return said


def jobs_of(model: Path, place: Path, mesh: list[str]) -> list[list[str]]:
    """Return the jobs: what is scored is pruned and evaluated; a model is recovered for two steps."""
    named, runs = ["--model.name", str(model)], ["--runs", str(place / "runs")]
    scores, out = ["--from-run", str(place / "runs" / "score")], ["--out", str(place / "pruned")]
    text = ["--data.sources", f"text:{text_of(model)}", "--training.max-steps", "2"]
    return [
        ["score", *named, *SCORE, *runs, *mesh],
        ["prune", *named, *PRUNE, *scores, *out, *mesh],
        ["evaluate", str(model), *EVALUATE, "--json", str(place / "ppl.json"), *mesh],
        ["recover", "--model", str(model), *RECOVER, *text, *runs, *mesh],
        ["recover", "--model", str(model), *GROUPWISE, *text, *runs, *mesh],
    ]


def text_of(model: Path) -> Path:
    path = model.parent / "text.txt"
    if not path.exists():
        words = np.random.default_rng(0).choice(
            ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "log", "ran", "far"], 1500
        )
        path.write_text("\n\n".join(" ".join(words[n : n + 30]) for n in range(0, 1500, 30)))
    return path


@pytest.fixture(scope="module")
def teacher(tiny_model_directory, tmp_path_factory) -> Path:
    """A dense model that is another one."""
    other = changed(load_model(tiny_model_directory), "segments/0/mlp/down", lambda x: 2 * x)
    tokenizer = load_tokenizer(tiny_model_directory)
    return save_model(other, tmp_path_factory.mktemp("teacher") / "dense", tokenizer=tokenizer)


def taught(model: Path, teacher: Path, place: Path, mesh: list[str]) -> list[str]:
    """Return the job that recovers a model for three steps from text and from what another one predicts."""
    text = ["--data.sources", f"text:{text_of(model)}", "--training.max-steps", "3", "--runs", str(place / "runs")]
    taught = ["--training.distillation", "0.5", "--dense", str(teacher)]
    return ["recover", "--model", str(model), *RECOVER, *text, *taught, *mesh, "--name", "taught"]


@pytest.fixture(scope="module")
def scored(tiny_model_directory, tmp_path_factory) -> Path:
    """What one process and one device make of the first job."""
    place = tmp_path_factory.mktemp("alone")
    assert main.main(jobs_of(tiny_model_directory, place, [])[0]) == 0
    return place


def same_tensors(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_allclose(value, b[name], rtol=tolerance, atol=tolerance * np.abs(value).max())


def same_scores(ours: Path, theirs: Path) -> None:
    with np.load(ours) as a, np.load(theirs) as b:
        assert a.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6 * np.abs(b[name]).max())


def test_two_processes_give_what_one_gives(scored, teacher, tiny_model_directory, tmp_path):
    """Scores, statistics, chosen units, the cut model, perplexity, and a model recovered for two steps.

    And what is learned from a dense model that is another one: each step's divergence, and the weights.
    """
    alone, place, mesh = scored, tmp_path, ["--mesh.fsdp", "2", "--mesh.tensor", "2"]
    jobs = [*jobs_of(tiny_model_directory, alone, []), taught(tiny_model_directory, teacher, alone, [])]
    assert [main.main(words) for words in jobs[1:]] == [0] * 5
    jobs = [*jobs_of(tiny_model_directory, place, mesh), taught(tiny_model_directory, teacher, place, mesh)]
    said = together(2, 2, jobs, place)
    same_scores(place / "runs" / "score" / "scores.npz", alone / "runs" / "score" / "scores.npz")
    statistics = Path("runs") / "score" / "statistics" / "reference.safetensors"
    same_tensors(place / statistics, alone / statistics)
    assert (place / "pruned" / "keep.json").read_text() == (alone / "pruned" / "keep.json").read_text()
    for model in (Path("pruned"), *(Path("runs") / name / "model" for name in ("recover", "groupwise"))):
        same_tensors(place / model / "model.safetensors", alone / model / "model.safetensors")
    ours, theirs = (json.loads((each / "ppl.json").read_text()) for each in (place, alone))
    for (_, one), (_, other) in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    losses = [[row["loss"] for row in read_candidates(p / "runs" / "recover")] for p in (place, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert read_run(place / "runs" / "recover")["devices"]["count"] == 4
    assert [path.name for path in place.rglob("*.partial")] == []
    assert "ppl@12" in said[0]
    ours, theirs = (each / "runs" / "taught" for each in (place, alone))
    divergences = [[row["divergence"] for row in read_candidates(place)] for place in (ours, theirs)]
    np.testing.assert_allclose(*divergences, rtol=1e-3)
    assert min(divergences[0]) > 1e-3
    same_tensors(ours / "model" / "model.safetensors", theirs / "model" / "model.safetensors", 1e-4)


def numbers(tree, path: str = "") -> list[tuple[str, float]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [pair for key, value in items for pair in numbers(value, f"{path}/{key}")]
    return found or ([(path, tree)] if isinstance(tree, int | float) else [])


def test_four_processes_score(scored, tiny_model_directory, tmp_path):
    jobs = jobs_of(tiny_model_directory, tmp_path, ["--mesh.data", "2", "--mesh.fsdp", "-1"])
    together(4, 1, [[word for word in jobs[0] if word != "fisher"]], tmp_path)
    same_scores(tmp_path / "runs" / "score" / "scores.npz", scored / "runs" / "score" / "scores.npz")


def commands(words: list[str], processes: int = 2) -> list[list[str]]:
    """Return `saap` words as each process of a job gets them from a launcher."""
    where = ["--distributed.coordinator", f"127.0.0.1:{port()}", "--distributed.processes", str(processes)]
    return [["-m", "saap_jax", *words, *where, "--distributed.process", str(number)] for number in range(processes)]


def until(found, running: list[subprocess.Popen], seconds: float = 120) -> None:
    start = time.monotonic()
    while not found():
        assert all(each.poll() is None for each in running), "\n".join(each.communicate()[0] for each in running)
        assert time.monotonic() - start < seconds
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_job_which_then_goes_on(victim, tiny_model_directory, tmp_path):
    """The other process ends within a minute, says so, and the job goes on from its last checkpoint."""
    text, steps = text_of(tiny_model_directory), 60
    words = ["recover", "--model", str(tiny_model_directory), "--data.sources", f"text:{text}", *RECOVER]
    words += ["--training.epochs", "50", "--training.check-every", "5", "--mesh.data", "2"]
    words += ["--training.max-steps", str(steps), "--runs", str(tmp_path)]
    run = tmp_path / "recover"
    running = started(commands(words))
    until(lambda: len(list(run.glob("checkpoints/[0-9]*[0-9]"))) > 0, running)
    running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = running[1 - victim].communicate(timeout=60)[0]
    assert time.monotonic() - killed < 60
    assert running[1 - victim].returncode == 3
    assert f"process {1 - victim} of 2: another process of this job has ended" in said.splitlines()[-1]
    running[victim].communicate()
    saved = max(int(path.name) for path in run.glob("checkpoints/[0-9]*[0-9]"))
    done = len(read_candidates(run))
    assert 1 <= saved <= done < steps
    if victim == 0:
        return  # going on is the same, and takes as long again
    again = started(commands([*words, "--resume"]))
    said = [each.communicate(timeout=400)[0] for each in again]
    assert [each.returncode for each in again] == [0, 0], said
    rows = read_candidates(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert f"step {steps} of {steps}" in said[0]
    assert f"step {steps}" not in said[1]


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_ends_all(number, code, tiny_model_directory, tmp_path):
    """As Ctrl-C in a terminal, or a scheduler, sends it: each ends by itself, and none says that another has died."""
    words = ["recover", "--model", str(tiny_model_directory), "--data.sources", f"text:{text_of(tiny_model_directory)}"]
    words += [*RECOVER, "--training.epochs", "2000", "--training.check-every", "5", "--mesh.data", "2"]
    steps = "2000"  # it never comes to its end: on a busy machine the signal is sent late
    running = started(commands([*words, "--training.max-steps", steps, "--runs", str(tmp_path)]))
    until(lambda: len(list(tmp_path.glob("recover/checkpoints/[0-9]*[0-9]"))) > 0, running)
    for process in running:
        process.send_signal(number)
    said = [process.communicate(timeout=120)[0] for process in running]  # for a busy machine: the watch itself waits 17
    assert [process.returncode for process in running] == [code, code], said
    assert all("the same command goes on" in text and "has ended" not in text for text in said)


def test_bad_input_ends_every_process(tiny_model_directory, tmp_path):
    """With one line each, exit code 2 and no run directory: here, a mesh that is not told of the processes."""
    words = ["score", "--model.name", str(tiny_model_directory), *SCORE, "--runs", str(tmp_path / "runs")]
    running = started(commands(words))
    said = [each.communicate(timeout=100)[0] for each in running]
    assert [each.returncode for each in running] == [2, 2], said
    for number, text in enumerate(said):
        lines = [line for line in text.splitlines() if line.startswith("saap: ")]
        assert len(lines) == 1
        assert f"saap: process {number} of 2: mesh: expected the 2 devices of 2 processes" in lines[0]
    assert not (tmp_path / "runs").exists()
