"""What a stage of a run takes, as `stages` of `run.json` holds it.

| field               | content                                                                                     |
|---------------------|---------------------------------------------------------------------------------------------|
| `seconds`           | wall time                                                                                   |
| `times`             | how often the stage ran; sums are over all of them                                          |
| `compile_seconds`   | part of `seconds` in which jax traced, lowered or compiled                                  |
| `compiles`          | programs that were compiled, or read from jax's compilation cache                           |
| `peak_host_gib`     | peak memory of the process so far, GiB                                                      |
| `peak_device_gib`   | peak memory so far of the process's fullest device, GiB; null where the backend tells none  |
| `tokens`            | tokens processed; null where the stage says nothing                                         |
| `tokens_per_second` | `tokens` / `seconds`, compiling included; null as `tokens`                                  |

Fields that a version before this one did not record stay absent when it goes on with a run.
"""

import contextlib
import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from saap_jax.runs.records import Stage as StageRecord
from saap_jax.runtime.processes import own_devices

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
"""The event that jax records once a program."""

COMPILING = frozenset(
    {"/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", BACKEND_COMPILE}
)
"""The events of tracing, lowering and compiling (named alike in jax 0.9 to 0.12)."""

_open: list["Stage"] = []
"""The stages that are being measured."""


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage while it runs."""

    name: str
    tokens: int = 0
    """Tokens processed so far; the code of the stage sets it or adds to it. 0: the stage says nothing."""
    compiles: int = 0
    compiling: list[tuple[float, float]] = dataclasses.field(default_factory=list, repr=False)
    """Start and end, in seconds, of whatever belonged to compiling."""
    seconds: float = 0.0

    def record(self) -> StageRecord:
        """Return the stage as `run.json` holds it, run once."""
        tokens = self.tokens or None
        return {
            "name": self.name,
            "seconds": self.seconds,
            "times": 1,
            "compile_seconds": covered(self.compiling),
            "compiles": self.compiles,
            "peak_host_gib": peak_host_gib(),
            "peak_device_gib": peak_device_gib(),
            "tokens": tokens,
            "tokens_per_second": _rate(tokens, self.seconds),
        }


@contextlib.contextmanager
def measuring(stage: Stage) -> Iterator[None]:
    """Measure what runs inside, whether it ends well or not; `record` of the stage has the result afterwards."""
    _listen()
    _open.append(stage)
    start = time.perf_counter()
    try:
        yield
    finally:
        stage.seconds = time.perf_counter() - start
        _open.remove(stage)


def with_stage(stages: Sequence[StageRecord], new: StageRecord) -> list[StageRecord]:
    """Return the stages on record with one more; a stage that is there already keeps its place, the two as one.

    >>> stage = Stage("load", tokens=3, seconds=2.0)
    >>> [load] = with_stage([stage.record()], stage.record())
    >>> [load[key] for key in ("name", "seconds", "times", "tokens", "tokens_per_second")]
    ['load', 4.0, 2, 6, 1.5]
    """
    found = list(stages)
    index = next((number for number, stage in enumerate(found) if stage["name"] == new["name"]), len(found))
    found[index : index + 1] = [_together(before, new) for before in found[index : index + 1]] or [new]
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of time spans: tracing one function may trace and compile others inside.

    >>> covered([(2.0, 3.0), (1.0, 4.0), (6.0, 6.5)])
    3.5
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def peak_host_gib() -> float:
    """Return the peak memory of this process so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux


def peak_device_gib() -> float | None:
    """Return the peak memory so far of the fullest device of this process, GiB; None where the backend tells none."""
    try:
        told = [device.memory_stats() or {} for device in own_devices()]
    except RuntimeError:  # no device, or a plugin without this call: no reason to lose the rest of the record
        return None
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return max(peaks) / 2**30 if peaks else None


@functools.cache
def _listen() -> None:
    """Have jax tell the open stages of what it compiles; once a process, because listeners add up."""
    import jax.monitoring  # here, so that reading a report does not import it

    jax.monitoring.register_event_time_span_listener(_note)


def _note(event: str, start_time: float, end_time: float, **_: str | int) -> None:
    if event in COMPILING:
        for stage in list(_open):
            stage.compiling.append((start_time, end_time))
            stage.compiles += event == BACKEND_COMPILE


def _together(before: Mapping[str, Any], now: Mapping[str, Any]) -> StageRecord:
    """Return two records of one stage as one; a sum of which a part was not recorded is left out."""
    both = dict(now) | {"seconds": before["seconds"] + now["seconds"], "times": before.get("times", 1) + now["times"]}
    for key in ("peak_host_gib", "peak_device_gib"):
        both[key] = max((peak for peak in (before.get(key), now[key]) if peak is not None), default=None)
    for key in ("compile_seconds", "compiles"):
        both[key] = (before.get(key) or 0) + now[key]
    both["tokens"] = (before.get("tokens") or 0) + (now["tokens"] or 0) or None
    both["tokens_per_second"] = _rate(both["tokens"], both["seconds"])
    unknown = {"compile_seconds", "compiles", "tokens", "tokens_per_second"} - set(before)
    return cast(StageRecord, {key: value for key, value in both.items() if key not in unknown})


def _rate(tokens: int | None, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
