"""MLflow: the journal on disk is authoritative, uploads follow it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from support.commands import ROOT, message, run_command, run_train
from support.shared import SECRET, Finished, once
from support.waiting import answers, free_port, happens_within, wait_for
from train.tracking import address, environment, mlflow_store, uploader
from train.tracking.journal import Journal, read_journal
from train.tracking.run_dir import Heartbeat, RunDir, create_run_dir, open_run_dir


@dataclass
class Recorded:
    """The finished run in a store."""

    uri: str
    finished: Finished


@pytest.fixture(params=["file", "server"])
def recorded(request: pytest.FixtureRequest, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """In the SQLite file that it was uploaded to during the run, and on a server, over HTTP, by `make sync`."""
    if request.param == "file":
        return Recorded(finished.uri, finished)
    server = request.getfixturevalue("tracking_server")

    def sync(_: Path) -> None:
        done = run_command("make", "sync", f"run={finished.path}", f"uri={server.uri}")
        assert done.code == 0, done.err

    once(tmp_path_factory, "synced", sync)
    return Recorded(server.uri, finished)


@pytest.fixture(params=["file", "server"])
def empty_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a store. The server is shared, so experiments need names of their own."""
    if request.param == "file":
        return f"sqlite:///{tmp_path / 'mlflow.db'}"
    return request.getfixturevalue("tracking_server").uri


def the_run(uri: str, experiment: str = "inception") -> tuple[MlflowClient, Run]:
    client = MlflowClient(uri)
    experiment_info = client.get_experiment_by_name(experiment)
    assert experiment_info is not None
    [run] = client.search_runs([experiment_info.experiment_id])
    return client, run


def history(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_parameters_tags_and_status(recorded: Recorded):
    _, run = the_run(recorded.uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "vgg16_inception seed 0"
    assert run.data.params["model.width"] == "0.125"
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    assert run.data.params["model.blocks"] == "['conv_bn', 'conv_bn', 'inception_v1', 'conv_bn', 'inception_v3']"
    assert len(run.data.params) == 85
    summary = recorded.finished.summary
    for name in ("run_id", "config_hash", "data_fingerprint", "weights_sha256", "status"):
        assert run.data.tags[name] == summary[name]
    assert {"git.commit", "git.dirty", "host", "version.tensorflow", "version.keras"} <= set(run.data.tags)


def test_metrics_have_their_true_steps(recorded: Recorded):
    client, run = the_run(recorded.uri)
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in recorded.finished.journal:
        for name, value in line["values"].items():
            expected.setdefault(name, []).append((line["step"], value))
    assert {"train/accuracy", "train/aux_loss", "validation/accuracy", "learning_rate"} <= set(expected)
    assert {"images_per_second", "data_wait_fraction", "test/accuracy"} <= set(expected)
    best = max(value for _, value in expected["validation/accuracy"])
    scores = json.loads((recorded.finished.path / "evaluation/test/scores.json").read_text())
    more = {f"test/{name}": scores[name] for name in ("macro_f1", "macro_precision", "macro_recall", "roc_auc", "ece")}
    more |= dict(zip(("test/accuracy_low", "test/accuracy_high"), scores["accuracy_interval"], strict=True))
    more |= {"best/validation_accuracy": best, "best/epoch": recorded.finished.summary["best_epoch"]}
    assert set(run.data.metrics) == {*expected, *more}
    assert {name: run.data.metrics[name] for name in more} == more
    for name, points in expected.items():
        assert history(client, run, name) == points, name


def test_data_set_has_the_fingerprint_as_digest(recorded: Recorded):
    _, run = the_run(recorded.uri)
    [used] = run.inputs.dataset_inputs
    assert used.dataset.name == "digits"
    assert used.dataset.digest == recorded.finished.summary["data_fingerprint"][:32]
    assert json.loads(used.dataset.profile)["train"] == 1281


def test_artifacts_and_the_inference_model(recorded: Recorded):
    client, run = the_run(recorded.uri)
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names >= {
        "config.yaml",
        "model_summary.txt",
        "summary.json",
        "train.log",
        "input_example.npy",
        "dataset.json",
    }
    assert {"augmented.png", "report.html", "loss.png", "accuracy.png", "cost.json", "evaluation"} <= names
    evaluated = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "evaluation/test")}
    assert evaluated >= {f"evaluation/test/{name}" for name in ("scores.json", "predictions.csv", "confusion.png")}
    import mlflow

    mlflow.set_tracking_uri(recorded.uri)
    [output] = client.get_run(run.info.run_id).outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 32, 32, 1)
    assert model.metadata.signature.inputs.inputs[0].type == np.uint8
    example = np.load(recorded.finished.path / "input_example.npy")
    assert np.asarray(model.predict(example)).shape == (1, 10)
    [version] = client.search_model_versions("name = 'inception-digits'")
    assert version.source == f"models:/{output.model_id}"
    champion = client.get_model_version_by_alias("inception-digits", "champion")
    assert (champion.run_id, champion.tags["data"]) == (run.info.run_id, recorded.finished.summary["data_fingerprint"])


EXPERIMENT = 'it\'s: a "lab", 50%'


def test_best_validation_accuracy_becomes_champion_of_its_data_set(empty_store: str):
    name = "it's- a 'lab', 50%-digits"
    client, is_champion = MlflowClient(empty_store), []
    runs = [("a", 0.9, "x"), ("b", 0.8, "x"), ("c", 0.95, "x"), ("d", 0.5, "y"), ("e", 0.4, "y")]
    for run_id, accuracy, data in runs:
        identity = {"run_id": run_id, "experiment": EXPERIMENT, "name": run_id, "time": 1.0, "tags": {"data": "digits"}}
        store = mlflow_store.Store(empty_store, identity)
        model_id = store._get_or_create_logged_model(run_id).model_id
        for _ in range(2):  # the second sync adds nothing
            store.register_model(model_id, {"validation": {"accuracy": accuracy}, "data_fingerprint": data})
        is_champion.append(client.get_model_version_by_alias(name, mlflow_store.CHAMPION).run_id == store.mlflow_id)
    assert is_champion == [True, False, True, True, False]
    assert len(client.search_model_versions(f'name = "{name}"')) == 5


def test_no_secret_in_the_store(recorded: Recorded):
    _, run = the_run(recorded.uri)
    assert SECRET not in str(run.data.params) + str(run.data.tags)
    assert run.data.params["tracking.uri"] == "${oc.env:INCEPTION_TEST_STORE}"


def test_sync_uploads_to_another_store_without_duplicates(finished: Finished, tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    for _ in range(2):
        uploader.Uploader(open_run_dir(finished.path), uri).finish()
    client, run = the_run(uri)
    first_client, first = the_run(finished.uri)
    assert run.info.status == "FINISHED"
    assert run.data.tags["run_id"] == first.data.tags["run_id"]
    for name in first.data.metrics:
        assert history(client, run, name) == history(first_client, first, name), name


def test_incomplete_journal_line_is_read_later(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    Journal(path).append(0, 1, {"a": 1.0})
    with path.open("a") as file:
        file.write('{"epoch": 0, "step": 2, "ti')
    [(line, offset)] = read_journal(path)
    assert (line["step"], line["values"]) == (1, {"a": 1.0})
    assert list(read_journal(path, offset)) == []


def test_failed_model_upload_does_not_hide_the_status_of_the_run(tmp_path: Path):
    folder = begun(tmp_path, log_model=True)
    folder.best.mkdir()
    (folder.best / "model.keras").write_text("no model")
    (folder.best / "model.json").write_text("{}")
    folder.write_json("summary.json", {"status": "finished", "time": time.time()})
    record = uploader.Uploader(folder, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ValueError):
        record.finish()
    assert the_run(record.uri)[1].info.status == "FINISHED"


def begun(tmp_path: Path, log_model: bool = False) -> RunDir:
    folder = create_run_dir(str(tmp_path / "run"), tmp_path, "x", latest=False)
    tags = {"run_dir": str(folder.path), "host": socket.gethostname()}
    identity = {"format_version": 2, "run_id": folder.run_id, "experiment": "inception", "name": "n", "tags": tags}
    identity["time"] = time.time()
    folder.write_json("run.json", identity | {"log_model": log_model, "requirements": []})
    return folder


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1] + "/.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_run_of_a_killed_process_is_marked(tmp_path: Path):
    """The uploader outlives the trainer, notices that its lock is released, and marks the run."""
    folder, uri = begun(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder.path], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    Journal(folder.journal).append(0, 5, {"train/loss": 2.0})
    MlflowClient(uri).search_experiments()  # creates the tables, which two processes must not do at once
    recorder = uploader.start(folder, uri)
    assert recorder is not None
    deadline = time.monotonic() + 60
    while not _logged(uri) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert the_run(uri)[1].info.status == "RUNNING"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert recorder.wait(300) == 0
    client, run = the_run(uri)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "the training process is gone")
    assert history(client, run, "train/loss") == [(5, 2.0)]


def _logged(uri: str) -> bool:
    try:
        return bool(the_run(uri)[1].data.metrics)
    except (AssertionError, ValueError):
        return False


@pytest.mark.slow
def test_resumed_run_is_running_again_in_the_same_mlflow_run(tmp_path: Path):
    """Its last attempt was marked as failed; the new uploader waits until the old one has ended."""
    folder, uri = begun(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}"
    journal = Journal(folder.journal)
    journal.append(0, 1, {"train/loss": 3.0})
    assert uploader.upload_until_finished(uploader.Uploader(folder, uri)) == 0
    client, run = the_run(uri)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "the training process is gone")
    begun_at = int(time.time())
    with folder.locked():
        with folder.upload_lock(wait=False):
            recorder = uploader.start(folder, uri)
            assert recorder is not None
            with pytest.raises(subprocess.TimeoutExpired):
                recorder.wait(4)
            assert the_run(uri)[1].info.status == "FAILED"
        wait_for(lambda: the_run(uri)[1].info.status == "RUNNING")
        wait_for(lambda: "failure" not in the_run(uri)[1].data.tags)
        assert float(the_run(uri)[1].data.tags["heartbeat"]) > begun_at
        journal.append(0, 2, {"train/loss": 2.0})
        folder.write_json("summary.json", {"status": "finished", "time": time.time(), "attempts": 2})
        assert recorder.wait(300) == 0
    client, again = the_run(uri)
    assert again.info.run_id == run.info.run_id
    assert (again.info.status, again.data.tags["attempts"]) == ("FINISHED", "2")
    assert history(client, again, "train/loss") == [(1, 3.0), (2, 2.0)]


@pytest.mark.slow
def test_uploader_of_an_earlier_attempt_leaves_the_run_to_the_new_one(tmp_path: Path):
    """Its store is unreachable, and it would otherwise follow the new attempt forever."""
    folder = begun(tmp_path)
    Heartbeat(folder.path / "heartbeat").close()
    recorder = uploader.start(folder, f"http://127.0.0.1:{free_port()}")
    assert recorder is not None
    log = folder.path / "uploader.log"
    wait_for(lambda: log.exists() and "could not upload yet" in log.read_text(), 300)
    assert recorder.poll() is None
    Heartbeat(folder.path / "heartbeat").close()
    assert recorder.wait(300) == 0


@pytest.mark.slow
def test_dead_uploader_is_restarted_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, uri = begun(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}"
    Journal(folder.journal).append(0, 1, {"train/loss": 1.0})
    recorder = uploader.start(folder, uri)
    assert recorder is not None
    recorder.kill()
    recorder.wait()
    folder.write_json("summary.json", {"status": "finished", "time": time.time()})
    uploader.wait(recorder, folder, uri, 600)
    client, run = the_run(uri)
    assert (run.info.status, history(client, run, "train/loss")) == ("FINISHED", [(1, 1.0)])
    assert capsys.readouterr().err == ""


def test_reap_marks_only_runs_whose_process_is_gone(tmp_path: Path, empty_store: str):
    """On this machine the lock decides, on others the heartbeat; runs of other programs are ignored."""
    uri = empty_store
    elsewhere = {"host": "other"}
    kinds = {"alive": {}, "dead": {}, "ended": {}, "silent elsewhere": elsewhere, "heard elsewhere": elsewhere}
    folders = {}
    for kind, tags in kinds.items():
        (tmp_path / kind).mkdir()
        folder = folders[kind] = begun(tmp_path / kind)
        identity = folder.identity()
        new = {"name": kind, "tags": identity["tags"] | tags, "experiment": "reaped"}
        folder.write_json("run.json", identity | new)
        record = uploader.Uploader(folder, uri)
        store = record.sync()
        age = {"silent elsewhere": 700, "heard elsewhere": 500}.get(kind, 0)
        store.client.set_tag(store.mlflow_id, "heartbeat", str(time.time() - age))
    client = MlflowClient(uri)
    stranger = client.create_run(the_run_ids(uri, "reaped")[1]).info.run_id
    folders["ended"].write_json("summary.json", {"status": "finished"})  # only its upload is incomplete
    with folders["alive"].locked():
        done = run_command("make", "reap", f"uri={uri}")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if str(tmp_path) in line]  # other tests use the server, too
    assert sorted(lines) == [
        f"marked dead ({folders['dead'].path}): its process is gone",
        f"marked silent elsewhere ({folders['silent elsewhere'].path}): no heartbeat for 12 minutes",
    ]
    assert re.fullmatch(r"\d+ runs? marked as failed", done.last_line)
    runs = {
        run.info.run_name: run
        for run in client.search_runs([the_run_ids(uri, "reaped")[1]])
        if run.info.run_id != stranger
    }
    assert {name: run.info.status for name, run in runs.items()} == {
        "alive": "RUNNING", "dead": "FAILED", "ended": "RUNNING", "silent elsewhere": "FAILED",
        "heard elsewhere": "RUNNING",
    }  # fmt: skip
    assert runs["dead"].data.tags["failure"] == "the training process is gone"
    assert client.get_run(stranger).info.status == "RUNNING"


def the_run_ids(uri: str, experiment: str = "inception") -> tuple[set[str], str]:
    """The run_id tags in an experiment, and the experiment."""
    client = MlflowClient(uri)
    experiment_info = client.get_experiment_by_name(experiment)
    assert experiment_info is not None
    runs = client.search_runs([experiment_info.experiment_id])
    return {run.data.tags.get("run_id", "") for run in runs}, experiment_info.experiment_id


def test_store_on_a_full_disk_loses_nothing_once_there_is_space(tmp_path: Path, tiny_disk: Callable[[str], Path]):
    disk = tiny_disk("2m")
    folder = begun(tmp_path)
    journal = Journal(folder.journal)
    record = uploader.Uploader(folder, f"sqlite:///{disk / 'mlflow.db'}")
    record.sync()
    (disk / "filler").write_bytes(bytes(2**21 - sum(file.stat().st_size for file in disk.iterdir()) - 2**15))
    for step in range(1, 3001):
        journal.append(0, step, {"train/loss": 1.0 / step})
    with pytest.raises(Exception, match="full"):
        record.sync()
    (disk / "filler").unlink()
    folder.write_json("summary.json", {"status": "finished", "time": time.time()})
    record.finish()
    client, run = the_run(record.uri)
    assert history(client, run, "train/loss") == [(step, 1.0 / step) for step in range(1, 3001)]


def test_unreachable_store_is_retried(tmp_path: Path):
    """At first a folder blocks its path, then it is removed: the upload is completed, without duplicates."""
    folder = begun(tmp_path)
    Journal(folder.journal).append(0, 1, {"train/loss": 1.0})
    folder.write_json("summary.json", {"status": "failed", "failure": "x", "time": time.time()})
    blocker = tmp_path / "store"
    blocker.touch()
    rec = uploader.Uploader(folder, f"sqlite:///{blocker / 'mlflow.db'}")
    with pytest.raises(OSError, match=r"exists|directory"):
        rec.sync()
    blocker.unlink()
    assert uploader.upload_until_finished(rec) == 0
    client, run = the_run(rec.uri)
    assert run.info.status == "FAILED"
    assert history(client, run, "train/loss") == [(1, 1.0)]


@pytest.mark.slow
def test_simultaneous_runs_can_create_the_store(tmp_path: Path):
    folders = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        folder = begun(tmp_path / str(number))
        folder.write_json("summary.json", {"status": "finished", "time": time.time()})
        folders.append(folder)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    codes = [process.wait(300) for process in [uploader.start(folder, uri) for folder in folders] if process]
    assert codes == [0] * 4
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("inception")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["run_id"] for run in runs} == {folder.run_id for folder in folders}


def test_credentials_move_from_the_uri_to_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # restored after the test
        monkeypatch.setenv(name, "")
    assert mlflow_store.use_credentials("http://me:p%40ss@host:5000/x") == "http://host:5000/x"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"


def test_uploader_log_contains_no_secret(tmp_path: Path):
    log = uploader.RedactingLog(tmp_path / "log", "postgresql://me:hunter2@host/db?sslkey=abc")
    print("could not reach postgresql://me:hunter2@host/db?sslkey=abc with hunter2, me at home", file=log)
    text = (tmp_path / "log").read_text()
    assert "hunter2" not in text
    assert "abc" not in text
    assert "at home" in text


def test_sync_uses_the_store_of_the_run(finished: Finished, tmp_path: Path):
    folder = RunDir(tmp_path, "x")
    expected = f"no tracking.uri is stored in {tmp_path}; use make sync run={tmp_path} uri=ADDRESS"
    assert message(address.stored_uri, folder) == expected  # as in a sweep's record
    folder.write_yaml("config.yaml", {"tracking": {"uri": "sqlite:////place/mlflow.db"}})
    assert address.stored_uri(folder) == "sqlite:////place/mlflow.db"
    folder.write_yaml("config.yaml", {"tracking": {"uri": None}})
    assert address.stored_uri(folder) == mlflow_store.default_uri(ROOT)
    expected = "the run's tracking.uri is stored as ${oc.env:INCEPTION_TEST_STORE}, which is no address; "
    expected += f"use make sync run='{finished.path}' uri=ADDRESS"
    assert message(address.stored_uri, open_run_dir(finished.path)) == expected


def test_folder_without_a_run_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run folder; use"):
        open_run_dir(tmp_path)
    done = run_command("make", "sync", f"run={tmp_path}")
    assert done.code == 2
    assert done.err.splitlines()[0] == f"error: {tmp_path} is not a run folder; use e.g. run=runs/latest"


@contextmanager
def serving(uri: str, port: int | None = None, end: signal.Signals = signal.SIGTERM) -> Iterator[int]:
    """Start `make ui` and wait until it answers; its port. At the end all its processes get the signal `end`."""
    port = port or free_port()
    page = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("a+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "train.ui", f"port={port}", f"uri={uri}"],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            is_up = happens_within(lambda: b"<title>MLflow</title>" in answers(page), 300)
            log.seek(0)
            output = log.read()
            assert is_up, output
            assert output.startswith(f"MLflow UI: {page} ")
            yield port
        finally:
            os.killpg(server.pid, end)
            server.wait(60)


@pytest.mark.slow
def test_the_ui_answers_on_loopback(finished: Finished):
    """A real server over the finished run's store; a taken port is one line."""
    with serving(finished.uri) as port:
        taken = run_command(sys.executable, "-m", "train.ui", f"port={port}")
        assert (taken.code, taken.err) == (2, f"error: cannot listen on port {port}; use e.g. port={port + 1}\n")


@pytest.mark.slow
def test_server_receives_the_complete_run(tmp_path: Path):
    """Over HTTP, with a typed password that no file of the run, the server or its database contains."""
    with serving(f"sqlite:///{tmp_path / 'server/mlflow.db'}") as port:
        done = run_train(
            "model.width=0.1", "epochs=1", "steps_per_epoch=5", f"run_dir={tmp_path / 'run'}",
            f"tracking.uri=http://me:hunter2@127.0.0.1:{port}", "tracking.wait_seconds=600",
        )  # fmt: skip
        assert (done.code, done.err) == (0, "")
        client, run = the_run(f"http://127.0.0.1:{port}")
        assert run.info.status == "FINISHED"
        assert len(client.get_run(run.info.run_id).outputs.model_outputs) == 1
        assert "summary.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert history(client, run, "test/accuracy")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


@pytest.mark.slow
def test_server_killed_before_during_and_after_a_run_loses_nothing(tmp_path: Path):
    """SIGKILL each time; the run neither waits nor fails, and in the end every metric is recorded once."""
    store_uri, port = f"sqlite:///{tmp_path / 'server/mlflow.db'}", free_port()
    folder = tmp_path / "run"
    words = ["model=vgg16", "model.width=0.1", "epochs=6", "tracking.every_steps=1", "tracking.log_model=false"]
    process = subprocess.Popen(  # the server is dead when the run starts
        [sys.executable, "-m", "train", *words, "tracking.wait_seconds=0", f"run_dir={folder}",
         f"tracking.uri=http://127.0.0.1:{port}"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    with serving(store_uri, port, signal.SIGKILL):
        wait_for(lambda: bool(the_run_ids_or_none(port)))  # the uploader caught up by itself
    with serving(store_uri, port, signal.SIGKILL):
        assert process.wait(300) == 0  # killed and started again during the run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with serving(store_uri, port, signal.SIGKILL):
        done = run_command("make", "sync", f"run={folder}", timeout=300)
        if "another process is uploading" in done.err:  # the uploader of the run is doing it
            wait_for(lambda: the_run(f"http://127.0.0.1:{port}")[1].info.status == "FINISHED", 300)
        else:
            assert done.code == 0, done.err
        client, run = the_run(f"http://127.0.0.1:{port}")
        assert (run.info.status, run.data.tags["run_id"]) == ("FINISHED", open_run_dir(folder).run_id)
        expected: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for name, value in line["values"].items():
                expected.setdefault(name, []).append((line["step"], value))
        assert len(expected["train/loss"]) == 240
        for name, points in expected.items():
            assert history(client, run, name) == points, name


def the_run_ids_or_none(port: int) -> set[str]:
    try:
        return the_run_ids(f"http://127.0.0.1:{port}")[0]
    except AssertionError:
        return set()


@pytest.mark.slow
def test_ten_simultaneous_runs_are_recorded_in_one_database(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [
        "model=vgg16", "model.width=0.05", "threads=1", "epochs=1", "steps_per_epoch=5", "tracking.every_steps=1",
        "tracking.log_model=false", "tracking.wait_seconds=300", f"tracking.uri={uri}",
    ]  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-m", "train", *words, f"seed={seed}", f"run_dir={tmp_path / str(seed)}"],
                         cwd=ROOT, stdout=subprocess.DEVNULL)
        for seed in range(10)
    ]  # fmt: skip
    assert [process.wait(600) for process in running] == [0] * 10
    ids, experiment = the_run_ids(uri)
    assert ids == {open_run_dir(tmp_path / str(seed)).run_id for seed in range(10)}
    client = MlflowClient(uri)
    for run in client.search_runs([experiment]):
        assert run.info.status == "FINISHED"
        assert [step for step, _ in history(client, run, "train/loss")] == [1, 2, 3, 4, 5]


def test_sweep_record_adopts_trials_recorded_before_it(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    common = {"experiment": "x", "time": time.time(), "log_model": False, "requirements": []}
    tags = {"kind": "sweep", "run_dir": str(tmp_path)}
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep_id": "s"}))
    identities = {
        "000": {"run_id": "a", "name": "trial", "tags": {"sweep": "s"}},
        "elsewhere": {"run_id": "b", "name": "another's", "tags": {"sweep": "t"}},
        "record": {"run_id": "s", "name": "sweep", "tags": tags},
    }
    for name, identity in identities.items():
        folder = RunDir(tmp_path / name, identity["run_id"])
        folder.path.mkdir()
        folder.write_json("run.json", common | identity)
        folder.write_json("summary.json", {"status": "finished", "time": time.time()})
        uploader.Uploader(folder, uri).finish()
    client = MlflowClient(uri)
    [experiment] = [each for each in client.search_experiments() if each.name == "x"]
    runs = {run.data.tags["run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents == {"a": runs["s"].info.run_id, "b": None, "s": None}


def test_note_is_the_command_in_continued_shell_lines():
    words = ["make", "train", *(f"key{number}=value" for number in range(20)), "model.blocks=[a,b]", "x=it's one"]
    note = environment.command_note(shlex.join(words))["mlflow.note.content"]
    lines = note.removeprefix("```sh\n").removesuffix("\n```").splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 110
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == words
