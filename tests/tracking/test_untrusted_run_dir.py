"""A run folder from somebody else is data: no reference in it is resolved, nothing outside it is read or sent."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from omegaconf import OmegaConf

from support.commands import message, run_command, run_train
from support.shared import Finished
from train import evaluate, export, predict
from train.config import composition
from train.evaluation import report
from train.storage.atomic import UnsafePathError, open_inside
from train.tracking import uploader
from train.tracking.journal import Journal
from train.tracking.run_dir import RunDir, open_run_dir

SECRET = "s3cr3t-of-this-machine"
NAME = "INCEPTION_TEST_SECRET"


@dataclass
class Stranger:
    """A web server that records its requests and answers with an error."""

    address: str
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            recorder.requests.append(f"{self.requestline}\n{self.headers}")
            self.send_error(403)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder = Stranger(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield recorder
    server.shutdown()


@pytest.fixture
def received(finished: Finished, tmp_path: Path) -> RunDir:
    """A copy of the finished run, as if it had been sent by somebody else."""
    path = tmp_path / "received"
    shutil.copytree(finished.path, path, symlinks=True)
    folder = open_run_dir(path)
    rewrite(folder, f"sqlite:///{tmp_path / 'mlflow.db'}")
    return folder


def rewrite(folder: RunDir, uri: str, status: str = "finished") -> None:
    folder.write_yaml("config.yaml", folder.config() | {"tracking": folder.config()["tracking"] | {"uri": uri}})
    folder.write_json("summary.json", json.loads(folder.read_bytes("summary.json")) | {"status": status})


# -------------------------------------------------------------------------------------------------------- references


REFERENCES = [f"${{oc.env:{NAME}}}", f"${NAME}", f"${{{NAME}}}"]


@pytest.mark.parametrize(
    ("command", "reference"),
    [("resume", REFERENCES[0]), ("resume", REFERENCES[2]), *(("sync", reference) for reference in REFERENCES)],
)
def test_no_environment_variable_is_sent(command: str, reference: str, received: RunDir, stranger: Stranger):
    rewrite(received, f"{stranger.address}/{reference}", "interrupted")
    done = run_command("make", command, f"run={received.path}", env={NAME: SECRET})
    assert done.code == 2, done.out
    assert bool(stranger.requests) == (reference == REFERENCES[1])  # an unresolved reference is part of the path
    assert SECRET not in "".join(stranger.requests) + done.out + done.err
    for file in received.path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_omegaconf_and_the_shell_would_resolve_the_reference(monkeypatch: pytest.MonkeyPatch):
    """Negative control of the test above."""
    monkeypatch.setenv(NAME, SECRET)
    assert OmegaConf.create({"uri": REFERENCES[0]}).uri == SECRET
    assert [os.path.expandvars(text) for text in REFERENCES[1:]] == [SECRET, SECRET]


@pytest.mark.parametrize("key", ["data.name", "tracking.experiment", "model.blocks"])
def test_stored_reference_in_any_key_must_be_given_again(key: str, received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, "digits")
    config = received.config()
    group, _, name = key.partition(".")
    config[group][name] = [REFERENCES[0]] * 5 if name == "blocks" else REFERENCES[0]
    error = message(composition.from_stored, config, [])
    if key == "data.name":
        assert error.startswith("config.yaml is not the config of a run; restore the original file")
        return
    assert error == (
        f"{key} is stored as {REFERENCES[0]}, a reference that is resolved only on the command line or in conf/; "
        f"pass it again: '{key}={REFERENCES[0]}'"
    )


def test_typed_or_trusted_reference_is_resolved(received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, SECRET)
    config = received.config()
    config["tracking"]["experiment"] = REFERENCES[0]
    typed = composition.from_stored(config, [f"tracking.experiment={REFERENCES[0]}"])
    trusted = composition.from_stored(config, [], frozenset({("tracking.experiment", REFERENCES[0])}))
    assert typed.tracking.experiment == trusted.tracking.experiment == SECRET
    message(composition.from_stored, config, [], frozenset({("data.root", REFERENCES[0])}))


def test_stored_path_does_not_expand_the_home_directory(received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = received.config() | {"run_dir": "~/a"}
    assert composition.to_config(composition.from_stored(config, []), is_stored=True).run_dir == "~/a"
    assert (
        composition.to_config(composition.from_stored(config, ["run_dir='~/b'"]), is_stored=True).run_dir
        == "/home/somebody/b"
    )


def test_trial_resolves_only_references_that_were_typed(received: RunDir, tmp_path: Path, stranger: Stranger):
    config = received.config()
    config["tracking"]["uri"] = f"{stranger.address}/{REFERENCES[0]}"
    file = tmp_path / "sweep/trials/000.json"
    file.parent.mkdir(parents=True)
    trial = {"number": 0, "label": "x", "key": "x", "values": {}, "config": config, "point": 0}
    file.write_text(json.dumps(trial))
    done = run_train(f"sweep.trial={file}", env={NAME: SECRET})
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: tracking.uri is stored as http://127.0.0.1:")
    assert stranger.requests == []


# --------------------------------------------------------------------------------------------------------- addresses


def test_stored_tracking_uri_is_named_and_gets_no_credentials(received: RunDir, stranger: Stranger):
    rewrite(received, stranger.address)
    credentials = {"MLFLOW_TRACKING_TOKEN": SECRET}
    done = run_command("make", "sync", f"run={received.path}", env=credentials)
    assert done.code == 2
    assert f"uploading to {stranger.address}, the address in {received.path}/config.yaml; " in done.out
    assert "(MLFLOW_TRACKING_TOKEN not sent; pass the address to send them)" in done.out
    assert stranger.requests
    assert SECRET not in "".join(stranger.requests)
    run_command("make", "sync", f"run={received.path}", f"uri={stranger.address}", env=credentials)
    assert SECRET in "".join(stranger.requests)  # a typed URI gets them


def test_credentials_file_is_not_sent(received: RunDir, stranger: Stranger, tmp_path: Path):
    file = tmp_path / ".mlflow/credentials"
    file.parent.mkdir()
    file.write_text(f"[mlflow]\nmlflow_tracking_username = {SECRET}\nmlflow_tracking_password = {SECRET}\n")
    rewrite(received, stranger.address)
    home = {"HOME": str(tmp_path)}
    coded = "czNjcjN0"  # the beginning of the secret in base64
    run_command("make", "sync", f"run={received.path}", env=home)
    assert stranger.requests
    assert coded not in "".join(stranger.requests)
    run_command("make", "sync", f"run={received.path}", f"uri={stranger.address}", env=home)
    assert coded in "".join(stranger.requests)


# ------------------------------------------------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_text(SECRET)
    return path


def put_link(folder: RunDir, name: str, target: Path) -> None:
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(target)


@pytest.mark.parametrize("name", ["loss.png", "evaluation/test/confusion.png", "evaluation/test/scores.json"])
def test_link_out_of_the_run_dir_is_not_uploaded(name: str, received: RunDir, outside: Path, tmp_path: Path):
    put_link(received, name, outside)
    record = uploader.Uploader(received, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(uploader.RefusedError, match=f"{name} is a link to {outside}, outside the folder"):
        record.finish()
    client = MlflowClient(record.uri)
    [run] = client.search_runs([client.get_experiment_by_name("inception").experiment_id])
    assert run.info.status == "FINISHED"
    kept = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert {"summary.json", "predictions.csv"} <= {path.name for path in kept}
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in kept)


def test_mlflow_would_follow_the_link(outside: Path, tmp_path: Path):
    """Negative control of the test above."""
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.create_run(client.create_experiment("x", (tmp_path / "mlartifacts").as_uri())).info.run_id
    (tmp_path / "loss.png").symlink_to(outside)
    client.log_artifact(run, str(tmp_path / "loss.png"))
    [kept] = (tmp_path / "mlartifacts").rglob("loss.png")
    assert kept.read_text() == SECRET


READERS = {
    "run.json": lambda folder: open_run_dir(folder.path),
    "loss.png": lambda folder: report.report_context(folder, {}, []),
    "config.yaml": lambda folder: folder.config(),
    "summary.json": lambda folder: folder.status(),
    "metrics.jsonl": lambda folder: report.write_report(folder, {}),
    "best/model.json": lambda folder: predict.load_network(folder.path, "keras", compiled=False),
    "best/model.keras": lambda folder: predict.load_network(folder.path, "keras", compiled=False),
    "train.log": lambda folder: evaluate.evaluate([f"run={folder.path}"]),
    "evaluation": lambda folder: evaluate.evaluate([f"run={folder.path}"]),
    "uploader.log": lambda folder: folder.inside("uploader.log"),
}


@pytest.mark.parametrize("name", READERS)
def test_link_out_of_the_run_dir_is_not_read(name: str, received: RunDir, outside: Path, tmp_path: Path):
    target = outside
    if name == "evaluation":
        shutil.rmtree(received.path / name)
        target = tmp_path / "elsewhere"
        target.mkdir()
    put_link(received, name, target)
    with pytest.raises(UnsafePathError, match=rf"is a link to {target}\S*, outside the folder"):
        READERS[name](received)
    assert outside.read_text() == SECRET
    assert name != "evaluation" or list(target.iterdir()) == []


def test_exports_are_not_written_through_a_link(received: RunDir, tmp_path: Path):
    (tmp_path / "elsewhere/keras").mkdir(parents=True)
    put_link(received, "export", tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError):
        export.export_format(received, None, "keras", export.Export(), None)  # type: ignore[arg-type]
    assert (tmp_path / "elsewhere/keras").exists()


def test_links_within_the_run_dir_are_followed(received: RunDir):
    put_link(received, "loss.png", received.path / "accuracy.png")
    assert received.read_bytes("loss.png") == (received.path / "accuracy.png").read_bytes()
    assert received.model_info()["classes"]  # best is a link to one of two folders


def test_only_regular_files_are_opened(tmp_path: Path):
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert message(open_inside, tmp_path, name) == f"{tmp_path / name} is not a regular file; replace it with one"


def test_journal_is_not_written_through_a_link(tmp_path: Path, outside: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(outside)
    with pytest.raises(UnsafePathError):
        Journal(tmp_path / "run/metrics.jsonl").append(0, 1, {"a": 1.0})
    assert outside.read_text() == SECRET


def test_invalid_yaml_is_reported_in_one_line(tmp_path: Path):
    folder = RunDir(tmp_path, "x")
    for text in ("- a\n- b\n", "a: [", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "config.yaml").write_text(text)
        expected = f"{tmp_path}/config.yaml is not the config of a run; restore the original file"
        assert message(folder.config) == expected
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.system ['true']")
