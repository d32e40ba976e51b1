"""Pathways, by a fake: one process writes, all devices are its own, and their memory is not this machine's."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from saap_jax.cli import main
from saap_jax.config.mesh import MeshConfig
from saap_jax.runs.stages import peak_device_gib
from saap_jax.runtime import gather, processes
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.processes import Cluster
from saap_jax.trace.subject.problem import check_layout

GIB = 2**30


class Device:
    platform = "cpu"

    def __init__(self, runtime: str = "pjrt_ifrt", version: str = "cpu", *, process: int = 0, peak: int = 0) -> None:
        self.client = SimpleNamespace(runtime_type=runtime, platform_version=version)
        self.process_index, self._peak = process, peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self._peak * GIB}


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
        ("", Device(), False),
        ("cpu", Device(), False),
        ("tpu,cpu", Device("pjrt_ifrt", "PJRT C API\nTFRT TPU v5 lite"), False),
        ("reverse_proxy", Device(), False),
    ],
)
def test_is_known_by_the_platforms_or_by_the_backend(names, found, expected, platforms, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [found])
    platforms(names)
    assert processes.under_pathways() == expected


def test_a_named_proxy_starts_no_device(pathways, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device was started"))
    assert processes.under_pathways()
    assert processes.count() == processes.controllers() == 1


@pytest.mark.parametrize("joined", [False, True])
def test_one_process_writes_and_waits_for_nobody(joined, pathways, platforms, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    assert processes.is_primary()
    assert (processes.count(), processes.number(), processes.place()) == (1, 0, "")
    assert processes.broadcast(lambda: (1, 2)) == (1, 2)
    assert processes.broadcast_bytes(b"x") == b"x"
    processes.barrier("nowhere")
    platforms("cpu")
    assert processes.is_primary() != joined, "control"
    assert processes.count() == (4 if joined else 1), "control"


def test_devices_belong_to_the_controller_whatever_their_number(pathways, platforms, monkeypatch):
    remote, spread = Device(process=3), SimpleNamespace(is_fully_addressable=False)
    monkeypatch.setattr(jax, "devices", lambda: [remote, Device(process=5)])
    monkeypatch.setattr(jax, "local_devices", lambda: [remote])

    def asked():
        return processes.belongs_here(spread), len(processes.own_devices())

    assert asked() == (True, 2)
    platforms("cpu")
    assert asked() == (False, 1), "control"


def test_arrays_are_read_through_the_proxy_and_in_place_elsewhere(pathways, platforms, monkeypatch):
    array, read = jnp.arange(6.0).reshape(2, 3), []
    monkeypatch.setattr(gather, "_assembled", lambda array, index: read.append(index))
    array_on_two = SimpleNamespace(devices=lambda: {Device(process=3), Device(process=5)})
    assert not processes.in_host_memory(array_on_two)
    np.testing.assert_array_equal(fetched(array), np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(fetched(array, 1), [3, 4, 5])
    assert not read
    platforms("cpu")
    assert processes.in_host_memory(array_on_two), "control"


def test_memory_of_devices_is_not_that_of_this_machine(pathways, platforms, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(process=n, peak=3) for n in range(4)])
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(peak=7)])
    assert peak_device_gib() == 3
    platforms("cpu")
    assert peak_device_gib() == 7, "control"


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


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            Cluster("h:1", 2, 1),
            "expected no processes that meet under Pathways .* got number 1 of 2; give --distributed",
        ),
        (Cluster(), "--distributed auto: expected pathwaysutils, .* found none; pip install pathwaysutils"),
    ],
)
def test_what_cannot_be_met_is_refused(cluster, message, pathways, monkeypatch):
    monkeypatch.setitem(sys.modules, "pathwaysutils", None)
    with pytest.raises(ValueError, match=message):
        processes.join(cluster)
