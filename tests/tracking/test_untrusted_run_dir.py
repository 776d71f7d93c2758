"""A folder that somebody else has made is data: nothing in it is looked up, nothing outside it is read or sent."""

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
    """A web server that notes what it is asked, and refuses."""

    address: str
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.requests.append(f"{self.requestline}\n{self.headers}")
            self.send_error(403)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Stranger(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


@pytest.fixture
def received(finished: Finished, tmp_path: Path) -> RunDir:
    """A copy of the finished run, as it was sent; where it says that its record goes, nobody has to be asked."""
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
def test_no_variable_of_this_machine_is_sent(command: str, reference: str, received: RunDir, stranger: Stranger):
    rewrite(received, f"{stranger.address}/{reference}", "interrupted")
    done = run_command("make", command, f"run={received.path}", env={NAME: SECRET})
    assert done.code == 2, done.out
    assert bool(stranger.requests) == (reference == REFERENCES[1])  # a dollar and a name are a path like any other
    assert SECRET not in "".join(stranger.requests) + done.out + done.err
    for file in received.path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_omegaconf_and_the_shell_would_look_it_up(monkeypatch: pytest.MonkeyPatch):
    """Control of the test above."""
    monkeypatch.setenv(NAME, SECRET)
    assert OmegaConf.create({"uri": REFERENCES[0]}).uri == SECRET
    assert [os.path.expandvars(text) for text in REFERENCES[1:]] == [SECRET, SECRET]


@pytest.mark.parametrize("key", ["data.name", "tracking.experiment", "model.blocks"])
def test_a_reference_in_any_key_has_to_be_typed(key: str, received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, "digits")
    content = received.config()
    group, _, name = key.partition(".")
    content[group][name] = [REFERENCES[0]] * 5 if name == "blocks" else REFERENCES[0]
    told = message(composition.from_stored, content, [])
    if key == "data.name":
        assert told.startswith("config.yaml does not hold a config of this program")
        return
    assert told == (
        f"{key} is stored as {REFERENCES[0]}, which is looked up only where it is typed or stands in conf/; "
        f"type a value, e.g. '{key}={REFERENCES[0]}'"
    )


def test_what_is_typed_or_trusted_is_looked_up(received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, SECRET)
    content = received.config()
    content["tracking"]["experiment"] = REFERENCES[0]
    typed = composition.from_stored(content, [f"tracking.experiment={REFERENCES[0]}"])
    trusted = composition.from_stored(content, [], frozenset({("tracking.experiment", REFERENCES[0])}))
    assert typed.tracking.experiment == trusted.tracking.experiment == SECRET
    message(composition.from_stored, content, [], frozenset({("data.root", REFERENCES[0])}))


def test_home_is_not_put_into_a_stored_path(received: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    content = received.config() | {"run_dir": "~/a"}
    assert composition.to_config(composition.from_stored(content, []), is_stored=True).run_dir == "~/a"
    assert (
        composition.to_config(composition.from_stored(content, ["run_dir='~/b'"]), is_stored=True).run_dir
        == "/home/somebody/b"
    )


def test_a_trial_refers_to_nothing_that_was_not_typed(received: RunDir, tmp_path: Path, stranger: Stranger):
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


def test_an_address_in_a_folder_is_named_and_gets_no_credentials(received: RunDir, stranger: Stranger):
    rewrite(received, stranger.address)
    credentials = {"MLFLOW_TRACKING_TOKEN": SECRET}
    done = run_command("make", "sync", f"run={received.path}", env=credentials)
    assert done.code == 2
    assert f"the record goes to {stranger.address}, as {received.path}/config.yaml says" in done.out
    assert "(MLFLOW_TRACKING_TOKEN not sent; type the address to send them)" in done.out
    assert stranger.requests
    assert SECRET not in "".join(stranger.requests)
    run_command("make", "sync", f"run={received.path}", f"uri={stranger.address}", env=credentials)
    assert SECRET in "".join(stranger.requests)  # an address that was typed gets them


def test_the_file_with_credentials_is_not_sent_either(received: RunDir, stranger: Stranger, tmp_path: Path):
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
def test_a_link_out_of_the_folder_is_not_uploaded(name: str, received: RunDir, outside: Path, tmp_path: Path):
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
    """Control of the test above."""
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
def test_a_link_out_of_the_folder_is_not_read(name: str, received: RunDir, outside: Path, tmp_path: Path):
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


def test_exports_are_written_inside(received: RunDir, tmp_path: Path):
    (tmp_path / "elsewhere/keras").mkdir(parents=True)
    put_link(received, "export", tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError):
        export.export_format(received, None, "keras", export.Export(), None)  # type: ignore[arg-type]
    assert (tmp_path / "elsewhere/keras").exists()


def test_links_within_the_folder_are_fine(received: RunDir):
    put_link(received, "loss.png", received.path / "accuracy.png")
    assert received.read_bytes("loss.png") == (received.path / "accuracy.png").read_bytes()
    assert received.model_info()["classes"]  # best is a link to one of two folders


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert message(open_inside, tmp_path, name) == f"{tmp_path / name} is not a regular file; replace it by one"


def test_a_journal_is_not_written_through_a_link(tmp_path: Path, outside: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(outside)
    with pytest.raises(UnsafePathError):
        Journal(tmp_path / "run/metrics.jsonl").append(0, 1, {"a": 1.0})
    assert outside.read_text() == SECRET


def test_yaml_that_is_no_config_is_one_line(tmp_path: Path):
    folder = RunDir(tmp_path, "x")
    for text in ("- a\n- b\n", "a: [", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "config.yaml").write_text(text)
        told = f"{tmp_path}/config.yaml does not hold a config; put back the file of the run"
        assert message(folder.config) == told
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.system ['true']")
