"""Rendezvous: the processes of a run find each other before JAX connects them.

JAX's own service kills a process from C++ if another is late or their number is wrong, and it takes whoever comes. So
process 0 first waits for the others at the same address, and every process gets a one-line error. Before anything else
is read, both sides prove that they know the key (a hash-based answer to a random challenge, from
`multiprocessing.connection`); what follows is JSON. The connections that JAX makes afterwards have no such protection.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from train.config.schema import ConfigError, Distributed

KEY_VARIABLE = "INCEPTION_RENDEZVOUS_KEY"
RETRY_SECONDS = 0.25
REPLY_SECONDS = 5  # for each message of a handshake
MAX_MESSAGE_BYTES = 4096
# A machine that vanishes closes no connection: the kernel does, after 11 seconds without an answer; JAX fails later.
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
# What reading from another program, or from a process that ends, can raise; AssertionError is Python 3.11's for a
# message that is no challenge.
PROTOCOL_ERRORS = (OSError, EOFError, AssertionError, ValueError, KeyError, TypeError)


def rendezvous(group: Distributed) -> list[Connection]:
    """Returns when all processes of the run have connected; the coordinator address is free again then.

    The connections stay open, from process 0 to all others; nothing more is sent (see `liveness`).

    Raises: ConfigError, in all connected processes, if one is missing after `wait_seconds`, or if their indices,
    numbers of processes or keys are inconsistent; and if there is no key for an address on a network.
    """
    if group.processes == 1:
        return []
    key = _read_key(str(group.coordinator))
    deadline = time.monotonic() + group.wait_seconds
    return _Leader(group, key).gather(deadline) if group.index == 0 else [_connect(group, key, deadline)]


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises: ConfigError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"distributed.coordinator must be HOST:PORT, got {coordinator}; use e.g. distributed.coordinator=node1:4711"
        )
    return host.strip("[]"), int(port)


def bind_address(coordinator: str) -> str:
    """The address process 0 listens on: loopback if that is the coordinator's, otherwise all interfaces."""
    host, port = parse_address(coordinator)
    if host == "localhost":
        return f"127.0.0.1:{port}"
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_loopback:
            return coordinator
        return f"[::]:{port}" if address.version == 6 else f"0.0.0.0:{port}"
    with suppress(OSError):
        if all(family == socket.AF_INET6 for family, *_ in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
            return f"[::]:{port}"
    return f"0.0.0.0:{port}"


def _read_key(coordinator: str) -> bytes:
    """The secret that all processes share; may be empty where only this machine can connect."""
    key = os.environ.get(KEY_VARIABLE, "")
    host, port = parse_address(bind_address(coordinator))
    if not key and not ipaddress.ip_address(host).is_loopback:
        raise ConfigError(
            f"{KEY_VARIABLE} is not set, so that anybody on the network could join at {coordinator}; set this "
            "environment variable to the same secret for all processes (openssl rand -hex 32 prints one), or use "
            f"distributed.coordinator=127.0.0.1:{port} on a single machine"
        )
    return key.encode()


# ------------------------------------------------------------------------------------------------------- process 0


@dataclass
class _Leader:
    """Process 0. workers: the connections to those that have connected, by index."""

    group: Distributed
    key: bytes
    workers: dict[int, Connection] = field(default_factory=dict)
    wrong_keys: int = 0

    def gather(self, deadline: float) -> list[Connection]:
        try:
            with self._listen() as listener:
                while self._count_connected() < self.group.processes - 1:
                    self._admit_next(listener, deadline)
        except ConfigError as error:
            self._reply(str(error))
            raise
        self._reply("")
        return list(self.workers.values())

    def _listen(self) -> socket.socket:
        host, port = parse_address(bind_address(str(self.group.coordinator)))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on distributed.coordinator={self.group.coordinator} ({error.strerror}); use a free "
                "port of process 0's machine"
            ) from None

    def _count_connected(self) -> int:
        """Forgets the workers that have disconnected, and may reconnect: one that waits sends nothing to read."""
        self.workers = {index: connection for index, connection in self.workers.items() if not connection.poll()}
        return len(self.workers)

    def _admit_next(self, listener: socket.socket, deadline: float) -> None:
        """Waits for a client; ignores one that does not know the key or the protocol. Raises: ConfigError."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise ConfigError(self._timeout_message())
        listener.settimeout(remaining)
        try:
            connection = _open(listener.accept()[0], REPLY_SECONDS)
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            request = json.loads(connection.recv_bytes(MAX_MESSAGE_BYTES))
            index = int(request["index"])
            processes = int(request["processes"])
        except AuthenticationError:
            self.wrong_keys += 1
        except PROTOCOL_ERRORS:
            pass
        else:
            self._admit(connection, index, processes)

    def _admit(self, connection: Connection, index: int, processes: int) -> None:
        """Raises: ConfigError for a wrong number of processes or index; the worker is sent the message, too."""
        error = None
        if processes != self.group.processes:
            error = (
                f"distributed.processes differs: {processes} in process {index}, {self.group.processes} in process 0; "
                "start all with the same number"
            )
        elif index in self.workers or not 0 < index < self.group.processes:
            error = f"distributed.index must be unique, got {index} twice; number the processes from 0"
        if error:
            _send(connection, {"error": error})
            raise ConfigError(error)
        self.workers[index] = connection

    def _reply(self, error: str) -> None:
        for connection in self.workers.values():
            _send(connection, {"error": error})

    def _timeout_message(self) -> str:
        group = self.group
        missing = [str(index) for index in range(1, group.processes) if index not in self.workers]
        several = len(missing) > 1
        wrong_keys = f"; {self.wrong_keys} connected with another {KEY_VARIABLE}" if self.wrong_keys else ""
        return (
            f"timed out after {group.wait_seconds:g} s: process{'es' if several else ''} {', '.join(missing)} of "
            f"{group.processes} did not connect to {group.coordinator}{wrong_keys}; start "
            + ("each with its own distributed.index" if several else f"it with distributed.index={missing[0]}")
            + (" and the same key" if wrong_keys else "")
        )


# ------------------------------------------------------------------------------------------------- other processes


def _connect(group: Distributed, key: bytes, deadline: float) -> Connection:
    reason = "no reply"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            client = socket.create_connection(parse_address(str(group.coordinator)), timeout=remaining)
            connection = _open(client, group.wait_seconds + REPLY_SECONDS)  # process 0 has a deadline of its own
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            connection.send_bytes(json.dumps({"index": group.index, "processes": group.processes}).encode())
            error = json.loads(connection.recv_bytes(MAX_MESSAGE_BYTES))["error"]
        except AuthenticationError:
            raise ConfigError(
                f"process 0 at {group.coordinator} has another {KEY_VARIABLE}; set the same value for all processes"
            ) from None
        except BlockingIOError:
            reason = "no reply"
        except OSError as failure:
            reason = failure.strerror or str(failure)
        except PROTOCOL_ERRORS:  # process 0 of an earlier attempt, or another program
            reason = "unexpected reply"
        else:
            if error:
                raise ConfigError(f"rejected by process 0: {error}")
            return connection
        time.sleep(RETRY_SECONDS)
    raise ConfigError(
        f"cannot reach process 0 at {group.coordinator} ({reason}, for {group.wait_seconds:g} s); start process 0, or "
        "correct distributed.coordinator"
    )


def _open(client: socket.socket, reply_seconds: float) -> Connection:
    """The socket as a connection on which a read fails with BlockingIOError after `reply_seconds`."""
    client.settimeout(None)
    for level, name, value in KEEPALIVE:
        client.setsockopt(level, name, value)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(reply_seconds), 0))
    return Connection(client.detach())


def _send(connection: Connection, reply: dict[str, str]) -> None:
    with suppress(OSError):
        connection.send_bytes(json.dumps(reply).encode())
