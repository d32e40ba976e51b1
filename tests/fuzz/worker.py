"""A process that imports the program once and forks for each call of it, and says what each call did and took.

No jax backend is started before a fork, so that no thread of one is lost in the child; each child starts its own.
`Worker` is the side that asks; `python -m tests.fuzz.worker` the one that answers, an object of JSON a line.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.fuzz.independent import AnotherError, NotComputedError
from tests.xla_flags import CHEAP

MEMORY = 2 * 2**30
"""Bytes that a call may hold in memory at its peak."""

SECONDS = 30.0
"""Seconds that a call may take, of the processor, and that it may wait for nothing; what others take does not count."""

MODULES = (
    *("saap_jax.cli.main", "saap_jax.cli.progress", "saap_jax.cli.blocks", "saap_jax.cli.commands", "saap_jax.export"),
    *("saap_jax.jobs.compare", "saap_jax.jobs.generate", "saap_jax.jobs.prune", "saap_jax.jobs.ab"),
    *("saap_jax.jobs.evaluate", "saap_jax.jobs.recover", "saap_jax.jobs.score", "saap_jax.report.write"),
    *("jaxlib.mlir.dialects.builtin", "jaxlib.mlir.dialects.mhlo", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama", "tests.fuzz.formats", "tests.fuzz.planted"),
)
"""Imported before the first call: what commands import late, too."""


ERRORS: dict[int, type[Exception]] = {31: ValueError, 32: AnotherError, 33: NotComputedError}
"""Exit code of a function's process -> what the function raised."""


class Outcome(NamedTuple):
    """What a call did."""

    code: int
    """Exit code; negative for the signal that ended it."""
    out: str
    err: str
    peak: int
    """Bytes in memory at the peak, those of the imported modules among them."""
    seconds: float
    """Of the processor."""
    stopped: str
    """The limit at which the worker ended it, or "" where it ended by itself."""


class Worker:
    """The asking side; a context manager, as the answering process has to end."""

    def __init__(self, scratch: Path, cache: Path) -> None:
        self._scratch = scratch
        root = Path(__file__).parents[2]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(scratch),
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": CHEAP,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("SAAP_DATA", "SAAP_TRACEBACK", "COLUMNS"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=root,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def run(self, words: Sequence[str], place: Path, environment: Mapping[str, str] = {}) -> Outcome:
        """Run `saap WORDS` in a directory."""
        return self._ask({"call": "saap", "words": list(words), "place": str(place), "environment": dict(environment)})

    def warm(self, words: Sequence[str], place: Path) -> None:
        """Run `saap WORDS` in the answering process itself, so that all that it imports and keeps is there in a child.

        It has to start no backend of jax.
        """
        self._ask({"call": "warm", "words": list(words), "place": str(place)})

    def call(self, function: str, place: Path, *arguments: Any) -> Any:
        """Return what `MODULE:FUNCTION` of some plain values returns, called in a directory.

        It stands in a process of its own as a library it calls may crash or hang on what it is given.

        Raises:
            ValueError, AnotherError, NotComputedError: what the function raises.
        """
        outcome = self._ask({"call": function, "arguments": arguments, "place": str(place), "environment": {}})
        if outcome.code in ERRORS:
            raise ERRORS[outcome.code](outcome.err.strip())
        assert outcome.code == 0, f"{function} failed: {outcome.stopped} {outcome.err[-2000:]}"
        return json.loads(outcome.out)

    def planted(self, name: str, place: Path, seconds: float = SECONDS) -> Outcome:
        """Run one of `planted` in place of the command line, within so many seconds."""
        request = {"call": f"tests.fuzz.planted:{name}", "arguments": [], "place": str(place), "seconds": seconds}
        return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        files = {name: str(self._scratch / name) for name in ("out", "err")}
        self._process.stdin.write(json.dumps(request | files) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        texts = {name: Path(path).read_bytes().decode(errors="replace") for name, path in files.items()}
        return Outcome(**answer, **texts)


# --- the answering side ------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until there are no more."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for module in MODULES:
        importlib.import_module(module)
    importlib.import_module("saap_jax.jobs.prune").texts_of = lambda *_: {}  # nothing is judged, as in the whole suite
    for line in sys.stdin:
        request = json.loads(line)
        channel.write(json.dumps(_warmed(request) if request["call"] == "warm" else _answer(request)) + "\n")
        channel.flush()


def _warmed(request: dict[str, Any]) -> dict[str, Any]:
    from jax._src import xla_bridge

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(request["place"]))
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(request["out"], "w"))))
        stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(request["err"], "w"))))
        code = _command(request["words"])
    assert not xla_bridge.backends_are_initialized()
    gc.collect()
    gc.freeze()  # a child looks at none of it, and so copies no page of it
    return {"code": code, "peak": 0, "seconds": 0.0, "stopped": ""}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    start, idle, stopped, seconds = time.monotonic(), 0.0, "", request.get("seconds", SECONDS)
    if (child := os.fork()) == 0:
        _child(request)
    now = start
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > 0.2 and _waits(child):
            idle += time.monotonic() - now
        held, now = _resident(child), time.monotonic()
        if held > MEMORY or _computed(child) > seconds or idle > seconds:
            stopped = f"{MEMORY / 2**30:g} GiB" if held > MEMORY else f"{seconds:g} s"
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.003 if now - start < 1 else 0.05)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "peak": usage.ru_maxrss * 1024,
        "seconds": usage.ru_utime + usage.ru_stime,
        "stopped": stopped,
    }


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _computed(process: int) -> float:
    """Return the seconds of the processor that a process took, all its threads."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _waits(process: int) -> bool:
    """Say whether no thread of a process computes, or would if it were its turn."""
    states = []
    for thread in Path(f"/proc/{process}/task").glob("*/stat"):
        with contextlib.suppress(OSError, IndexError):
            states.append(thread.read_text().rpartition(") ")[2][0])
    return bool(states) and set(states) <= {"S", "Z", "T"}


def _child(request: dict[str, Any]) -> NoReturn:
    """Do what is asked, as the main program of a process would, and end."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request.get("environment", {}))
        os.chdir(request["place"])
        code = _command(request["words"]) if request["call"] == "saap" else _function(request)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(words: list[str]) -> int:
    from saap_jax.cli.main import main

    return main(words)


def _function(request: dict[str, Any]) -> int:
    module, _, name = request["call"].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if module == "tests.fuzz.planted":
        return function()
    try:
        found = function(*request["arguments"])
    except tuple(ERRORS.values()) as error:
        print(ascii(str(error))[:500], file=sys.stderr)
        return next(code for code, kind in ERRORS.items() if isinstance(error, kind))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    serve()
