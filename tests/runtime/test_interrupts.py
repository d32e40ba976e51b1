"""Signals end the process soon, by their code and with one line, also while an instruction takes minutes."""

import functools
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

pytestmark = pytest.mark.usefixtures("heard")

SLACK = 20.0
"""Seconds that a busy machine may take beside the two that are promised."""

BUSY = "threading.Timer(0.3, print, ['busy'], {'flush': True}).start(); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)"
"""One instruction of minutes, which lets other threads run; one of them says when it has begun."""


@pytest.fixture
def started():
    """Return a function that starts a process whose `main` has said that it is ready; none outlives the test."""
    running: list[subprocess.Popen] = []
    yield functools.partial(start, running)
    for process in running:
        with process:
            process.kill()


def start(running: list[subprocess.Popen], body: str, *, run: str = "interrupts.run(main)") -> subprocess.Popen:
    main = textwrap.indent(textwrap.dedent(body), "    ")
    code = (
        "import atexit, ctypes, hashlib, os, signal, sys, threading, time\nfrom saap_jax.runtime import interrupts\n"
        f"def main():\n    print('ready', flush=True)\n{main}\n    return 0\n{run}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.append(process)
    late = threading.Timer(120, process.kill)  # so that no line is waited for in vain
    late.daemon = True
    late.start()
    assert line(process) == "ready"
    return process


def line(process: subprocess.Popen) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def ended(process: subprocess.Popen, within: float) -> tuple[int, str, str]:
    """Return exit code, output and errors of a process that has to end in so many seconds."""
    start = time.monotonic()
    assert process.stdout is not None
    assert process.stderr is not None
    code = process.wait(timeout=60)
    assert time.monotonic() - start < within + SLACK
    return code, process.stdout.read(), process.stderr.read()


@pytest.mark.slow
def test_an_instruction_of_minutes(started):
    """And without the handlers, which is what makes a difference, the same process stays."""
    kept = {signal.SIGINT: "interrupts.goes_on()\n", signal.SIGTERM: ""}
    running = {number: started(first + BUSY) for number, first in kept.items()}
    plain = started(BUSY, run="sys.exit(main())")
    assert {line(process) for process in (*running.values(), plain)} == {"busy"}
    for number, process in running.items():
        process.send_signal(number)
    plain.send_signal(signal.SIGINT)
    said = {number: ended(process, 2) for number, process in running.items()}
    goes_on = "; what was finished is kept, and the same command goes on from there\n"
    assert said[signal.SIGINT] == (130, "", "saap: interrupted" + goes_on)
    assert said[signal.SIGTERM] == (143, "", "saap: terminated\n"), "of a command that keeps nothing"
    assert plain.poll() is None


def test_the_main_thread_may_unwind_and_a_second_signal_ends_at_once(started):
    body = """
    try:
        print('works', flush=True)
        time.sleep(60)
    finally:
        print('unwinding', flush=True)
        {}
    """
    brief, long = started(body.format("print('removed')")), started(body.format(BUSY))
    for process in (brief, long):
        assert line(process) == "works"
        process.send_signal(signal.SIGINT)
    assert ended(brief, 1)[:2] == (130, "unwinding\nremoved\n")
    assert (line(long), line(long)) == ("unwinding", "busy")
    long.send_signal(signal.SIGINT)
    assert ended(long, 0.2)[0] == 130


@pytest.mark.parametrize(
    ("body", "number", "code"),
    [
        ("try: time.sleep(60)\nexcept KeyboardInterrupt: raise ImportError('of the signal')", signal.SIGTERM, 143),
        (f"os.close(2); {BUSY}", signal.SIGHUP, 129),
    ],
    ids=["an error that the signal causes is none", "a terminal that has gone away"],
)
def test_the_code_is_of_the_signal(started, body, number, code):
    process = started(f"print('works', flush=True)\n{body}")
    assert line(process) == "works"
    process.send_signal(number)
    got, _, err = ended(process, 2)
    assert got == code
    assert "of the signal" not in err


def test_a_signal_after_the_end_does_not_change_the_code(started):
    process = started("atexit.register(lambda: print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN))")
    assert ended(process, 2)[:2] == (0, "True\n")


def test_a_signal_that_a_library_took_is_taken_back_and_one_that_the_caller_ignores_is_ignored(started):
    taken = "ctypes.CDLL(None).signal(signal.SIGTERM, 1)"  # behind Python's back, as jax.distributed does
    waits = "print('waits', flush=True); sys.stdin.readline()"
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN); interrupts.run(main)"
    lost, found = started(f"{taken}; {waits}"), started(f"{taken}; interrupts.renew(); {waits}")
    ignoring = started(waits, run=ignored)
    for process, number in ((lost, signal.SIGTERM), (found, signal.SIGTERM), (ignoring, signal.SIGINT)):
        assert line(process) == "waits"
        process.send_signal(number)
    assert ended(found, 2)[0] == 143
    for process in (lost, ignoring):
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert ended(process, 2)[0] == 0
