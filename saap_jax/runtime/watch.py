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

from saap_jax.runtime import interrupts
from saap_jax.runtime.processes import broadcast, count, is_primary, number, place

LOST = 3
"""Exit code of a process whose job another process has left."""

_TOKEN = 16  # bytes, which tell a process of this job from anybody else who connects
_PATIENCE = 10.0  # seconds for a connection
_FAREWELL = b"."


class Watch:
    """The connections of this process to those that it watches: of the first to all, of another to the first."""

    def __init__(self) -> None:
        self._leaving = False
        self._peers: dict[socket.socket, int] = {}

    def failing(self) -> None:
        """Stop watching, because this process has an error of its own to end with."""
        self._leaving = True

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
                if said != _FAREWELL and not self._leaving:
                    for other in self._peers:
                        _send(other, str(self._peers[peer]).encode())
                    _end(self._peers[peer])
                selector.unregister(peer)
                del self._peers[peer]
                peer.close()

    def follow(self, server: socket.socket) -> None:
        """Watch the first process, which also tells of others."""
        self._peers[server] = 0
        said = _received(server)
        if said != _FAREWELL and not self._leaving:
            _end(int(said) if said.isdigit() else 0)


def start_watch(host: str | None) -> Watch:
    """Begin to watch the processes of this job, which all call this; in the background.

    Args:
        host: where the others reach the first process; None: by the name of its machine.
    """
    watch = Watch()
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
