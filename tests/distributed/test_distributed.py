"""Several processes and devices that train one network: the results of a single one, and errors."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Pipe, deliver_challenge
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.commands import FROM_MAKE, ROOT, Done, message, run_command
from support.shared import once
from support.waiting import free_port
from train.config.composition import compose
from train.config.schema import ConfigError, Distributed
from train.config.serialization import Redactor, config_hash, to_dict
from train.distributed import liveness, process_group, rendezvous
from train.distributed.liveness import PeerMonitor
from train.distributed.process_group import ProcessGroup, WorkerLostError
from train.training import checkpoint

# ------------------------------------------------------------------------------------------------------ the meeting


def outcome(group: Distributed) -> str:
    """The error of a process, empty for success."""
    try:
        connections = rendezvous.rendezvous(group)
    except ConfigError as fault:
        return str(fault)
    for connection in connections:
        connection.close()
    return ""


def met(*groups: tuple[int, int], patience: float = 1.0) -> list[str]:
    """Let processes (index, processes) meet; return the error of each, empty for success."""
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(lambda group: outcome(Distributed(address, group[1], group[0], patience)), groups))


@contextmanager
def led(processes: int, patience: float = 20) -> Iterator[tuple[str, list[str]]]:
    """The address of a process 0 that is waiting, and a list that holds its outcome afterwards."""
    address = f"127.0.0.1:{free_port()}"
    outcomes: list[str] = []
    group = Distributed(address, processes, 0, patience)
    leader = threading.Thread(target=lambda: outcomes.append(outcome(group)), daemon=True)
    leader.start()
    yield address, outcomes
    leader.join(patience + 10)
    assert not leader.is_alive()


def reached(address: str) -> socket.socket:
    """A plain connection to a process 0 that may only be starting."""
    while True:
        try:
            return socket.create_connection(rendezvous.parse_address(address), 5)
        except ConnectionRefusedError:
            time.sleep(0.05)


def authenticated(address: str, key: bytes) -> Connection:
    """A connection of the standard library's own client."""
    reached(address).close()
    return Client(rendezvous.parse_address(address), authkey=key)


def claim(address: str, key: bytes, index: int) -> Connection:
    """Take an index of three, as a stranger would who knows the protocol."""
    connection = authenticated(address, key)
    connection.send_bytes(json.dumps({"index": index, "processes": 3}).encode())
    return connection


def test_rendezvous_of_all_processes_succeeds():
    assert met((2, 4), (0, 4), (3, 4), (1, 4), patience=10) == [""] * 4
    assert met((0, 1)) == [""]  # a single process needs no rendezvous


def test_connections_stay_open_between_process_0_and_the_others():
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as pool:
        groups = [Distributed(address, 3, index, 10) for index in range(3)]
        leader, *others = pool.map(rendezvous.rendezvous, groups)
    assert (len(leader), [len(one) for one in others]) == (2, [1, 1])
    assert not any(connection.poll(0.2) for connection in leader)
    others[0][0].close()
    assert [connection.poll(5) for connection in leader].count(True) == 1
    with socket.create_server(("127.0.0.1", rendezvous.parse_address(address)[1])):
        pass  # JAX listens there next
    for connection in (*leader, *others[1]):
        connection.close()


def test_missing_process_0_is_reported():
    [error] = met((1, 2))
    assert error.startswith("cannot reach process 0 at 127.0.0.1:")
    assert "(Connection refused, for 1 s); start process 0, or correct distributed.coordinator" in error


def test_missing_process_is_reported_to_all():
    leader, other = met((0, 4), (2, 4))
    assert leader.startswith("timed out after 1 s: processes 1, 3 of 4 did not connect to 127.0.0.1:")
    assert leader.endswith("; start each with its own distributed.index")
    assert other == f"rejected by process 0: {leader}"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            ((0, 3), (1, 2)),
            "distributed.processes differs: 2 in process 1, 3 in process 0; start all with",
        ),
        (
            ((0, 2), (2, 3)),
            "distributed.processes differs: 3 in process 2, 2 in process 0; start all with",
        ),
        (((0, 3), (1, 3), (1, 3)), "distributed.index must be unique, got 1 twice; number the processes from 0"),
    ],
)
def test_disagreement_about_index_or_number_of_processes_is_rejected(groups: tuple, expected: str):
    leader, *others = met(*groups)
    assert expected in leader
    assert any(other == f"rejected by process 0: {leader}" for other in others)


@pytest.mark.parametrize("key", [b"", b"the secret of this run"])
def test_index_is_taken_by_who_knows_the_key(key: bytes, monkeypatch: pytest.MonkeyPatch):
    """The control of the test below: the protocol is the right one."""
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, key.decode())
    with led(3, patience=2) as (address, outcomes):
        claimed = claim(address, key, 1)
    assert outcomes[0].startswith(f"timed out after 2 s: process 2 of 3 did not connect to {address}; start it with")
    assert json.loads(claimed.recv_bytes())["error"] == outcomes[0]


@pytest.mark.parametrize("key", [b"", b"another secret"])
def test_stranger_without_the_key_takes_no_index(key: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, "the secret of this run")
    with led(3, patience=2) as (address, outcomes):
        with pytest.raises(AuthenticationError):
            claim(address, key, 1)
        own = threading.Thread(target=outcome, args=(Distributed(address, 3, 2, 20),), daemon=True)
        own.start()
    own.join(10)
    assert outcomes == [
        f"timed out after 2 s: process 1 of 3 did not connect to {address}; 1 connected with another "
        "INCEPTION_RENDEZVOUS_KEY; start it with distributed.index=1 and the same key"
    ]


def test_stranger_does_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch):
    """Neither one with another key nor one that connects and stays silent."""
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, "the secret of this run")
    monkeypatch.setattr(rendezvous, "REPLY_SECONDS", 1)
    with led(2) as (address, outcomes):
        silent = reached(address)
        with pytest.raises(AuthenticationError):
            claim(address, b"another secret", 1)
        assert outcome(Distributed(address, 2, 1, 20)) == ""
        silent.close()
    assert outcomes == [""]


def test_process_with_another_key_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, "one")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def challenge() -> None:
            connection = Connection(server.accept()[0].detach())
            with suppress(AuthenticationError):
                deliver_challenge(connection, b"other")
            connection.close()

        threading.Thread(target=challenge, daemon=True).start()
        assert outcome(Distributed(address, 2, 1, 5)) == (
            f"process 0 at {address} has another INCEPTION_RENDEZVOUS_KEY; set the same value for all processes"
        )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("coordinator", ["node1:4711", "10.0.0.1:4711", "[2001:db8::1]:4711"])
def test_address_on_a_network_needs_a_key(index: int, coordinator: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rendezvous.KEY_VARIABLE, raising=False)
    error = outcome(Distributed(coordinator, 2, index, 5))
    assert error == (
        f"INCEPTION_RENDEZVOUS_KEY is not set, so that anybody on the network could join at {coordinator}; set this "
        "environment variable to the same secret for all processes (openssl rand -hex 32 prints one), or use "
        "distributed.coordinator=127.0.0.1:4711 on a single machine"
    )


def test_address_on_a_network_is_used_with_a_key(monkeypatch: pytest.MonkeyPatch):
    """0.0.0.0 is every interface of this machine, and no loopback address."""
    monkeypatch.setenv(rendezvous.KEY_VARIABLE, "the secret of this run")
    address = f"0.0.0.0:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(outcome, [Distributed(address, 2, index, 10) for index in (0, 1)])) == ["", ""]


def test_process_may_disconnect_and_reconnect():
    """Like a restarted container; a process that has disconnected does not count."""
    with led(3) as (address, outcomes):
        claim(address, b"", 1).close()
        with ThreadPoolExecutor(2) as pool:
            others = list(pool.map(outcome, [Distributed(address, 3, index, 20) for index in (1, 2)]))
    assert (outcomes, others) == ([""], ["", ""])
    with led(3, patience=2) as (address, outcomes):
        claim(address, b"", 1).close()
    assert "timed out after 2 s: processes 1, 2 of 3 did not connect to" in outcomes[0]


def test_client_with_another_protocol_is_ignored():
    """With a valid length, too; an object that is pickled is never loaded."""
    with led(2) as (address, outcomes):
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"\0\0\0\x02[]", b"\0\0\0\0", b""):
            with reached(address) as line:
                line.sendall(noise)
        for words in (b"[1, 2]", b'{"index": "first"}', b'{"index": 1}', b"\x80\x04N.", b"x" * 5000):
            authenticated(address, b"").send_bytes(words)
        assert outcome(Distributed(address, 2, 1, 10)) == ""
    assert outcomes == [""]


def test_server_with_another_protocol_is_not_process_0():
    """For example the server of an earlier attempt that is about to end."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        def chat() -> None:
            line, _ = other.accept()
            line.sendall(b"\x00\x00\x12\x04\xff\x00\n")
            line.close()

        threading.Thread(target=chat, daemon=True).start()
        error = message(rendezvous.rendezvous, Distributed(coordinator=address, index=1, processes=2, wait_seconds=1))
    assert "cannot reach process 0 at 127.0.0.1:" in error


def test_address_in_use_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = message(rendezvous.rendezvous, Distributed(coordinator=address, processes=2, wait_seconds=1))
    assert error.startswith(f"cannot listen on distributed.coordinator={address} (Address already in use")
    assert error.endswith("; use a free port of process 0's machine")


def test_address_is_parsed():
    assert rendezvous.parse_address("node1:4711") == ("node1", 4711)
    assert rendezvous.parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("node1", "node1:", ":4711", "node1:http", "node1:70000"):
        assert f"distributed.coordinator must be HOST:PORT, got {wrong}; use" in message(
            rendezvous.parse_address, wrong
        )
    assert rendezvous.bind_address("127.0.0.1:4711") == rendezvous.bind_address("localhost:4711") == "127.0.0.1:4711"
    assert rendezvous.bind_address("node1:4711") == rendezvous.bind_address("10.0.0.1:4711") == "0.0.0.0:4711"
    assert rendezvous.bind_address("[::1]:4711") == "[::1]:4711"
    assert rendezvous.bind_address("[2001:db8::1]:4711") == "[::]:4711"


MANY = ["backend=jax", "distributed.processes=2", "distributed.coordinator=node1:4711"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["devices=all"], "devices=all is not supported with backend=tensorflow; use backend=jax"),
        (
            ["distributed.processes=2"],
            "distributed.processes=2 is not supported with backend=tensorflow; use backend=jax",
        ),
        (["backend=jax", "devices=none"], "devices must be a positive whole number, or all, got none; use devices=all"),
        (["backend=jax", "devices=0"], "devices must be a positive whole number, or all, got 0; use devices=all"),
        (["backend=jax", "devices=3"], "batch_size must be a multiple of the number of devices (3), got 32; use b"),
        ([*MANY, "devices=4", "batch_size=12"], "multiple of the number of devices (8), got 12; use batch_size=8"),
        ([*MANY, "distributed.index=2"], "distributed.index must be below distributed.processes (2), got 2; number"),
        (MANY[:2], "distributed.coordinator is missing, which several processes need to find each other; use"),
        (
            [*MANY, "checkpoint.every_minutes=5"],
            "checkpoint.every_minutes is not supported with several processes, which",
        ),
    ],
)
def test_invalid_distributed_config_is_rejected(overrides: list[str], expected: str):
    assert expected in message(compose, overrides)


def test_coordinator_does_not_change_the_config_hash():
    """A requeued job runs on other nodes."""
    overrides = ["backend=jax", "distributed.processes=2", "run_dir=x"]
    first, second = (
        compose([*overrides, f"distributed.coordinator={address}"]) for address in ("node1:4711", "node9:4712")
    )
    assert (
        config_hash(to_dict(first, Redactor()))
        == config_hash(to_dict(second, Redactor()))
        != config_hash(to_dict(compose(overrides[:1]), Redactor()))
    )


def test_single_process_sends_nothing():
    group, state = ProcessGroup(0, 1), {"weight": np.ones(3, "float32")}
    assert group.verify_same_config({"processor": "here"}) == {"processor": "here"}
    assert group.broadcast_metrics({"loss": 1.0}) == {"loss": 1.0}
    assert group.broadcast_state({"steps": 1}, state) == ({"steps": 1}, state)
    assert group.shutdown(7, all_processes=True) == group.shutdown(7, all_processes=False) == 7


class Gathered(ProcessGroup):
    """A group whose other processes have a given provenance."""

    others: tuple[dict[str, Any], ...]

    def _gather_bytes(self, own: bytes) -> list[bytes]:
        return [own, *(json.dumps(other).encode() for other in self.others)]


def test_other_processor_is_recorded_and_other_threads_are_rejected():
    """A run resumes only if each of its processes computes as before."""
    group = Gathered(0, 3)
    own = {"threads": 4, "processor": "here"}
    object.__setattr__(group, "others", (own, own | {"processor": "there"}))
    assert group.verify_same_config(own) == own | {"processor.2": "there"}
    object.__setattr__(group, "others", (own, own | {"threads": 8}))
    assert "processes 0 and 2 differ: threads is 4 and 8; start all processes with" in message(
        group.verify_same_config, own
    )


# --------------------------------------------------------------------------------------------------- lost processes


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PeerMonitor]]:
    """The monitors of three processes; this one is process 0."""
    (first, first_end), (second, second_end) = Pipe(), Pipe()
    monitors = [PeerMonitor([first, second]), PeerMonitor([first_end]), PeerMonitor([second_end])]
    monkeypatch.setattr(liveness, "_monitor", monitors[0])
    yield monitors
    for monitor in monitors:
        monitor.leave()


def test_loss_of_a_process_reaches_all(peers: list[PeerMonitor]):
    assert [peer.is_peer_lost(0.1) for peer in peers] == [False] * 3
    peers[1].leave()  # its connection closes, as when it ends
    assert [peer.is_peer_lost(5) for peer in (peers[0], peers[2])] == [True, True]


def raised(error: Exception) -> Exception:
    """What an error becomes that is raised while training in three processes."""
    with pytest.raises(Exception) as caught, ProcessGroup(0, 3).translate_connection_errors():
        raise error
    return caught.value


@pytest.mark.parametrize("kind", ["JaxRuntimeError", "ValueError"])
def test_error_of_jax_is_a_lost_process_if_one_is_gone(kind: str, peers: list[PeerMonitor]):
    """Whatever its words are: JAX raises ValueError where a function runs at once."""
    errors = pytest.importorskip("jax.errors")
    peers[2].leave()
    error = (ValueError if kind == "ValueError" else errors.JaxRuntimeError)("UNKNOWN: something went wrong")
    lost = raised(error)
    assert isinstance(lost, WorkerLostError)
    assert str(lost).startswith("lost contact with another process; see its log, then run make resume")
    assert lost.__cause__ is error


def test_error_of_jax_is_its_own_while_all_are_there(peers: list[PeerMonitor], monkeypatch: pytest.MonkeyPatch):
    """Whatever its words are. The others are told, since this process will not go on."""
    errors = pytest.importorskip("jax.errors")
    monkeypatch.setattr(process_group, "LOSS_SECONDS", 0.2)
    error = errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Gloo, NCCL, coordination, Connection")
    assert raised(error) is error
    assert [peer.is_peer_lost(5) for peer in peers[1:]] == [True, True]


def test_errors_of_the_run_stay_what_they_are(peers: list[PeerMonitor]):
    pytest.importorskip("jax")
    peers[1].leave()
    for error in (ConfigError("processes 0 and 1 differ"), KeyError("x"), RuntimeError("Connection closed")):
        assert raised(error) is error


TALKING = """
import os, sys
from train.config.schema import Distributed
from train.distributed import liveness, rendezvous
from train.distributed.process_group import ProcessGroup, WorkerLostError
import jax
index, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
liveness.watch(rendezvous.rendezvous(Distributed(address, 3, index, 60)))
jax.distributed.initialize(address, 3, index, cluster_detection_method="deactivate")
group = ProcessGroup(index, 3)
try:
    with group.translate_connection_errors():
        for step in range(10**6):
            if (index, step) == (1, 5):
                os.kill(os.getpid(), 9)
            assert group.broadcast_metrics({"step": step + index}) == {"step": step}
except WorkerLostError as error:
    print(type(error.__cause__).__name__, error, flush=True)
    os._exit(3)
"""


@pytest.mark.slow
def test_process_killed_while_all_communicate_is_lost():
    """Three real processes; the one that is killed is neither the leader nor connected to the other that is left."""
    pytest.importorskip("jax")
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as pool:
        commands = [[sys.executable, "-c", TALKING, str(index), address] for index in range(3)]
        done = list(pool.map(lambda command: run_command(*command), commands))
    assert [one.code for one in done] == [3, -9, 3], done[0].err + done[2].err
    for one in (done[0], done[2]):
        kind, _, line = one.out.splitlines()[-1].partition(" ")
        assert kind in ("ValueError", "JaxRuntimeError")
        assert line.startswith("lost contact with another process; see its log, then run make resume")


# ------------------------------------------------------------------------------------------------------- whole runs

TINY = {
    "backend": "jax", "device": "cpu", "threads": 1, "precision": "float32", "model": "vgg16_inception",
    "model.width": 0.1, "model.blocks": "[conv_bn,conv_bn,inception_v1,conv_bn,conv_bn]", "augment": "flip_crop",
    "epochs": 2, "steps_per_epoch": 6, "batch_size": 16, "schedule": "constant",
    "optimizer.learning_rate": 1e-5,  # at the default rate, rounding errors grow a hundredfold per step at first
    "checkpoint.every_steps": 4, "checkpoint.keep": 9, "tracking.every_steps": 3,
    "tracking.log_model": "false", "tracking.wait_seconds": 600, "evaluate.report": "false",
}  # fmt: skip


def train(run: Path, processes: int = 1, **overrides: Any) -> list[Done]:
    """Train with this number of processes; return the result of each."""
    keys = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
    keys |= {"run_dir": run, "tracking.uri": f"sqlite:///{run}.db"}
    return started("train", [f"{name}={value}" for name, value in keys.items()], processes)


def started(
    module: str,
    words: list[str],
    processes: int,
    *,
    own: dict[int, list[str]] | None = None,
    env: dict[int, dict[str, str]] | None = None,
    where: dict[int, Path] | None = None,
    watch: Any = None,
) -> list[Done]:
    """own, env, where: of single processes, by index. watch: called with the running processes."""
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    several = [f"distributed.processes={processes}", f"distributed.coordinator=127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, *words, *several, f"distributed.index={index}", *(own or {}).get(index, [])],
            cwd=(where or {}).get(index, ROOT),
            env=inherited | (env or {}).get(index, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        if watch:
            watch(running)
        with ThreadPoolExecutor(processes) as pool:
            outputs = list(pool.map(lambda one: one.communicate(timeout=300), running))
    finally:
        for one in running:
            one.kill()
    return [Done(one.returncode, *output) for one, output in zip(running, outputs, strict=True)]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def state_of(run: Path, name: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by default the last one."""
    folder = run / "checkpoints"
    saved = (
        checkpoint.read_checkpoint(folder / name)
        if name
        else checkpoint.CheckpointManager(folder, keep=9).load_latest()
    )
    assert saved
    return dict(saved.arrays)


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of any weight, relative to the largest of its tensor."""
    names = [name for name, value in one.items() if name.startswith("model/") and value.dtype == np.float32]
    assert len(names) > 100
    return max(float(np.abs(one[name] - other[name]).max() / (np.abs(one[name]).max() + 1e-3)) for name in names)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "alone", train_alone)


def train_alone(place: Path) -> Path:
    [done] = train(place / "run")
    assert done.code == 0, done.err
    return place / "run"


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "two", train_two)


def train_two(folder: Path) -> Path:
    run = folder / "run"
    leader, other = train(run, 2)
    assert leader.code == other.code == 0, leader.err + other.err
    assert "device: CPU in 2 processes, JAX, 1 thread, float32, XLA on" in leader.out
    assert other.out == "worker 1 of 2 started; progress is printed by process 0\n"
    assert leader.err == other.err == ""
    return run


@pytest.mark.slow
def test_finished_run_is_reported_by_all_processes(two: Path):
    done = train(two, 2)
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    assert f"the run is finished: {two}" in done[0].out
    assert summary_of(two)["attempts"] == 1


EARLY = "epoch-00000-batch-0000004"  # the first checkpoint, after four steps


def same_numbers(one: Path, other: Path) -> None:
    """Assert equality within float32 rounding (unit 6e-8) in the first steps.

    Another order of a sum moves a value by some units of rounding. Sooner or later that makes a pooling window choose
    another maximum, which changes a gradient by 1e-4 and more (seen between steps 4 and 9, by processor), and from
    there the runs drift apart. So losses are compared over the first epoch, to 100 units and more, and weights after
    four steps, where one such choice is allowed for; half of each batch is 200 times as far away.
    """
    assert distance(state_of(one, EARLY), state_of(other, EARLY)) < 1e-3
    actual, expected = first_epoch_of(one), first_epoch_of(other)
    assert actual.keys() == expected.keys() == {(3, "train/loss"), (6, "train/loss"), (6, "validation/loss")}
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-5), key
    assert summary_of(one)["test"]["examples"] == summary_of(other)["test"]["examples"] == 340


def first_epoch_of(run: Path) -> dict[tuple[int, str], float]:
    """The losses of the first epoch in the journal, by step and name."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line["values"].items()
        if line["step"] <= 6 and name in ("train/loss", "validation/loss")
    }


@pytest.mark.slow
def test_two_processes_match_a_single_process(alone: Path, two: Path):
    same_numbers(alone, two)


@pytest.mark.slow
def test_four_processes_match_a_single_process(alone: Path, tmp_path: Path):
    done = train(tmp_path / "run", 4)
    assert [one.code for one in done] == [0] * 4, done[0].err
    same_numbers(alone, tmp_path / "run")


@pytest.mark.slow
def test_two_devices_match_one_and_two_processes(alone: Path, two: Path, tmp_path: Path):
    [done] = train(tmp_path / "run", devices=2)
    assert done.code == 0, done.err
    assert "device: 2 x CPU, JAX, 1 thread, float32" in done.out
    same_numbers(alone, tmp_path / "run")
    assert distance(state_of(two), state_of(tmp_path / "run")) < 1e-5  # to the end: the same sums in the same order


@pytest.mark.slow
def test_half_of_each_batch_does_not_match(alone: Path, tmp_path: Path):
    """Negative control: a process that used only the statistics and gradients of its own part."""
    [done] = train(tmp_path / "run", batch_size=8)
    assert done.code == 0, done.err
    assert distance(state_of(alone, EARLY), state_of(tmp_path / "run", EARLY)) > 0.05
    actual, expected = first_epoch_of(alone), first_epoch_of(tmp_path / "run")
    assert actual[3, "train/loss"] != pytest.approx(expected[3, "train/loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_all_processes_stop_and_resume_when_one_is_killed(two: Path, tmp_path: Path, victim: int):
    run = tmp_path / "run"
    overrides = [f"{name}={value}" for name, value in TINY.items()]
    overrides += [f"run_dir={run}", f"tracking.uri=sqlite:///{run}.db"]
    done = started("train", overrides, 2, env={victim: {"INCEPTION_FAULT": "step:7"}})
    assert done[victim].code == -9
    assert done[1 - victim].code == 1, done[1 - victim].err
    assert "error: lost contact with another process; see its log, then run make resume" in done[1 - victim].err
    done = started("train.resume", [f"run={run}"], 2)
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    assert "resuming from checkpoint epoch-00000-batch-0000004 (step 4, attempt 2)" in done[0].out
    assert summary_of(run)["weights_sha256"] == summary_of(two)["weights_sha256"]
    assert summary_of(run)["test"] == summary_of(two)["test"]


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path):
    run = tmp_path / "run"
    overrides = [f"{name}={value}" for name, value in (TINY | {"epochs": 400}).items()]
    overrides += [f"run_dir={run}", f"tracking.uri=sqlite:///{run}.db"]

    def stop(running: list[subprocess.Popen]) -> None:
        while not (run / "metrics.jsonl").exists() or '"step": 6,' not in (run / "metrics.jsonl").read_text():
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)

    done = started("train", overrides, 2, watch=stop)
    assert [one.code for one in done] == [143, 143], done[0].err + done[1].err
    assert summary_of(run)["failure"] == "stopped by SIGTERM"
    saved = state_of(run)
    assert 6 < int(saved["count"]) < 400 * 6
    assert summary_of(run)["steps"] == int(saved["count"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["batch_size=8"], "batch_size is 16 and 8;"),
        (["data.validation_fraction=0.2"], "data.validation_fraction is 0.1 and 0.2; data_fingerprint is "),
    ],
)
def test_processes_with_different_configs_are_rejected(tmp_path: Path, own: list[str], expected: str):
    overrides = [f"{name}={value}" for name, value in TINY.items() if name != own[0].partition("=")[0]]
    overrides += [f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    usual = [] if own[0].startswith("data.") else ["batch_size=16"]
    done = started("train", overrides, 2, own={0: usual, 1: own})
    assert [one.code for one in done] == [2, 2], done[0].err + done[1].err
    for one in done:
        assert f"error: processes 0 and 1 differ: {expected}" in one.err


@pytest.mark.slow
def test_process_with_other_code_is_rejected(tmp_path: Path):
    """One machine has another version of the project."""
    copy = tmp_path / "copy"
    for name in ("train", "conf"):
        shutil.copytree(ROOT / name, copy / name)
    (copy / "data").symlink_to(ROOT / "data")
    with (copy / "train/training/losses.py").open("a") as file:
        file.write("# another line\n")
    overrides = [f"{name}={value}" for name, value in TINY.items()]
    overrides += [f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = started("train", overrides, 2, where={1: copy})
    assert [one.code for one in done] == [2, 2], done[0].err + done[1].err
    assert "error: processes 0 and 1 differ: code is " in done[0].err


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_all(tmp_path: Path):
    """It ends with its own error, and the others with a line that refers to it."""
    overrides = [f"{name}={value}" for name, value in TINY.items()]
    overrides += [f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]

    def starve(running: list[subprocess.Popen]) -> None:
        while (
            not (tmp_path / "run/metrics.jsonl").exists() or "step" not in (tmp_path / "run/metrics.jsonl").read_text()
        ):
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.05)
        resource.prlimit(running[1].pid, resource.RLIMIT_AS, (2**20, 2**20))

    done = started("train", [*overrides, "epochs=400"], 2, watch=starve)
    assert done[1].code not in (0, None)
    assert done[0].code == 1
    assert "error: lost contact with another process" in done[0].err
