"""Where the processes of a run find each other before JAX connects them.

JAX's own service ends a process from C++ when somebody is late or was counted wrong. So process 0 first waits at the
same address for the others, by plain TCP, and everybody hears in one line what is the matter.
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
    """A process that has come, and said which it is."""

    connection: socket.socket
    index: int
    processes: int


def rendezvous(group: Distributed) -> None:
    """Returns when all processes of the run are there, within `wait_seconds`; the address is free then.

    Raises: ConfigError, in all processes that have come, if one is missing, was given twice, or counts otherwise.
    """
    if group.processes == 1:
        return
    deadline = time.monotonic() + group.wait_seconds
    if group.index == 0:
        _serve(group, deadline)
    else:
        _connect(group, deadline)


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port. Raises: ConfigError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"distributed.coordinator must be HOST:PORT, got {coordinator}; use e.g. distributed.coordinator=node1:4711"
        )
    return host.strip("[]"), int(port)


def bind_address(coordinator: str) -> str:
    """Where process 0 listens: on this machine alone if that is where all are, otherwise wherever it can be reached."""
    host, port = parse_address(coordinator)
    if host == "localhost":
        return f"127.0.0.1:{port}"
    with suppress(ValueError):
        known = ipaddress.ip_address(host)
        if known.is_loopback:
            return coordinator
        return f"[::]:{port}" if known.version == 6 else f"0.0.0.0:{port}"
    with suppress(OSError):
        if all(family == socket.AF_INET6 for family, *_ in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
            return f"[::]:{port}"
    return f"0.0.0.0:{port}"


def _serve(group: Distributed, deadline: float) -> None:
    guests: dict[int, _Worker] = {}
    host, port = parse_address(bind_address(str(group.coordinator)))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as fault:
        raise ConfigError(
            f"distributed.coordinator must be an address of process 0 that is free, got {group.coordinator} "
            f"({fault.strerror}); use another port"
        ) from None
    with closing(listener):
        try:
            while True:
                if len(guests) == group.processes - 1 and not _drop_disconnected(guests):
                    break
                guest = _accept_worker(listener, deadline)
                if guest is None:
                    _drop_disconnected(guests)
                    missing = [str(n) for n in range(1, group.processes) if n not in guests]
                    raise ConfigError(
                        f"all {group.processes} processes must come to {group.coordinator} within "
                        f"{group.wait_seconds:g} seconds, but of index {', '.join(missing)} none did; start them with "
                        "distributed.index=NUMBER, or use another distributed.processes"
                    )
                _drop_disconnected(guests)
                _reject_invalid(group, guest, guests)
                guests[guest.index] = guest
        except ConfigError as fault:
            _reply(guests, str(fault))
            raise
        _reply(guests, "")


def _drop_disconnected(workers: dict[int, _Worker]) -> bool:
    """Whoever has left again, and may come back; whether there was one."""
    gone = [index for index, guest in workers.items() if _is_disconnected(guest.connection)]
    for index in gone:
        workers.pop(index).connection.close()
    return bool(gone)


def _is_disconnected(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""  # nothing is said by whoever waits
    except BlockingIOError:
        return False
    except OSError:
        return True


def _reject_invalid(group: Distributed, worker: _Worker, workers: dict[int, _Worker]) -> None:
    """Raises: ConfigError, which the one who has come hears, too."""
    said = None
    if worker.processes != group.processes:
        said = (
            f"distributed.processes must be the same for all, got {worker.processes} of index {worker.index}, and "
            f"{group.processes} of index 0; use one number"
        )
    elif worker.index in workers or not 0 < worker.index < group.processes:
        said = f"distributed.index must be another one for each process, got {worker.index} twice; number them from 0"
    if said:
        _reply({worker.index: worker}, said)
        raise ConfigError(said)


def _accept_worker(listener: socket.socket, deadline: float) -> _Worker | None:
    """The next one who talks as we do; None when time is up."""
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with suppress(OSError, ValueError, KeyError, TypeError):
            line, _ = listener.accept()
            line.settimeout(5)
            said = json.loads(line.makefile("rb").readline(MAX_LINE_BYTES))
            line.setblocking(False)
            return _Worker(line, int(said["index"]), int(said["processes"]))
    return None


def _reply(workers: dict[int, _Worker], error: str) -> None:
    for guest in workers.values():
        with suppress(OSError), closing(guest.connection):
            guest.connection.sendall(json.dumps({"fault": error}).encode() + b"\n")


def _connect(group: Distributed, deadline: float) -> None:
    place, why, said = parse_address(str(group.coordinator)), "no answer", None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with closing(socket.create_connection(place, timeout=left)) as line:
                line.sendall(json.dumps({"index": group.index, "processes": group.processes}).encode() + b"\n")
                line.settimeout(group.wait_seconds + 5)  # process 0 has a deadline of its own
                said = json.loads(line.makefile("rb").readline(MAX_LINE_BYTES))["fault"]
                break
        except OSError as fault:
            why = fault.strerror or str(fault)
        except (ValueError, KeyError, TypeError):  # an earlier life of process 0, or nobody of ours
            why = "no answer that makes sense"
        time.sleep(RETRY_SECONDS)
    else:
        raise ConfigError(
            f"distributed.coordinator must be the address of process 0, which must be running, got {group.coordinator} "
            f"({why}, for {group.wait_seconds:g} seconds); start process 0, or use another address"
        )
    if said:
        raise ConfigError(f"process 0 said: {said}")
