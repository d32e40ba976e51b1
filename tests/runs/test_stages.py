"""What is measured of a stage. No test says how long anything takes, only what counts at all."""

import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from saap_jax.runs import stages as monitor
from saap_jax.runs.directory import RunDirectory, read_run
from saap_jax.runs.stages import Stage, covered, measuring, peak_device_gib

FIELDS = [
    "name", "seconds", "times", "compile_seconds", "compiles", "peak_host_gib", "peak_device_gib", "tokens",
    "tokens_per_second",
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run", {"seed": 0}).begin()


def stages_of(run: RunDirectory) -> dict[str, dict]:
    return {stage["name"]: stage for stage in read_run(run.path)["stages"]}


class TestCompiling:
    def test_a_new_program_counts_and_a_known_one_does_not(self, run):
        fresh, x = jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((3, 3))
        for name in ("first", "second"):
            with run.stage(name):
                fresh(x).block_until_ready()
        stages = stages_of(run)
        assert stages["first"]["compiles"] == 1
        assert 0 < stages["first"]["compile_seconds"] <= stages["first"]["seconds"] + 0.01  # two clocks
        assert (stages["second"]["compiles"], stages["second"]["compile_seconds"]) == (0, 0)

    def test_a_program_within_a_program_is_one(self, run):
        inner = jax.jit(lambda x: jnp.cos(x))
        outer = jax.jit(lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0])
        x = jnp.ones(3)
        with run.stage("score"):
            outer(x)
        assert stages_of(run)["score"]["compiles"] == 1

    def test_what_is_compiled_outside_of_a_stage_is_nobodys(self, run):
        x = jnp.ones(4)
        with run.stage("one"):
            pass
        jax.jit(lambda x: x * 3)(x)
        with run.stage("two"):
            pass
        assert {stage["compiles"] for stage in stages_of(run).values()} == {0}

    def test_every_open_stage_counts(self):
        outer, inner, x = Stage("outer"), Stage("inner"), jnp.ones(5)
        with measuring(outer):
            with measuring(inner):
                jax.jit(lambda x: x * 5)(x)
            jax.jit(lambda x: x * 7)(x)
        assert (outer.compiles, inner.compiles) == (2, 1)
        assert covered(outer.compiling) > covered(inner.compiling)

    def test_jax_is_told_once_a_process(self, monkeypatch):
        told = []
        monkeypatch.setattr(jax.monitoring, "register_event_time_span_listener", told.append)
        monkeypatch.setattr(monitor, "_listen", functools.cache(monitor._listen.__wrapped__))
        for _ in range(3):
            with measuring(Stage("load")):
                pass
        assert told == [monitor._note]

    def test_other_events_do_not_count(self):
        with measuring(stage := Stage("load")):
            jax.monitoring.record_event_time_span("/jax/something/else", 0.0, 9.0)
            jax.monitoring.record_event_time_span(monitor.BACKEND_COMPILE, 1.0, 3.0, fun_name="f")
        assert (stage.compiles, covered(stage.compiling)) == (1, 2.0)

    def test_time_is_not_counted_twice(self):
        trace, within, later = (10.0, 14.0), (11.0, 12.0), (13.5, 15.0)
        assert covered([within, trace, later]) == 5.0
        assert sum(end - start for start, end in (within, trace, later)) == 6.5, "the plain sum says more"
        assert covered([]) == 0.0


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats


class TestMemory:
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
    def test_of_devices_is_what_the_backend_tells(self, stats, expected, monkeypatch):
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(each) for each in stats])
        assert peak_device_gib() == expected

    def test_is_absent_on_a_cpu_rather_than_zero(self, run):
        if jax.devices()[0].platform != "cpu":
            pytest.skip("this machine's devices tell their memory")
        with run.stage("load"):
            pass
        assert stages_of(run)["load"]["peak_device_gib"] is None
        assert stages_of(run)["load"]["peak_host_gib"] > 0


class TestTokens:
    def test_of_a_stage_add_up(self, run, monkeypatch):
        clock = iter([0.0, 2.0, 10.0, 14.0])
        monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
        for tokens in (64, 32):
            with run.stage("score") as stage:
                stage.tokens += tokens
        score = stages_of(run)["score"]
        assert list(score) == FIELDS
        assert (score["tokens"], score["seconds"], score["tokens_per_second"], score["times"]) == (96, 6.0, 16.0, 2)

    def test_that_nobody_counted_are_null(self, run):
        with run.stage("load"):
            pass
        load = stages_of(run)["load"]
        assert (load["tokens"], load["tokens_per_second"]) == (None, None)
        assert load["seconds"] >= 0

    def test_survive_a_stage_that_fails(self, run):
        def fail():
            with run.stage("evaluate") as stage:
                stage.tokens = 10
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        with run.stage("evaluate") as stage:
            stage.tokens = 5
        assert (stages_of(run)["evaluate"]["tokens"], stages_of(run)["evaluate"]["times"]) == (15, 2)
        assert not monitor._open
