"""Ctrl-C, SIGTERM and a terminal that goes away: the process ends within two seconds, whatever it is doing.

Python tells the main thread of a signal between two instructions, and a step that XLA computes is one instruction, of
minutes perhaps. So another thread hears of it at once. The main thread may unwind for `PATIENCE` seconds, which removes
what is half written; then the process ends where it stands, as by kill -9, which every file that is written survives.
Either way the interpreter is not torn down: threads of XLA may still work on its arrays.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = {
    getattr(signal, name): word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if hasattr(signal, name)
}
"""What ends a process, and what is said of it."""

PATIENCE = 1.5
"""Seconds from the first signal on that the main thread has to unwind."""

ONCE = 0.3
"""Seconds in which a second signal counts as the first: a terminal and a launcher may both send it."""


class _State:
    """What has come so far; a process has one."""

    pipe: tuple[socket.socket, socket.socket] | None = None
    received: int | None = None
    raising = True
    said = False
    kept = False


def run(main: Callable[[], int]) -> NoReturn:
    """Run the whole of a process, and end it with the exit code of `main`, or of the signal that came.

    The code of a signal is 128 and its number: 130 for Ctrl-C, 143 for SIGTERM.
    """
    inbox, outbox = _State.pipe = socket.socketpair()
    outbox.setblocking(False)
    signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(inbox,), daemon=True).start()
    renew()
    code = 1
    try:
        code = main()
    except BaseException:
        if not received():
            raise
    _State.raising = False  # `main` has ended
    if _State.received is None:  # else whatever failed did so because of the signal
        for number in SIGNALS:  # the work is done: what comes now may not change the code
            signal.signal(number, signal.SIG_IGN)
        sys.exit(code)
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            file.flush()
    _end(_State.received)


def renew() -> None:
    """Handle the signals again, where a library has taken one: `jax.distributed` takes SIGTERM."""
    for number in SIGNALS if _State.pipe else ():
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell in the background ask for
            signal.signal(number, _raise)


def received() -> bool:
    """Say whether this process has been told to end."""
    return _State.received is not None


def goes_on() -> None:
    """Say that from now on what is finished is kept."""
    _State.kept = True


def interruption() -> tuple[str, int]:
    """Say that the work was interrupted, in one line, with the exit code; then nobody else says it."""
    _State.said = True
    number = _State.received or signal.SIGINT
    kept = "; what was finished is kept, and the same command goes on from there" * _State.kept
    return SIGNALS[number] + kept, 128 + number


def _raise(number: int, _: FrameType | None) -> None:
    """Have the main thread unwind, once."""
    _State.received = _State.received or number
    if _State.raising:
        _State.raising = False
        sys.unraisablehook = lambda _: None  # Python says at length what was raised in a callback, and so lost
        raise KeyboardInterrupt


def _watch(inbox: socket.socket) -> None:
    """End the process when the main thread does not, or at a second signal."""
    # the first one is waited for without end
    start = 0.0
    left = None
    while select.select([inbox], [], [], left)[0]:
        number = inbox.recv(1)[0]
        if number in SIGNALS and left is None:
            _State.received = _State.received or number
            start = time.monotonic()
        elif number in SIGNALS and time.monotonic() - start > ONCE:
            break
        if start:  # Python passes on the numbers of all signals that it handles
            left = max(0.0, start + PATIENCE - time.monotonic())
    _end(_State.received or signal.SIGINT)


def _end(number: int) -> NoReturn:
    """End the process at once; first say why, unless that was said. No file of Python: another thread may hold it."""
    if not _State.said:
        message, _ = interruption()
        with contextlib.suppress(OSError):  # a terminal that has gone away
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # show the cursor
            os.write(2, f"saap: {message}\n".encode())
    os._exit(128 + number)
