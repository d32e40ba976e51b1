"""A run as TensorBoard scalars: `tensorboardX` encodes them, so no TensorFlow is needed.

| tag                                                      | step               | value                     |
|----------------------------------------------------------|--------------------|---------------------------|
| `FIELD/STAGE`, for example `seconds/score`, of `FIELDS`  | 0                  | see `monitor`             |
| `candidates/METRIC`                                      | its number, from 1 | perplexity of a candidate |
| `training/FIELD`, of `TRAINING`                          | its step           | what a training step told |

The file is made anew from `run.json` and `metrics.jsonl` when a run ends (and at each check of a training), not written
along the way. So it says what
the records say, however often the run was killed, taken up again or overwritten; an event file can only grow, and a
stage that goes on or a candidate that is recorded twice would stay in it twice.
"""

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.runs.directory import RunDirectory, read_candidates
from saap_jax.runtime.files import write_atomically
from saap_jax.runtime.processes import is_primary

DIRECTORY, FILE = "tensorboard", "events.out.tfevents.saap"
"""TensorBoard reads every file whose name contains "tfevents"; one fixed name, so that writing replaces."""

FIELDS = (
    "seconds", "compile_seconds", "compiles", "peak_host_gib", "peak_device_gib", "tokens", "tokens_per_second",
)  # fmt: skip
"""What is shown of a stage, where the record has it."""


TRAINING = ("loss", "held_out", "divergence", "norm", "learning_rate", "tokens_per_second")
"""What is shown of a step of training."""


class Scalar(NamedTuple):
    """One point of a curve."""

    tag: str
    step: int
    value: float


def write_scalars(run: RunDirectory) -> Path:
    """Write the scalars of a run, finished or not, in place of those that are there; return the file's path."""
    # Here: importing it takes a moment, and imports torch where there is one.
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (made on import)
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    path = run.claim(DIRECTORY) / FILE
    if not is_primary():
        return path
    path.parent.mkdir(exist_ok=True)
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    for tag, step, value in scalars(run.record, read_candidates(run.path)[0]):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        events.append(Event(wall_time=now, step=step, summary=summary))
    content = b"".join(_framed(event.SerializeToString()) for event in events)
    write_atomically(path, content, partial=path.with_name(f".{DIRECTORY}.partial"))  # TensorBoard reads no such name
    return path


def _framed(event: bytes) -> bytes:
    """Return an event as the file holds it: its length and itself, a checksum behind each."""
    from tensorboardX.record_writer import masked_crc32c

    parts = (struct.pack("<Q", len(event)), event)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)


def scalars(record: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> Iterator[Scalar]:
    """Return the scalars of a run; what was not recorded (null or absent) has none, rather than a zero."""
    for stage in record.get("stages", []):
        for field in FIELDS:
            if stage.get(field) is not None:
                yield Scalar(f"{field}/{stage['name']}", 0, float(stage[field]))
    for number, candidate in enumerate(candidates, start=1):
        for metric, ppl in candidate.get("ppl", {}).items():
            yield Scalar(f"candidates/{metric}", number, float(ppl))
        for field in TRAINING if "step" in candidate else ():
            if candidate.get(field) is not None:
                yield Scalar(f"training/{field}", candidate["step"], float(candidate[field]))
