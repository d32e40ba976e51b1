"""Processes: what a job of one does without others, words that say where they meet, and Pathways, by a fake."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from saap_jax.cli import main
from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.mesh import MeshConfig
from saap_jax.runs.stages import peak_device_gib
from saap_jax.runtime import gather, processes
from saap_jax.runtime.gather import fetched
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
        (["evaluate", "smollm2-135m", "--tasks", "piqa", "--mesh.data", "-1"], "tasks: expected none on a mesh"),
        (
            ["recover", "smollm2-135m", "--method.name", "lora", "--mesh.data", "-1"],
            "new_tokens: expected 0 on a mesh of several",
        ),
        (
            ["prune", "--targets.latency", "70%", "--mesh.data", "-1"],
            "targets: expected none that is measured on a mesh .* got latency",
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


# --- Pathways: one process writes, all devices are its own, and their memory is not this machine's -------


class Device:
    platform = "cpu"

    def __init__(self, runtime: str = "pjrt_ifrt", version: str = "cpu", *, process: int = 0, peak: int = 0) -> None:
        self.client = SimpleNamespace(runtime_type=runtime, platform_version=version)
        self.process_index, self._peak = process, peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self._peak * 2**30}


@pytest.fixture
def platforms():
    """What sets jax's platforms, until the test ends."""
    before, _ = jax.config.jax_platforms, jax.devices()  # which keep what they were started on
    yield lambda names: jax.config.update("jax_platforms", names)
    jax.config.update("jax_platforms", before)


@pytest.fixture
def pathways(platforms, monkeypatch) -> None:
    """Four machines that a proxy stands for, and a jax that would wait forever for three other processes."""

    def waits(*_, **__):
        raise AssertionError("waits for processes that do not exist")

    platforms("proxy,cpu")
    for name in ("broadcast_one_to_all", "sync_global_devices", "process_allgather"):
        monkeypatch.setattr(multihost_utils, name, waits)
    monkeypatch.setattr(jax.distributed, "initialize", waits)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)


@pytest.mark.parametrize(
    ("names", "found", "expected"),
    [
        ("proxy", Device(), True),
        ("proxy,cpu", Device(), True),
        (None, Device("proxy/pathways"), True),
        (None, Device("pathways"), True),
        ("", Device(version="Pathways 1.2"), True),
        (None, Device(), False),
        ("cpu", Device(), False),
        ("tpu,cpu", Device("pjrt_ifrt", "PJRT C API\nTFRT TPU v5 lite"), False),
        ("reverse_proxy", Device(), False),
    ],
)
def test_is_known_by_the_platforms_or_by_the_backend(names, found, expected, platforms, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [found])
    platforms(names)
    assert processes.under_pathways() == expected


@pytest.mark.parametrize("joined", [False, True])
def test_one_process_writes_and_waits_for_nobody(joined, pathways, platforms, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device was started"))
    assert processes.controllers() == 1
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    assert processes.is_primary()
    assert (processes.count(), processes.number(), processes.place()) == (1, 0, "")
    assert processes.broadcast(lambda: (1, 2)) == (1, 2)
    assert processes.broadcast_bytes(b"x") == b"x"
    processes.barrier("nowhere")
    platforms("cpu")
    assert processes.is_primary() != joined, "control"
    assert processes.count() == (4 if joined else 1), "control"


def test_devices_and_their_memory_are_the_controllers(pathways, platforms, monkeypatch):
    remote, spread = Device(process=3, peak=7), SimpleNamespace(is_fully_addressable=False)
    spread.devices = lambda: {remote, Device(process=5)}
    monkeypatch.setattr(jax, "devices", lambda: [Device(process=n, peak=3) for n in range(4)])
    monkeypatch.setattr(jax, "local_devices", lambda: [remote])

    def asked():
        own = len(processes.own_devices())
        return processes.belongs_here(spread), own, peak_device_gib(), processes.in_host_memory(spread)

    assert asked() == (True, 4, 3, False)
    platforms("cpu")
    assert asked() == (False, 1, 7, True), "control"


def test_arrays_are_read_through_the_proxy(pathways, monkeypatch):
    array, read = jnp.arange(6.0).reshape(2, 3), []
    monkeypatch.setattr(gather, "_assembled", lambda array, index: read.append(index))
    np.testing.assert_array_equal(fetched(array), np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(fetched(array, 1), [3, 4, 5])
    assert not read


def test_a_mesh_counts_one_process(pathways, platforms):
    assert layout_of_job(MeshConfig()) is None
    layout = layout_of_job(MeshConfig(data=-1))
    check_layout(layout)
    platforms("cpu")
    with pytest.raises(ValueError, match="mesh: expected the .* devices of 4 processes to be on it"):
        layout_of_job(MeshConfig())
    with pytest.raises(ValueError, match="of one process for a traced model, got 4 processes"):
        check_layout(layout)


def test_auto_makes_the_proxy_known_and_meets_nobody(pathways, monkeypatch, capsys):
    known = []
    monkeypatch.setitem(sys.modules, "pathwaysutils", SimpleNamespace(initialize=lambda: known.append(1)))
    assert processes.join(Cluster()) is False
    assert main.main(["score", "--estimators", "wandaa", "--distributed", "auto"]) == 2
    assert "unknown step" in capsys.readouterr().err
    assert known == [1, 1]
    monkeypatch.setitem(sys.modules, "pathwaysutils", None)
    with pytest.raises(ValueError, match="expected pathwaysutils, .* found none; pip install pathwaysutils"):
        processes.join(Cluster())
    with pytest.raises(ValueError, match="expected no processes that meet under Pathways .* got number 1 of 2"):
        processes.join(Cluster("h:1", 2, 1))
