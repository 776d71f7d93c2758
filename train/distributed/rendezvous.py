"""Rendezvous: the processes of a run find each other before JAX connects them.

JAX's own service kills a process from C++ if another is late or their number is wrong. So process 0 first waits for the
others at the same address, over plain TCP, and every process gets a one-line error.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import time
from contextlib import closing, suppress
from dataclasses import dataclass

from train.config.schema import ConfigError, Distributed

RETRY_SECONDS = 0.25
MAX_LINE_BYTES = 4096


@dataclass(frozen=True)
class _Worker:
    """A connected process, which has sent its index."""

    connection: socket.socket
    index: int
    processes: int


def rendezvous(group: Distributed) -> None:
    """Returns when all processes of the run have connected; the coordinator address is free again then.

    Raises: ConfigError, in all connected processes, if one is missing after `wait_seconds`, or if their indices or
    numbers of processes are inconsistent.
    """
    if group.processes == 1:
        return
    deadline = time.monotonic() + group.wait_seconds
    if group.index == 0:
        _serve(group, deadline)
    else:
        _connect(group, deadline)


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


def _serve(group: Distributed, deadline: float) -> None:
    workers: dict[int, _Worker] = {}
    host, port = parse_address(bind_address(str(group.coordinator)))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on distributed.coordinator={group.coordinator} ({error.strerror}); use a free port of "
            "process 0's machine"
        ) from None
    with closing(listener):
        try:
            while True:
                if len(workers) == group.processes - 1 and not _drop_disconnected(workers):
                    break
                worker = _accept_worker(listener, deadline)
                _drop_disconnected(workers)
                if worker is None:
                    raise ConfigError(_timeout_message(group, workers))
                _reject_invalid(group, worker, workers)
                workers[worker.index] = worker
        except ConfigError as error:
            _reply(workers, str(error))
            raise
        _reply(workers, "")


def _timeout_message(group: Distributed, workers: dict[int, _Worker]) -> str:
    missing = [str(index) for index in range(1, group.processes) if index not in workers]
    several = len(missing) > 1
    return (
        f"timed out after {group.wait_seconds:g} s: process{'es' if several else ''} {', '.join(missing)} of "
        f"{group.processes} did not connect to {group.coordinator}; start "
        + ("each with its own distributed.index" if several else f"it with distributed.index={missing[0]}")
    )


def _drop_disconnected(workers: dict[int, _Worker]) -> bool:
    """Removes the workers that have disconnected and may reconnect; returns whether there were any."""
    disconnected = [index for index, worker in workers.items() if _is_disconnected(worker.connection)]
    for index in disconnected:
        workers.pop(index).connection.close()
    return bool(disconnected)


def _is_disconnected(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""  # a waiting worker sends nothing
    except BlockingIOError:
        return False
    except OSError:
        return True


def _reject_invalid(group: Distributed, worker: _Worker, workers: dict[int, _Worker]) -> None:
    """Raises: ConfigError for a wrong number of processes or index; the worker is sent the message, too."""
    error = None
    if worker.processes != group.processes:
        error = (
            f"distributed.processes differs: {worker.processes} in process {worker.index}, {group.processes} in "
            "process 0; start all with the same number"
        )
    elif worker.index in workers or not 0 < worker.index < group.processes:
        error = f"distributed.index must be unique, got {worker.index} twice; number the processes from 0"
    if error:
        _reply({worker.index: worker}, error)
        raise ConfigError(error)


def _accept_worker(listener: socket.socket, deadline: float) -> _Worker | None:
    """The next client that speaks our protocol; None after the deadline."""
    while (remaining := deadline - time.monotonic()) > 0:
        listener.settimeout(remaining)
        with suppress(OSError, ValueError, KeyError, TypeError):
            connection, _ = listener.accept()
            connection.settimeout(5)
            request = json.loads(connection.makefile("rb").readline(MAX_LINE_BYTES))
            connection.setblocking(False)
            return _Worker(connection, int(request["index"]), int(request["processes"]))
    return None


def _reply(workers: dict[int, _Worker], error: str) -> None:
    for worker in workers.values():
        with suppress(OSError), closing(worker.connection):
            worker.connection.sendall(json.dumps({"fault": error}).encode() + b"\n")


def _connect(group: Distributed, deadline: float) -> None:
    address = parse_address(str(group.coordinator))
    reason = "no reply"
    rejection = None
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with closing(socket.create_connection(address, timeout=remaining)) as connection:
                connection.sendall(json.dumps({"index": group.index, "processes": group.processes}).encode() + b"\n")
                connection.settimeout(group.wait_seconds + 5)  # process 0 has a deadline of its own
                rejection = json.loads(connection.makefile("rb").readline(MAX_LINE_BYTES))["fault"]
                break
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, KeyError, TypeError):  # process 0 of an earlier attempt, or another program
            reason = "unexpected reply"
        time.sleep(RETRY_SECONDS)
    else:
        raise ConfigError(
            f"cannot reach process 0 at {group.coordinator} ({reason}, for {group.wait_seconds:g} s); start process 0, "
            "or correct distributed.coordinator"
        )
    if rejection:
        raise ConfigError(f"rejected by process 0: {rejection}")
