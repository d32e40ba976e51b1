"""Words that say where processes meet, what a job of one does without them, and how a death is noticed."""

import re
import socket
import threading
import time

import jax
import pytest

from saap_jax.cli import main
from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.runtime import processes, watch
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


class Watched:
    """The first process of a job, which watches others that a test plays."""

    def __init__(self, monkeypatch):
        self.lost, self.told = [], threading.Event()
        monkeypatch.setattr(watch, "_end", self._end)
        self.watch, server = watch.Watch(first=True), socket.create_server(("127.0.0.1", 0))
        self.port, self.token = server.getsockname()[1], b"t" * 16
        threading.Thread(target=self.watch.serve, args=(server, self.token), daemon=True).start()

    def _end(self, lost: int) -> None:
        self.lost.append(lost)
        self.told.set()

    def connect(self, process: int, token: bytes | None = None) -> socket.socket:
        connection = watch._connect("127.0.0.1", self.port, (token or self.token) + process.to_bytes(4, "big"))
        assert connection is not None
        return connection


def test_a_connection_that_closes_tells_who_died_and_all_others(monkeypatch):
    watched = Watched(monkeypatch)
    stays, dies = watched.connect(1), watched.connect(2)
    stranger = watched.connect(3, b"x" * 16)
    stranger.settimeout(10)
    assert stranger.recv(1) == b""  # and by then the two before it are known
    dies.close()
    assert watched.told.wait(10)
    assert watched.lost == [2]
    watched.told.clear()
    watch.Watch(first=False).follow(stays)
    assert watched.told.wait(10)
    assert watched.lost == [2, 2]
    watched.watch.leaving()
    stays.close()
    stranger.close()


def test_a_farewell_is_no_death(monkeypatch):
    watched = Watched(monkeypatch)
    leaves, dies = watched.connect(1), watched.connect(2)
    leaves.sendall(b".")
    leaves.close()
    dies.close()
    assert watched.told.wait(10)
    assert watched.lost == [2]
    assert "start the job again" in watch.lost_words("process 2")


def test_the_first_process_with_an_error_ends_last(monkeypatch):
    monkeypatch.setattr(watch, "count", lambda: 3)
    watched = Watched(monkeypatch)
    others = [watched.connect(1), watched.connect(2)]
    heard = [watch.Watch(first=False), watch.Watch(first=False)]
    for each, connection in zip(heard, others, strict=True):
        each.failing(ValueError("of its own"))
        threading.Thread(target=each.follow, args=(connection,), daemon=True).start()
    watched.watch.failing(ValueError("of its own"))
    while len(watched.watch._peers) < 2:
        time.sleep(0.01)
    parting = threading.Thread(target=watched.watch.part, args=(False,), daemon=True)
    parting.start()
    for each in heard:
        each.part(interrupted=False)
        assert each._failing == {0}
    others[0].shutdown(socket.SHUT_RDWR)
    parting.join(0.2)
    assert parting.is_alive()  # one is still there
    others[1].shutdown(socket.SHUT_RDWR)
    parting.join(watch.GRACE / 2)
    assert not parting.is_alive()
    assert watched.lost == []
    for connection in others:
        connection.close()


@pytest.mark.parametrize(
    ("error", "lost"), [(jax.errors.JaxRuntimeError("Connection closed by peer"), [1]), (ValueError("bad input"), [])]
)
def test_an_error_of_jax_waits_for_the_news_of_a_death(error, lost, monkeypatch):
    """A collective may notice the death of its peer before the watch does; bad input is no such thing."""
    watched = Watched(monkeypatch)
    dies = watched.connect(1)
    while not watched.watch._peers:
        time.sleep(0.01)
    death = threading.Timer(0.3, dies.close)
    death.start()
    watched.watch.failing(error)
    assert sorted(set(watched.lost)) == lost
    death.join()


def test_an_error_of_jax_that_is_no_death_is_its_own(monkeypatch):
    monkeypatch.setattr(watch, "LATE", 0.1)
    watched = Watched(monkeypatch)
    lives = watched.connect(1)
    watched.watch.failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"))
    lives.close()
    assert not watched.told.wait(0.3)
    assert watched.lost == []


@pytest.mark.parametrize("finds_it_too", [True, False])
def test_an_error_of_another_leaves_time_to_find_the_same(finds_it_too, monkeypatch):
    monkeypatch.setattr(watch, "OWN", 0.2)
    watched = Watched(monkeypatch)
    fails = watched.connect(1)
    fails.sendall(b"!")
    if finds_it_too:
        watched.watch.failing(ValueError("the same"))
    assert watched.told.wait(1) != finds_it_too
    assert watched.lost == [1] * (not finds_it_too)
    fails.close()
