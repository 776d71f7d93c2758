"""A real tracking server: what is sent once, what is refused for good, what is completed after an outage."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
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
    """What the server has of an experiment with one run."""

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


def ended_run(place: Path, experiment: str, **content: object) -> RunDir:
    """The folder of a finished run that has trained for one step. content: of run.json."""
    folder = create_run_dir(str(place / "run"), place, "x", latest=False)
    identity = {"run_id": folder.run_id, "experiment": experiment, "name": "n", "time": time.time(), "log_model": False}
    tags = {"data": "digits", "run_dir": str(folder.path), "host": socket.gethostname()}
    folder.write_json("run.json", identity | {"tags": tags, "requirements": []} | content)
    Journal(folder.journal).append(0, 1, {"train/loss": 3.0})
    folder.write_json("summary.json", {"status": "finished", "time": time.time(), "steps": 1})
    return folder


# ------------------------------------------------------------------------------------------- killed, and gone on with


@pytest.fixture(scope="session")
def resumed(tmp_path_factory: pytest.TempPathFactory, tracking_server: TrackingServer) -> Path:
    """A run that was killed in its second epoch, gone on with by `make resume`, and completed once more."""

    def make(place: Path) -> Path:
        own = [f"run_dir={place / 'run'}", f"tracking.uri={tracking_server.uri}", "tracking.experiment=resumed"]
        assert run_train(*TINY, *own, env={"INCEPTION_FAULT": "step:6"}).code == -9
        done = run_command("make", "resume", f"run={place / 'run'}")
        assert done.code == 0, done.err
        assert f"the record goes to {tracking_server.uri}, as {place / 'run'}/config.yaml says" in done.out
        done = run_command("make", "sync", f"run={place / 'run'}")
        assert done.code == 0, done.err
        return place / "run"

    return once(tmp_path_factory, "resumed", make)


def test_a_resumed_run_is_one_run_on_the_server(resumed: Path, tracking_server: TrackingServer):
    found = recorded(tracking_server, "resumed")
    assert (found.run.info.status, found.run.data.tags["attempts"]) == ("FINISHED", "2")
    assert found.run.data.params["batch_size"] == "8"
    points: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (resumed / "metrics.jsonl").read_text().splitlines()):
        for name, value in line["values"].items():
            points.setdefault(name, []).append((line["step"], value))
    assert [step for step, _ in points["train/loss"]] == list(range(1, 9))
    for name, expected in points.items():
        assert found.history(name) == expected, name
    assert {"config.yaml", "summary.json", "metrics.jsonl", "train.log"} <= found.artifacts


def test_its_model_is_registered_once(resumed: Path, tracking_server: TrackingServer):
    found = recorded(tracking_server, "resumed")
    [model] = found.models
    assert model.status == "READY"
    assert [output.model_id for output in found.run.outputs.model_outputs] == [model.model_id]
    [version] = found.client.search_model_versions("name = 'resumed-digits'")
    assert (version.source, version.run_id) == (f"models:/{model.model_id}", found.run.info.run_id)
    assert found.client.get_model_version_by_alias("resumed-digits", mlflow_store.CHAMPION).version == version.version
    card = json.loads((resumed / "best/model.json").read_text())
    assert version.tags == {
        "validation_accuracy": str(card["validation"]["accuracy"]), "data": card["data_fingerprint"],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- outages


def test_an_upload_that_was_cut_off_is_completed_in_its_place(
    resumed: Path, tracking_server: TrackingServer, tmp_path: Path
):
    """Where the server keeps models of the experiment a file is in the way, so that it answers with status 500."""
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
    assert recorded(tracking_server, "blocked").run.info.status == "FINISHED"  # the run's end is told all the same
    models.unlink()
    record.finish()
    found = recorded(tracking_server, "blocked")
    [model] = found.models
    assert [path.name for path in models.iterdir()] == [model.model_id]
    assert len(client.search_model_versions("name = 'blocked-digits'")) == 1


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_the_server_refuses_for_good_is_told_once_and_keeps_nothing_else_back(
    tracking_server: TrackingServer, tmp_path: Path, capfd: pytest.CaptureFixture
):
    """A parameter can't be changed in MLflow: here somebody has written another one."""
    folder = ended_run(tmp_path, "refused")
    folder.write_text("train.log", "a line\n")
    place = mlflow_store.Store(tracking_server.uri, folder.identity())
    place.client.log_param(place.mlflow_id, "epochs", "99")
    folder.write_json("params.json", {"epochs": 2})

    process = uploader.start(folder, tracking_server.uri)
    assert process is not None
    uploader.wait(process, folder, tracking_server.uri, 120)
    assert process.returncode == uploader.REFUSED_EXIT_CODE
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: not recorded in MLflow: parameters: INVALID_PARAMETER_VALUE: ")
    assert second.startswith(f"the MLflow record is not complete: make sync run={folder.path} ")
    refusal = first.removeprefix("warning: ")
    assert (folder.path / uploader.REFUSALS_FILE).read_text() == f"{refusal}\n"
    assert (folder.path / "train.log").read_text().count(refusal) == 1
    assert (folder.path / "uploader.log").read_text().count(refusal) == 1
    found = recorded(tracking_server, "refused")
    assert (found.run.info.status, found.history("train/loss")) == ("FINISHED", [(1, 3.0)])
    assert "summary.json" in found.artifacts

    done = run_command("make", "sync", f"run={folder.path}", f"uri={tracking_server.uri}")
    assert (done.code, done.err.splitlines()[0]) == (2, f"error: {refusal}")
    place.client.set_tag(place.mlflow_id, "unrelated", "x")
    folder.write_json("params.json", {"epochs": 99})
    done = run_command("make", "sync", f"run={folder.path}", f"uri={tracking_server.uri}")
    assert (done.code, done.err) == (0, "")
    assert uploader.read_refusals(folder) == []


def test_a_server_that_does_not_take_the_run_is_asked_once(tracking_server: TrackingServer, tmp_path: Path):
    """The name of an experiment that MLflow does not allow."""
    folder = ended_run(tmp_path, "")
    record = uploader.Uploader(folder, tracking_server.uri)
    assert uploader.upload_until_finished(record) == uploader.REFUSED_EXIT_CODE
    [refusal] = uploader.read_refusals(folder)
    assert refusal.startswith("not recorded in MLflow: run: ")


def test_a_database_without_tables_is_no_outage(tmp_path: Path):
    """MLflow makes the tables once in a process; where they are gone, asking again is of no use."""
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


def test_outages_are_not_taken_for_refusals(tracking_server: TrackingServer, tmp_path: Path):
    client = MlflowClient(tracking_server.uri)
    assert refused_by(lambda: client.get_run("0" * 32))
    assert refused_by(lambda: client.log_param("0" * 32, "a", "b"))
    assert not refused_by(lambda: MlflowClient("http://127.0.0.1:9").get_run("0" * 32))
    assert not refused_by(lambda: sqlite3.connect(tmp_path).execute("SELECT 1"))
    (tmp_path / "no.db").write_text("a text that is longer than the header of a database")
    assert refused_by(lambda: sqlite3.connect(tmp_path / "no.db").execute("SELECT * FROM runs"))
    assert not refused_by((tmp_path / "gone").read_text)


def test_the_trainer_does_not_start_an_uploader_again_that_was_refused(
    tracking_server: TrackingServer, tmp_path: Path, capfd: pytest.CaptureFixture
):
    folder = ended_run(tmp_path, "unused")
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({uploader.REFUSED_EXIT_CODE})"])
    process.wait()
    uploader.wait(process, folder, tracking_server.uri, 60)
    assert not (folder.path / "uploader.log").exists()
    assert "is not complete: make sync" in capfd.readouterr().err
