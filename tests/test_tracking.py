"""The record: the journal on disk is the truth, MLflow follows it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SECRET, Finished, run_command, run_train
from mlflow import MlflowClient
from mlflow.entities import Run

from train.tracking import store, uploader
from train.tracking.folder import RunFolder, create, open_folder, read_journal


def the_run(uri: str, experiment: str = "inception") -> tuple[MlflowClient, Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    [run] = client.search_runs([found.experiment_id])
    return client, run


def history(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_parameters_tags_and_status(finished: Finished):
    _, run = the_run(finished.uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "vgg16_inception seed 0"
    assert run.data.params["model.width"] == "0.125"
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    assert run.data.params["model.blocks"] == "['conv_bn', 'conv_bn', 'inception_v1', 'conv_bn', 'inception_v3']"
    assert len(run.data.params) == 47
    summary = finished.summary
    for name in ("run_id", "config_hash", "data_fingerprint", "weights_sha256", "status"):
        assert run.data.tags[name] == summary[name]
    assert {"git.commit", "git.dirty", "host", "version.tensorflow", "version.keras"} <= set(run.data.tags)


def test_metrics_have_their_true_steps(finished: Finished):
    client, run = the_run(finished.uri)
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in finished.journal:
        for name, value in line["values"].items():
            expected.setdefault(name, []).append((line["step"], value))
    assert {"train/main_accuracy", "train/aux_loss", "validation/main_accuracy", "learning_rate"} <= set(expected)
    assert {"images_per_second", "data_wait_fraction", "test/accuracy"} <= set(expected)
    assert set(run.data.metrics) == set(expected)
    for name, points in expected.items():
        assert history(client, run, name) == points, name


def test_the_data_set_has_our_digest(finished: Finished):
    _, run = the_run(finished.uri)
    [used] = run.inputs.dataset_inputs
    assert used.dataset.name == "digits"
    assert used.dataset.digest == finished.summary["data_fingerprint"][:32]
    assert json.loads(used.dataset.profile)["train"] == 1281


def test_artifacts_and_the_inference_model(finished: Finished):
    client, run = the_run(finished.uri)
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names >= {"config.yaml", "model_summary.txt", "summary.json", "train.log", "input_example.npy"}
    import mlflow

    mlflow.set_tracking_uri(finished.uri)
    [output] = client.get_run(run.info.run_id).outputs.model_outputs
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 32, 32, 1)
    assert model.metadata.signature.inputs.inputs[0].type == np.uint8
    example = np.load(finished.path / "input_example.npy")
    assert np.asarray(model.predict(example)).shape == (1, 10)


def test_no_secret_in_the_store(finished: Finished):
    _, run = the_run(finished.uri)
    assert SECRET not in str(run.data.params) + str(run.data.tags)
    assert run.data.params["tracking.uri"] == "${oc.env:INCEPTION_TEST_STORE}"


def test_sync_completes_a_record_elsewhere_and_adds_nothing_twice(finished: Finished, tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    for _ in range(2):
        uploader.Record(open_folder(finished.path), uri).finish()
    client, run = the_run(uri)
    first_client, first = the_run(finished.uri)
    assert run.info.status == "FINISHED"
    assert run.data.tags["run_id"] == first.data.tags["run_id"]
    for name in first.data.metrics:
        assert history(client, run, name) == history(first_client, first, name), name


def test_a_line_still_being_written_is_left_for_later(tmp_path: Path):
    folder = RunFolder(tmp_path, "x")
    folder.record(0, 1, {"a": 1.0})
    with folder.journal.open("a") as file:
        file.write('{"epoch": 0, "step": 2, "ti')
    [(line, offset)] = read_journal(folder.journal)
    assert (line["step"], line["values"]) == (1, {"a": 1.0})
    assert list(read_journal(folder.journal, offset)) == []


def test_a_line_that_a_full_disk_cut_off_costs_only_itself(tmp_path: Path):
    folder = RunFolder(tmp_path, "x")
    folder.record(0, 1, {"a": 1.0})
    with folder.journal.open("a") as file:
        file.write('{"epoch": 0, "step": 2, "ti')
    folder.record(0, 3, {"a": 3.0})
    assert [line.get("step") for line, _ in read_journal(folder.journal)] == [1, None, 3]


def test_a_model_that_cannot_be_kept_does_not_hide_how_the_run_ended(tmp_path: Path):
    folder = begun(tmp_path, log_model=True)
    folder.best.mkdir()
    (folder.best / "model.keras").write_text("no model")
    folder.write_json("summary.json", {"status": "interrupted", "time": time.time()})
    record = uploader.Record(folder, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ValueError):
        record.finish()
    assert the_run(record.uri)[1].info.status == "KILLED"


def test_a_held_run_is_refused_and_its_own_faults_are_not_renamed(tmp_path: Path):
    folder = create(str(tmp_path / "run"), tmp_path, "x", latest=False)
    with folder.held():
        assert folder.alive()
        with pytest.raises(ValueError, match="run_dir must not be in use"), folder.held():
            pass
    assert not folder.alive()
    with pytest.raises(BlockingIOError), folder.held():
        raise BlockingIOError
    folder.write_json("run.json", {})
    with pytest.raises(ValueError, match="which holds one"), folder.held():
        pass


def begun(tmp_path: Path, log_model: bool = False) -> RunFolder:
    folder = create(str(tmp_path / "run"), tmp_path, "x", latest=False)
    identity = {"run_id": folder.run_id, "experiment": "inception", "name": "n", "time": time.time(), "tags": {}}
    folder.write_json("run.json", identity | {"log_model": log_model, "requirements": []})
    return folder


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1] + "/.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_whose_process_is_killed_is_marked(tmp_path: Path):
    """The uploader outlives the trainer, sees its lock go, and says so."""
    folder, uri = begun(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder.path], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    folder.record(0, 5, {"train/loss": 2.0})
    recorder = uploader.start(folder, uri)
    assert recorder is not None
    deadline = time.monotonic() + 60
    while not _logged(uri) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert the_run(uri)[1].info.status == "RUNNING"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert recorder.wait(30) == 0
    client, run = the_run(uri)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "the training process is gone")
    assert history(client, run, "train/loss") == [(5, 2.0)]


def _logged(uri: str) -> bool:
    try:
        return bool(the_run(uri)[1].data.metrics)
    except (AssertionError, ValueError):
        return False


def test_a_store_that_is_away_is_asked_again(tmp_path: Path):
    """First its folder is in the way, then it is gone: the record is completed and holds everything once."""
    folder = begun(tmp_path)
    folder.record(0, 1, {"train/loss": 1.0})
    folder.write_json("summary.json", {"status": "failed", "failure": "x", "time": time.time()})
    blocker = tmp_path / "store"
    blocker.touch()
    rec = uploader.Record(folder, f"sqlite:///{blocker / 'mlflow.db'}")
    with pytest.raises(OSError, match=r"exists|directory"):
        rec.advance()
    blocker.unlink()
    assert uploader.follow(rec) == 0
    client, run = the_run(rec.uri)
    assert run.info.status == "FAILED"
    assert history(client, run, "train/loss") == [(1, 1.0)]


def test_several_runs_may_start_at_once_on_a_store_that_is_not_there_yet(tmp_path: Path):
    folders = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        folder = begun(tmp_path / str(number))
        folder.write_json("summary.json", {"status": "finished", "time": time.time()})
        folders.append(folder)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    codes = [process.wait(90) for process in [uploader.start(folder, uri) for folder in folders] if process]
    assert codes == [0, 0, 0]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("inception")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["run_id"] for run in runs} == {folder.run_id for folder in folders}


def test_credentials_stay_out_of_what_mlflow_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    assert store.use_credentials("http://me:p%40ss@host:5000/x") == "http://host:5000/x"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"


def test_the_uploaders_log_shows_no_secret(tmp_path: Path):
    log = uploader.Scrubbed(tmp_path / "log", "postgresql://me:hunter2@host/db?sslkey=abc")
    print("could not reach postgresql://me:hunter2@host/db?sslkey=abc with hunter2, me at home", file=log)
    text = (tmp_path / "log").read_text()
    assert "hunter2" not in text
    assert "abc" not in text
    assert "at home" in text


def test_sync_finds_the_store_that_the_run_was_started_with(finished: Finished, tmp_path: Path):
    from train.tracking.sync import stored_uri

    folder = RunFolder(tmp_path, "x")
    folder.write_yaml("config.yaml", {"tracking": {"uri": "sqlite:////place/mlflow.db"}})
    assert stored_uri(folder) == "sqlite:////place/mlflow.db"
    folder.write_yaml("config.yaml", {"tracking": {"uri": None}})
    assert stored_uri(folder) == store.default_uri(ROOT)
    with pytest.raises(ValueError, match=r"uri must be given, since the run's was \$\{oc.env:INCEPTION_TEST_STORE\}"):
        stored_uri(open_folder(finished.path))


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="run must be the folder of a run, got"):
        open_folder(tmp_path)
    done = run_command("make", "sync", f"run={tmp_path}")
    assert done.code == 2
    assert (
        done.err.splitlines()[0] == f"error: run must be the folder of a run, got {tmp_path}; use e.g. run=runs/latest"
    )


@contextmanager
def serving(uri: str) -> Iterator[int]:
    """`make ui` over a store, until it answers; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "train.tracking.ui", f"port={port}", f"uri={uri}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        deadline = time.monotonic() + 60
        while "<title>MLflow</title>" not in _page(port):
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def _page(port: int) -> str:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
    except OSError:
        return ""


def test_the_ui_answers_on_loopback(finished: Finished):
    """A real server over the finished run's store; a taken port is one line."""
    with serving(finished.uri) as port:
        taken = run_command(sys.executable, "-m", "train.tracking.ui", f"port={port}")
        assert (taken.code, taken.err) == (2, f"error: port must be free, got {port}; use e.g. port={port + 1}\n")


@pytest.mark.slow
def test_a_server_gets_the_whole_record(tmp_path: Path):
    """Over HTTP, with a typed password that is then nowhere: in no file of the run, of the server, of its database."""
    with serving(f"sqlite:///{tmp_path / 'server/mlflow.db'}") as port:
        done = run_train(
            "model.width=0.1", "epochs=1", "steps_per_epoch=5", f"run_dir={tmp_path / 'run'}",
            f"tracking.uri=http://me:hunter2@127.0.0.1:{port}",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert done.err == ""
        client, run = the_run(f"http://127.0.0.1:{port}")
        assert run.info.status == "FINISHED"
        assert len(client.get_run(run.info.run_id).outputs.model_outputs) == 1
        assert "summary.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert history(client, run, "test/accuracy")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
