"""What a stage of a run takes, as `stages` of `run.json` holds it.

| field               | content                                                                                     |
|---------------------|---------------------------------------------------------------------------------------------|
| `seconds`, `times`  | wall time, and how often the stage ran; sums are over all of them                           |
| `compile_seconds`   | part of `seconds` in which jax traced, lowered or compiled                                  |
| `compiles`          | programs that were compiled, or read from jax's compilation cache                           |
| `cache_hits`        | those that were read                                                                        |
| `cache_misses`      | those that were not there; 0 where nothing is kept, see `runtime.programs`                  |
| `peak_host_gib`     | peak memory of the process so far, GiB                                                      |
| `peak_device_gib`   | peak memory so far of the process's fullest device, GiB; null where the backend tells none  |
| `tokens`            | tokens processed; null where the stage says nothing                                         |
| `tokens_per_second` | `tokens` / `seconds`, compiling included; null as `tokens`                                  |
"""

import contextlib
import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from saap_jax.records import StageRecord

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
"""The event that jax records once a program."""

COMPILING = frozenset(
    {"/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", BACKEND_COMPILE}
)
"""The events of tracing, lowering and compiling (named alike in jax 0.9 to 0.12)."""

COUNTED = {f"/jax/compilation_cache/{name}": name for name in ("cache_hits", "cache_misses")}
"""The events of the compilation cache, and the fields that count them."""

_open: list["Stage"] = []
"""The stages that are being measured."""


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage while it runs."""

    name: str
    tokens: int = 0
    """Tokens processed so far; the code of the stage sets it or adds to it. 0: the stage says nothing."""
    compiles: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    compiling: list[tuple[float, float]] = dataclasses.field(default_factory=list, repr=False)
    """Start and end, in seconds, of whatever belonged to compiling."""
    seconds: float = 0.0


@contextlib.contextmanager
def measuring(stage: Stage) -> Iterator[None]:
    """Measure what runs inside, whether it ends well or not."""
    _listen()
    _open.append(stage)
    start = time.perf_counter()
    try:
        yield
    finally:
        stage.seconds = time.perf_counter() - start
        _open.remove(stage)


def with_stage(stages: Sequence[StageRecord], stage: Stage) -> list[StageRecord]:
    """Put a stage that has ended on record; one that is there already keeps its place, the two as one.

    >>> [load] = with_stage(with_stage([], Stage("load", tokens=3, seconds=2.0)), Stage("load", tokens=3, seconds=2.0))
    >>> [load[key] for key in ("name", "seconds", "times", "tokens", "tokens_per_second")]
    ['load', 4.0, 2, 6, 1.5]
    """
    place = next((number for number, each in enumerate(stages) if each["name"] == stage.name), len(stages))
    before: Any = stages[place] if place < len(stages) else {}
    seconds = before.get("seconds", 0.0) + stage.seconds
    tokens = ((before.get("tokens") or 0) + stage.tokens) or None
    record: StageRecord = {
        "name": stage.name,
        "seconds": seconds,
        "times": before.get("times", 0) + 1,
        "compile_seconds": before.get("compile_seconds", 0.0) + covered(stage.compiling),
        "compiles": before.get("compiles", 0) + stage.compiles,
        "cache_hits": before.get("cache_hits", 0) + stage.cache_hits,
        "cache_misses": before.get("cache_misses", 0) + stage.cache_misses,
        "peak_host_gib": max(before.get("peak_host_gib", 0.0), peak_host_gib()),
        "peak_device_gib": max(filter(None, (before.get("peak_device_gib"), peak_device_gib())), default=None),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens and seconds > 0 else None,
    }
    return [*stages[:place], record, *stages[place + 1 :]]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Measure the union of time spans: tracing one function may trace and compile others inside.

    >>> covered([(2.0, 3.0), (1.0, 4.0), (6.0, 6.5)])
    3.5
    """
    total = 0.0
    end = float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def peak_host_gib() -> float:
    """Read the peak memory of this process so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux


def peak_device_gib() -> float | None:
    """Read the peak memory so far of the fullest device of this process, GiB; None where the backend tells none."""
    import jax  # here and below, so that reading a report does not import it

    try:
        told = [device.memory_stats() or {} for device in jax.local_devices()]
    except RuntimeError:  # no device, or a plugin without this call: no reason to lose the rest of the record
        return None
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return max(peaks) / 2**30 if peaks else None


@functools.cache
def _listen() -> None:
    """Have jax tell the open stages of what it compiles; once a process, because listeners add up."""
    import jax.monitoring

    jax.monitoring.register_event_time_span_listener(_note)
    jax.monitoring.register_event_listener(_count)


def _note(event: str, start_time: float, end_time: float, **_: str | int) -> None:
    if event in COMPILING:
        for stage in list(_open):
            stage.compiling.append((start_time, end_time))
            stage.compiles += event == BACKEND_COMPILE


def _count(event: str, **_: str | int) -> None:
    if name := COUNTED.get(event):
        for stage in list(_open):
            setattr(stage, name, getattr(stage, name) + 1)
