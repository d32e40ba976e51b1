"""What is measured of a stage. No test says how long anything takes, only what counts at all."""

import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.runs import stages as monitor
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.stages import Stage, covered, measuring, peak_device_gib

FIELDS = [
    "name", "seconds", "times", "compile_seconds", "compiles", "cache_hits", "cache_misses", "peak_host_gib",
    "peak_device_gib", "tokens", "tokens_per_second",
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run", {"seed": 0}).begin()


def stages_of(run: RunDirectory) -> dict[str, dict]:
    return {stage["name"]: stage for stage in read_run(run.path)["stages"]}


class TestCompiling:
    def test_a_new_program_counts_once_with_those_inside_and_a_known_one_does_not(self, run):
        inner = jax.jit(lambda x: jnp.cos(x))
        fresh = jax.jit(lambda x: jax.lax.scan(lambda c, _: (inner(c), None), jnp.sin(x) @ x, None, length=2)[0])
        x, outside = jnp.ones((3, 3)), jax.jit(lambda x: x * 3)
        with run.stage("first"):
            fresh(x).block_until_ready()
        outside(x)
        with run.stage("second"):
            fresh(x).block_until_ready()
            outside(x)
        stages = stages_of(run)
        assert stages["first"]["compiles"] == 1
        assert 0 < stages["first"]["compile_seconds"] <= stages["first"]["seconds"] + 0.01  # two clocks
        assert (stages["second"]["compiles"], stages["second"]["compile_seconds"]) == (0, 0)

    def test_a_program_that_is_kept_is_a_hit_and_a_new_one_a_miss(self, run):
        new, x = float(time.time_ns() % 10**6), np.ones(3, np.float32)  # no run before this one can have kept it
        for stage in ("first", "second"):
            with run.stage(stage):
                jax.jit(lambda x: x * new)(x)
        counts = [
            [stage[key] for key in ("compiles", "cache_hits", "cache_misses")] for stage in stages_of(run).values()
        ]
        assert counts == [[1, 0, 1], [1, 1, 0]]

    def test_every_open_stage_counts(self):
        outer, inner, x = Stage("outer"), Stage("inner"), jnp.ones(5)
        with measuring(outer):
            with measuring(inner):
                jax.jit(lambda x: x * 5)(x)
            jax.jit(lambda x: x * 7)(x)
        assert (outer.compiles, inner.compiles) == (2, 1)
        assert covered(outer.compiling) > covered(inner.compiling)

    def test_other_events_do_not_count_nor_time_twice(self):
        with measuring(stage := Stage("load")):
            jax.monitoring.record_event_time_span("/jax/something/else", 0.0, 9.0)
            jax.monitoring.record_event_time_span(monitor.BACKEND_COMPILE, 1.0, 3.0, fun_name="f")
        assert (stage.compiles, covered(stage.compiling)) == (1, 2.0)
        trace, within, later = (10.0, 14.0), (11.0, 12.0), (13.5, 15.0)
        assert covered([within, trace, later]) == 5.0
        assert sum(end - start for start, end in (within, trace, later)) == 6.5, "the plain sum says more"


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ([{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**29}], 1.5),
        ([None, {"peak_bytes_in_use": 2**29}], 0.5),
        ([{"peak_bytes_in_use": 0}], 0.0),
        ([None], None),
        ([{"bytes_in_use": 5}], None),
        ([NotImplementedError("no such call")], None),
    ],
)
def test_memory_of_devices_is_what_the_backend_tells(stats, expected, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(each) for each in stats])
    assert peak_device_gib() == expected


def test_seconds_and_tokens_add_up_whether_a_stage_fails_or_not(run, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 14.0, 20.0, 21.5])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    with run.stage("score") as stage:
        stage.tokens += 64

    def fail():
        with run.stage("score") as stage:
            stage.tokens += 32
            run.update(model={"name": "m"})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with run.stage("load"):
        pass
    score, load = stages_of(run).values()
    assert list(score) == FIELDS
    assert (score["tokens"], score["seconds"], score["tokens_per_second"], score["times"]) == (96, 6.0, 16.0, 2)
    assert (load["tokens"], load["tokens_per_second"], load["seconds"]) == (None, None, 1.5)
    assert 0.01 < load["peak_host_gib"] < 10_000
    assert read_run(run.path)["model"] == {"name": "m"}
    assert not monitor._open
