"""Notice at once that a process of a job has died, and end the others with a sentence that says so.

jax notices too, when heartbeats stop, and then aborts with a stack trace. Here every process holds a connection to the
first one, which the system closes when a process ends, however it ends. Where no connection can be made (a firewall, a
name that does not resolve) jax's heartbeats are what is left.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
from typing import Any

import jax

from saap_jax.runtime import interrupts
from saap_jax.runtime.processes import broadcast, count, is_primary, number, place

LOST = 3
"""Exit code of a process whose job another process has left."""

_TOKEN = 16  # bytes, which tell a process of this job from anybody else who connects
_PATIENCE = 10.0  # seconds for a connection
_FAREWELL = b"."
_FAILING = b"!"

OWN = 5.0
"""Seconds in which a process that hears of another's error may come upon the same, and say it by itself."""

GRACE = 10.0
"""Seconds that a process with an error waits at most for the others, of which the first ends last."""

LATE = 5.0
"""Seconds in which the news of a death may follow an error of jax, which a collective raises whose peer has died."""

LAST = 2.0
"""Seconds that the first process waits for others whose job it ends; it is their way to jax, which aborts without."""


class Watch:
    """The connections of this process to those that it watches: of the first to all, of another to the first."""

    def __init__(self, first: bool) -> None:
        self._first = first
        self._leaving = False
        self._peers: dict[socket.socket, int] = {}
        self._failing: set[int] = set()
        self._gone: list[int] = []
        self._news = threading.Condition()
        self._ending = threading.Lock()

    def failing(self, error: BaseException) -> None:
        """Stop watching, because this process has an error of its own to end with.

        An error of jax may be the death of another process, which a collective has noticed before this watch: it is
        given a moment, and then ends this process as such.
        """
        if isinstance(error, jax.errors.JaxRuntimeError):
            with self._news:
                self._news.wait_for(lambda: self._gone, LATE)
            if self._gone:
                self._end_if_alive(self._gone[0])
        self._leaving = True

    def part(self, interrupted: bool) -> None:
        """Tell the others that this process ends, by an error or by a signal, and wait until it may.

        jax aborts a process whose first one has gone, so the first ends when all others have; another, when the first
        has an error too, or at once by a signal, which the others got or are told of. None waits longer than `GRACE`.
        """
        if interrupted and not self._first:
            return
        for peer in list(self._peers):
            _send(peer, b"0" if interrupted else _FAILING)
        with self._news:
            self._news.wait_for(lambda: self._others_gone() if self._first else self._failing or self._gone, GRACE)

    def leaving(self) -> None:
        """Say that this process ends in order, and stop watching."""
        self._leaving = True
        for peer in list(self._peers):
            _send(peer, _FAREWELL)

    def serve(self, server: socket.socket, token: bytes) -> None:
        """Watch all others: each of them connects with the token and its number."""
        selector = selectors.DefaultSelector()
        selector.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    peer, _ = server.accept()
                    if (process := _introduced(peer, token)) is not None:
                        self._peers[peer] = process
                        selector.register(peer, selectors.EVENT_READ)
                    continue
                peer: Any = key.fileobj
                said = _received(peer)
                if said == _FAILING:
                    self._has_error(self._peers[peer])
                    continue
                selector.unregister(peer)
                process = self._peers.pop(peer)
                peer.close()
                if said != _FAREWELL:
                    self._has_ended(process)

    def follow(self, server: socket.socket) -> None:
        """Watch the first process, which also tells of others."""
        self._peers[server] = 0
        while (said := _received(server)).startswith(_FAILING):
            self._has_error(0)
        if said != _FAREWELL:
            self._has_ended(int(said) if said.isdigit() else 0)

    def _has_error(self, process: int) -> None:
        """Give this process a while to come upon the error of another by itself."""
        with self._news:
            self._failing.add(process)
            self._news.notify()
        self._end_without(process, OWN)

    def _has_ended(self, process: int) -> None:
        """End this process too, unless it is about to."""
        with self._news:
            self._gone.append(process)
            self._news.notify()
        if process not in self._failing:
            self._end_without(process, 0.0)

    def _end_without(self, process: int, seconds: float) -> None:
        """End this process in a while, and the others before it; from a thread, since this one has to hear of them."""
        late = threading.Timer(seconds, self._end_if_alive, [process])
        late.daemon = True
        late.start()

    def _end_if_alive(self, process: int) -> None:
        with self._ending:
            if self._leaving:
                return
            if self._first:
                for other in list(self._peers):
                    _send(other, str(process).encode())
                with self._news:
                    self._news.wait_for(self._others_gone, LAST)
            _end(process)

    def _others_gone(self) -> bool:
        return len(self._gone) >= count() - 1


def start_watch(host: str | None) -> Watch:
    """Begin to watch the processes of this job, which all call this; in the background.

    Args:
        host: where the others reach the first process; None: by the name of its machine.
    """
    watch = Watch(first=is_primary())
    server = _listen() if is_primary() else None
    token = secrets.token_hex(_TOKEN // 2) if is_primary() else ""
    where, port, token = broadcast(
        lambda: [host or socket.gethostname(), server.getsockname()[1] if server else 0, token]
    )
    if server is not None:
        _in_background(watch.serve, server, token.encode())
    elif port and (connection := _connect(where, port, token.encode() + number().to_bytes(4, "big"))) is not None:
        _in_background(watch.follow, connection)
    return watch


def _listen() -> socket.socket | None:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count())
        return socket.create_server(("", 0), backlog=count())
    except OSError:
        return None


def _connect(host: str, port: int, greeting: bytes) -> socket.socket | None:
    try:
        connection = socket.create_connection((host.strip("[]"), port), timeout=_PATIENCE)
        connection.sendall(greeting)
        connection.settimeout(None)
    except OSError:
        return None
    return connection


def _introduced(peer: socket.socket, token: bytes) -> int | None:
    """Return the number of the process that has connected; close the connection of anybody else."""
    peer.settimeout(_PATIENCE)
    try:
        greeting = peer.recv(_TOKEN + 4, socket.MSG_WAITALL)
    except OSError:
        greeting = b""
    if not secrets.compare_digest(greeting[:_TOKEN], token):
        peer.close()
        return None
    peer.settimeout(None)
    return int.from_bytes(greeting[_TOKEN:], "big")


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(16)
    except OSError:
        return b""


def _send(peer: socket.socket, said: bytes) -> None:
    try:
        peer.sendall(said)
    except OSError:
        return


def _in_background(work: Any, *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _end(lost: int) -> None:
    """End this process, because another has ended; not where a signal ends it, which that one got too."""
    if interrupts.received():
        return
    sys.stdout.flush()
    print(lost_words(f"process {lost} of this job"), file=sys.stderr, flush=True)
    os._exit(LOST)


def lost_words(who: str) -> str:
    """Say that a process has ended, and what to do."""
    return (
        f"saap: {place()}{who} has ended, and this one cannot go on without it; see what that one said (if nothing, it "
        "was killed, or its machine went away), then start the job again: it goes on from what is kept"
    )
