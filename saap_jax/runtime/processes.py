"""Many processes that run one job: how they find each other, what the first does alone, how the others learn of it.

Every process runs the same program, each on its own devices, and all take the same turns: what a turn depends on has to
be the same everywhere. So the first process alone reads and writes what belongs to all, run directories and models, and
tells the others what it found (`broadcast`). In a job of one process all of this does nothing.

jax is imported where it is needed: most words need no device.
"""

import contextlib
import contextvars
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from saap_jax.runtime import interrupts

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead; then jax ends all others."""

LEAVING = 1800
"""Seconds that a process which is done waits for the others, of which the first may still write a report."""

LOST = 3
"""Exit code of a process whose job another process has left."""

GONE = (
    "another process of this job has ended, and this one cannot go on without it; see what that one said (if nothing, "
    "it was killed, or its machine went away), then start the job again: it goes on from what is kept"
)

_SHARED = (FileNotFoundError, FileExistsError, ValueError)
"""Errors that the first process shares with the others; any other ends it, and so them."""

_kept: list[Any] = []
"""What C calls, which Python may not free."""


class Cluster(NamedTuple):
    """Where the processes of a job meet; nothing where the cluster's own software says it."""

    coordinator: str | None = None
    """HOST:PORT of the first process."""
    processes: int | None = None
    process: int | None = None
    """Number of this process, from 0."""


# --- meeting and parting -------------------------------------------------------------------------


def join(cluster: Cluster) -> None:
    """Meet the other processes of the job; call it before anything else uses a device.

    Raises:
        ValueError: no cluster that says where they are, or they cannot be reached.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(*cluster, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=LEAVING)
    except (ValueError, RuntimeError) as error:
        if cluster.coordinator is None:
            where = "what Slurm, Open MPI, a TPU pod or GKE says"
        else:
            where = cluster.coordinator
        raise ValueError(
            f"--distributed: the processes of this job did not meet at {where} ({' '.join(str(error).split())}); give "
            "--distributed.coordinator HOST:PORT, a port of the first process that all can reach"
        ) from None
    words = f"saap: {place()}{GONE}\n".encode()

    def given_up(_: int) -> None:
        if not interrupts.received():
            os.write(2, words)
        os._exit(LOST)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(given_up))
    ctypes.CDLL(None).signal(signal.SIGABRT, _kept[-1])  # jax ends by abort() when heartbeats of a process stop


def peer_has_gone(error: BaseException) -> bool:
    """Say whether an error is of a collective whose peer has died."""
    return count() > 1 and any(words in str(error) for words in ("Gloo", "UNAVAILABLE", "coordination service"))


def leave() -> None:
    """Wait until all processes of the job are done, and part from them."""
    if (jax := _jax_of_many()) is not None:
        jax.distributed.shutdown()


# --- who and whose -------------------------------------------------------------------------------


def _jax_of_many() -> Any:
    """Get jax if this process has joined others, else None, without importing what nobody has imported."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return jax
    return None


_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work on one process while the others go on: what it reads is sent to nobody."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def count() -> int:
    """Count the processes of the job that work together."""
    jax = _jax_of_many()
    if jax is None or _ALONE.get():
        return 1
    return jax.process_count()


def number() -> int:
    """Tell the number of this process, from 0."""
    jax = _jax_of_many()
    return 0 if jax is None else jax.process_index()


def is_primary() -> bool:
    """Say whether this is the process that writes: the only one, or the first of several."""
    return number() == 0


def place() -> str:
    """Name this process, to be put before a message; empty in a job of one."""
    if _jax_of_many():
        return f"process {number()} of {count()}: "
    return ""


def in_host_memory(array: Any) -> bool:
    """Say whether the parts of an array lie in the memory of the machines of their processes."""
    return {device.platform for device in array.devices()} == {"cpu"}


# --- telling the others --------------------------------------------------------------------------


def broadcast(find: Callable[[], Any]) -> Any:
    """Tell every process what the first one finds: plain values, as JSON holds them (lists, no tuples).

    Raises:
        ValueError, FileNotFoundError, FileExistsError: where `find` does so on the first process.
    """
    if count() == 1:
        return find()
    found: dict[str, Any] = {}
    if is_primary():
        try:
            found = {"value": find()}
        except _SHARED as error:
            found = {"error": [isinstance(error, kind) for kind in _SHARED].index(True), "message": str(error)}
    found = json.loads(broadcast_bytes(json.dumps(found).encode()))
    if "error" in found:
        raise _SHARED[found["error"]](found["message"])
    return found["value"]


def broadcast_bytes(content: bytes) -> bytes:
    """Send the first process's content to all; the content of others is not looked at."""
    if count() == 1:
        return content
    import numpy as np
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32)))
    padded = np.zeros(1 << max(10, size.bit_length()), np.uint8)  # few sizes, since each compiles a program
    if is_primary():
        padded[:size] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def barrier(name: str) -> None:
    """Wait until all processes are here, for instance so that what the first one wrote is there for all."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
