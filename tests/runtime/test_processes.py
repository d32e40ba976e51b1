"""Processes: what a job of one does without others, and words that say where they meet."""

import re

import jax
import pytest
from jax.experimental import multihost_utils

from saap_jax.cli import main
from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.mesh import MeshConfig
from saap_jax.runtime import processes
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.processes import Cluster
from saap_jax.trace.subject.problem import check_layout


def test_one_process_needs_nobody():
    assert processes.is_primary()
    assert processes.place() == ""
    assert processes.broadcast(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    assert processes.broadcast_bytes(b"x") == b"x"
    processes.barrier("nowhere")
    processes.leave()


@pytest.mark.parametrize("content", [b"", b"x" * 1024, b"x" * 5000])
def test_what_the_first_of_two_finds_is_told_by_arrays(content, monkeypatch):
    sent = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda array: (sent.append(array.nbytes), array)[1])
    assert processes.broadcast_bytes(content) == content
    assert sent[1].bit_count() == 1, "few sizes"
    assert processes.broadcast(lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    for error in (FileNotFoundError("gone"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")):

        def fails(error=error):
            raise error

        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(error))):
            processes.broadcast(fails)


# --- words ---------------------------------------------------------------------------------------


def cluster_of(words: str) -> Cluster | None:
    return parse("score", COMMANDS["score"], words.split()).cluster


def test_words_that_say_where():
    where = "--distributed.coordinator [::1]:80 --distributed.processes 3 --distributed.process 1"
    assert cluster_of(where) == Cluster("[::1]:80", 3, 1)
    assert cluster_of("--distributed auto") == Cluster()
    assert cluster_of("--name b") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distributed.coordinator h:1 --distributed.processes 2", "or all of .*--distributed.process I, got"),
        ("--distributed.coordinator h --distributed.processes 2 --distributed.process 0", "HOST:PORT"),
        ("--distributed.coordinator h:1 --distributed.processes 2 --distributed.process -1", "from 0 to 1, got -1"),
        ("--distributed.coordinator h:1 --distributed.processes 2 --distributed.process 2", "from 0 to 1, got 2"),
        ("--distributed auto --distributed.process 2", "expected --distributed auto, or all of"),
    ],
)
def test_words_that_do_not_say_where(words, message):
    with pytest.raises(ValueError, match=message):
        cluster_of(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--distributed", "auto"], "did not meet at what Slurm, Open MPI, a TPU pod or GKE says"),
        (
            ["evaluate", "smollm2-135m", "--tasks", "piqa", "--mesh.data", "-1"],
            "mesh.data: expected no --tasks, .* got -1",
        ),
        (
            ["recover", "smollm2-135m", "--method.name", "lora", "--mesh.data", "-1"],
            "mesh.data: expected --new-tokens 0, .* got -1",
        ),
        (
            ["prune", "--targets.latency", "70%", "--mesh.data", "-1"],
            "mesh.data: expected no target that is measured beside it, got -1",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    def nobody(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nobody)
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_of_one_device_or_of_a_traced_model_takes_one_process(monkeypatch):
    assert layout_of_job(MeshConfig()) is None
    check_layout(layout_of_job(MeshConfig(data=-1)))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="mesh: expected the .* devices of 4 processes to be on it"):
        layout_of_job(MeshConfig())
    with pytest.raises(ValueError, match="of one process for a traced model, got 4 processes"):
        check_layout(layout_of_job(MeshConfig(data=-1)))
