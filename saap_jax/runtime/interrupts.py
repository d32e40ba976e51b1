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

_SHOW_CURSOR = b"\x1b[?25h\n"


class _State:
    """What has come so far; a process has one."""

    pipe: tuple[socket.socket, socket.socket] | None = None
    received: int | None = None
    raising = True
    said = False


def run(main: Callable[[], int]) -> NoReturn:
    """Run the whole of a process, and end it with the exit code of `main`, or of the signal that came.

    The code of a signal is 128 and its number: 130 for Ctrl-C, 143 for SIGTERM.
    """
    _listen()
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
    _flush()
    _end(_State.received)


def renew() -> None:
    """Handle the signals again, where a library has taken one: `jax.distributed` takes SIGTERM."""
    if _State.pipe is not None:
        _handle()


def received() -> bool:
    """Say whether this process has been told to end."""
    return _State.received is not None


def interruption() -> tuple[str, int]:
    """Say that the work was interrupted, in one line, with the exit code; then nobody else says it."""
    _State.said = True
    number = _State.received or signal.SIGINT
    message = f"{SIGNALS[number]}; what was finished is kept, and the same command goes on from there"
    return message, 128 + number


def _listen() -> None:
    """Hear of signals from now on."""
    inbox, outbox = _State.pipe = socket.socketpair()
    outbox.setblocking(False)
    signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(inbox,), daemon=True).start()
    _handle()


def _handle() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell in the background ask for
            signal.signal(number, _raise)


def _raise(number: int, _: FrameType | None) -> None:
    """Have the main thread unwind, once."""
    _State.received = _State.received or number
    if _State.raising:
        _State.raising = False
        sys.unraisablehook = _ignore
        raise KeyboardInterrupt


def _ignore(_: object) -> None:
    """Say nothing of an exception that was raised in a callback, and so lost; Python says it at length."""


def _watch(inbox: socket.socket) -> None:
    """End the process when the main thread does not, or at a second signal."""
    number = _next(inbox)
    _State.received = _State.received or number
    start = time.monotonic()
    while (left := start + PATIENCE - time.monotonic()) > 0 and select.select([inbox], [], [], left)[0]:
        _next(inbox)
        if time.monotonic() - start > ONCE:
            break
    _end(number)


def _next(inbox: socket.socket) -> int:
    """Wait for one of our signals: Python passes on the numbers of all that it handles."""
    while (number := inbox.recv(1)[0]) not in SIGNALS:
        pass
    return number


def _end(number: int) -> NoReturn:
    """End the process at once; first say why, unless that was said. No file of Python: another thread may hold it."""
    if not _State.said:
        message, _ = interruption()
        with contextlib.suppress(OSError):  # a terminal that has gone away
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
            os.write(2, f"saap: {message}\n".encode())
    os._exit(128 + number)


def _flush() -> None:
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            file.flush()
