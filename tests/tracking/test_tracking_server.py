"""A real tracking server: resumed runs, permanent rejections, and uploads completed after an outage."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run

from support.commands import run_command, run_train
from support.shared import TrackingServer, once
from train.tracking import mlflow_store, uploader
from train.tracking.journal import Journal
from train.tracking.run_dir import RunDir, create_run_dir

TINY = ("model=vgg16", "model.width=0.1", "epochs=2", "steps_per_epoch=4", "batch_size=8", "tracking.every_steps=1")


@dataclass
class OnServer:
    """The contents of an experiment with one run on the server."""

    client: MlflowClient
    run: Run
    models: list[LoggedModel]

    def history(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(self.run.info.run_id, name)]

    @property
    def artifacts(self) -> set[str]:
        return {artifact.path for artifact in self.client.list_artifacts(self.run.info.run_id)}


def recorded(server: TrackingServer, experiment: str) -> OnServer:
    client = MlflowClient(server.uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    [run] = client.search_runs([number])
    return OnServer(client, run, list(client.search_logged_models([number])))


def ended_run(path: Path, experiment: str, **content: object) -> RunDir:
    """A finished run of one step. content: of run.json."""
    folder = create_run_dir(str(path / "run"), path, "x", latest=False)
    identity = {"format_version": 2, "run_id": folder.run_id, "experiment": experiment, "name": "n", "log_model": False}
    identity["time"] = time.time()
    tags = {"data": "digits", "run_dir": str(folder.path), "host": socket.gethostname()}
    folder.write_json("run.json", identity | {"tags": tags, "requirements": []} | content)
    Journal(folder.journal).append(0, 1, {"train/loss": 3.0})
    folder.write_json("summary.json", {"status": "finished", "time": time.time(), "steps": 1})
    return folder


# ------------------------------------------------------------------------------------------- killed, and gone on with


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory, tracking_server: TrackingServer) -> Path:
    """A run that was killed in its second epoch, resumed by `make resume`, and uploaded once more."""

    def make(place: Path) -> Path:
        own = [f"run_dir={place / 'run'}", f"tracking.uri={tracking_server.uri}", "tracking.experiment=resumed"]
        assert run_train(*TINY, *own, env={"INCEPTION_FAULT": "step:6"}).code == -9
        done = run_command("make", "resume", f"run={place / 'run'}")
        assert done.code == 0, done.err
        assert f"uploading to {tracking_server.uri}, the address in {place / 'run'}/config.yaml; " in done.out
        done = run_command("make", "sync", f"run={place / 'run'}")
        assert done.code == 0, done.err
        return place / "run"

    return once(tmp_path_factory, "resumed", make)


def test_resumed_run_is_a_single_run_on_the_server(resumed: Path, tracking_server: TrackingServer):
    on_server = recorded(tracking_server, "resumed")
    assert (on_server.run.info.status, on_server.run.data.tags["attempts"]) == ("FINISHED", "2")
    assert on_server.run.data.params["batch_size"] == "8"
    points: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (resumed / "metrics.jsonl").read_text().splitlines()):
        for name, value in line["values"].items():
            points.setdefault(name, []).append((line["step"], value))
    assert [step for step, _ in points["train/loss"]] == list(range(1, 9))
    for name, expected in points.items():
        assert on_server.history(name) == expected, name
    assert {"config.yaml", "summary.json", "metrics.jsonl", "train.log"} <= on_server.artifacts


def test_model_of_a_resumed_run_is_registered_once(resumed: Path, tracking_server: TrackingServer):
    on_server = recorded(tracking_server, "resumed")
    [model] = on_server.models
    assert model.status == "READY"
    assert [output.model_id for output in on_server.run.outputs.model_outputs] == [model.model_id]
    [version] = on_server.client.search_model_versions("name = 'resumed-digits'")
    assert (version.source, version.run_id) == (f"models:/{model.model_id}", on_server.run.info.run_id)
    assert (
        on_server.client.get_model_version_by_alias("resumed-digits", mlflow_store.CHAMPION).version == version.version
    )
    model_info = json.loads((resumed / "best/model.json").read_text())
    assert version.tags == {
        "validation_accuracy": str(model_info["validation"]["accuracy"]), "data": model_info["data_fingerprint"],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- outages


def test_interrupted_upload_is_completed_in_place(resumed: Path, tracking_server: TrackingServer, tmp_path: Path):
    """A file blocks the folder for models on the server, so that it answers with status 500."""
    client = MlflowClient(tracking_server.uri)
    models = tracking_server.artifacts / client.create_experiment("blocked") / "models"
    models.parent.mkdir(parents=True)
    models.touch()
    folder = ended_run(tmp_path, "blocked", log_model=True)
    best = (resumed / "best").resolve()
    folder.best.symlink_to(best.name)
    run_command("cp", "-a", str(best), str(folder.path))

    record = uploader.Uploader(folder, tracking_server.uri)
    for _ in range(2):
        with pytest.raises(Exception, match=r"500|INTERNAL_ERROR"):
            record.finish()
    assert record.refused == {}
    assert (
        recorded(tracking_server, "blocked").run.info.status == "FINISHED"
    )  # the end of the run is recorded all the same
    models.unlink()
    record.finish()
    on_server = recorded(tracking_server, "blocked")
    [model] = on_server.models
    assert [path.name for path in models.iterdir()] == [model.model_id]
    assert len(client.search_model_versions("name = 'blocked-digits'")) == 1


@pytest.mark.parametrize(
    ("failures", "attempts", "is_sent"),
    [
        ([requests.ConnectionError()], 2, True),
        ([requests.ConnectionError(), requests.ConnectionError()], 2, False),
        ([requests.HTTPError("500")], 1, False),
    ],
    ids=["cut once", "cut twice", "another failure"],
)
def test_end_is_sent_again_once_if_the_connection_was_cut(
    failures: list[Exception], attempts: int, is_sent: bool, tmp_path: Path
):
    calls: list[int] = []

    def send() -> None:
        calls.append(1)
        if failures:
            raise failures.pop(0)

    record = uploader.Uploader(ended_run(tmp_path, "cut"), "http://127.0.0.1:9")
    with nullcontext() if is_sent else pytest.raises(requests.RequestException):
        record._send_end(send)
    assert len(calls) == attempts


# ---------------------------------------------------------------------------------------------------------- refusals


def test_permanent_rejection_is_reported_once_and_blocks_nothing_else(
    tracking_server: TrackingServer, tmp_path: Path, capfd: pytest.CaptureFixture
):
    """MLflow does not allow a parameter to change; here it already has another value."""
    folder = ended_run(tmp_path, "refused")
    folder.write_text("train.log", "a line\n")
    store = mlflow_store.Store(tracking_server.uri, folder.identity())
    store.client.log_param(store.mlflow_id, "epochs", "99")
    folder.write_json("params.json", {"epochs": 2})

    process = uploader.start(folder, tracking_server.uri)
    assert process is not None
    uploader.wait(process, folder, tracking_server.uri, 120)
    assert process.returncode == uploader.REFUSED_EXIT_CODE
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: not recorded in MLflow: parameters: INVALID_PARAMETER_VALUE: ")
    assert second.startswith(f"the upload to MLflow is not complete; finish it with: make sync run={folder.path} ")
    refusal = first.removeprefix("warning: ")
    assert (folder.path / uploader.REFUSALS_FILE).read_text() == f"{refusal}\n"
    assert (folder.path / "train.log").read_text().count(refusal) == 1
    assert (folder.path / "uploader.log").read_text().count(refusal) == 1
    on_server = recorded(tracking_server, "refused")
    assert (on_server.run.info.status, on_server.history("train/loss")) == ("FINISHED", [(1, 3.0)])
    assert "summary.json" in on_server.artifacts

    done = run_command("make", "sync", f"run={folder.path}", f"uri={tracking_server.uri}")
    assert (done.code, done.err.splitlines()[0]) == (2, f"error: {refusal}")
    store.client.set_tag(store.mlflow_id, "unrelated", "x")
    folder.write_json("params.json", {"epochs": 99})
    done = run_command("make", "sync", f"run={folder.path}", f"uri={tracking_server.uri}")
    assert (done.code, done.err) == (0, "")
    assert uploader.read_refusals(folder) == []


def test_server_that_rejects_the_run_is_asked_once(tracking_server: TrackingServer, tmp_path: Path):
    """MLflow does not allow the name of the experiment."""
    folder = ended_run(tmp_path, "")
    record = uploader.Uploader(folder, tracking_server.uri)
    assert uploader.upload_until_finished(record) == uploader.REFUSED_EXIT_CODE
    [refusal] = uploader.read_refusals(folder)
    assert refusal.startswith("not recorded in MLflow: run: ")


def test_database_without_tables_is_not_an_outage(tmp_path: Path):
    """MLflow creates the tables once per process; if they are missing, retrying does not help."""
    folder, path = ended_run(tmp_path, "lost"), tmp_path / "mlflow.db"
    record = uploader.Uploader(folder, f"sqlite:///{path}")
    record.sync()
    path.write_bytes(b"")
    with folder.journal.open("a") as journal:
        journal.write('{"epoch": 0, "step": 2, "time": 1.0, "values": {"train/loss": 2.0}}\n')
    with pytest.raises(uploader.RefusedError, match=r"metrics: .*no such table"):
        record.finish()


def refused_by(cause: Callable[[], object]) -> bool:
    with pytest.raises(Exception) as caught:
        cause()
    return mlflow_store.is_permanent_error(caught.value)


def test_outages_are_not_treated_as_rejections(tracking_server: TrackingServer, tmp_path: Path):
    client = MlflowClient(tracking_server.uri)
    assert refused_by(lambda: client.get_run("0" * 32))
    assert refused_by(lambda: client.log_param("0" * 32, "a", "b"))
    assert not refused_by(lambda: MlflowClient("http://127.0.0.1:9").get_run("0" * 32))
    assert not refused_by(lambda: sqlite3.connect(tmp_path).execute("SELECT 1"))
    (tmp_path / "no.db").write_text("a text that is longer than the header of a database")
    assert refused_by(lambda: sqlite3.connect(tmp_path / "no.db").execute("SELECT * FROM runs"))
    assert not refused_by((tmp_path / "gone").read_text)


def test_trainer_does_not_restart_a_rejected_uploader(
    tracking_server: TrackingServer, tmp_path: Path, capfd: pytest.CaptureFixture
):
    folder = ended_run(tmp_path, "unused")
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({uploader.REFUSED_EXIT_CODE})"])
    process.wait()
    uploader.wait(process, folder, tracking_server.uri, 60)
    assert not (folder.path / "uploader.log").exists()
    assert "is not complete; finish it with: make sync" in capfd.readouterr().err
