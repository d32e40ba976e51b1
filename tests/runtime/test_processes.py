"""Words that say where processes meet, what a job of one does without them."""

import re

import pytest

from saap_jax.cli import main
from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.runtime import processes
from saap_jax.runtime.processes import Cluster, barrier, broadcast, broadcast_bytes, is_primary, place


def test_one_process_needs_nobody():
    assert is_primary()
    assert place() == ""
    assert broadcast(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    assert broadcast_bytes(b"x") == b"x"
    barrier("nowhere")
    processes.leave()
    assert cluster_of("--name b") is None


def cluster_of(words: str) -> Cluster | None:
    return parse("score", COMMANDS["score"], words.split())[2]


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


def test_an_address_may_be_ipv6():
    where = "--distributed.coordinator [::1]:80 --distributed.processes 3 --distributed.process 1"
    assert cluster_of(where) == Cluster("[::1]:80", 3, 1)
    assert cluster_of("--distributed auto") == Cluster()


def test_a_cluster_that_is_none_is_one_line(capsys, monkeypatch):
    def nobody(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nobody)
    assert main.main(["score", "--distributed", "auto"]) == 2
    assert "did not meet at what Slurm, Open MPI, a TPU pod or GKE says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "x", "--tasks", "piqa"], "tasks: expected none on a mesh"),
        (["recover", "x", "--method.name", "lora"], "new_tokens: expected 0 on a mesh of several devices"),
        (["prune", "--targets.latency", "70%"], "targets: expected none that is measured on a mesh .* got latency"),
    ],
)
def test_what_needs_one_device_is_refused_on_a_mesh(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*words, "--mesh.data", "-1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert list(tmp_path.iterdir()) == []
