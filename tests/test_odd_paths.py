"""The project and its data in folders whose names are special in URIs, SQL, the shell and make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from support.commands import FROM_MAKE, ROOT, Done, run_command, run_train
from support.waiting import answers, free_port, wait_for
from train.tracking.mlflow_store import connect, database_path, sqlite_uri

NAME = "a b%20c?d#é'\""
TINY = ("model=vgg16", "model.width=0.1", "epochs=1", "steps_per_epoch=4", "batch_size=8", "tracking.wait_seconds=600")


@pytest.mark.parametrize("path", ["/x/mlflow.db", f"/{NAME}/mlflow.db", "/50%/a%3Fb?c/m.db"])
def test_file_uri_leads_back_to_its_file(path: str):
    from sqlalchemy.engine import make_url

    assert database_path(sqlite_uri(Path(path))) == Path(path)
    assert make_url(sqlite_uri(Path(path))).database == path


@pytest.mark.slow
def test_images_store_and_run_in_a_folder_with_an_odd_name(tmp_path: Path):
    folder, random = tmp_path / NAME, np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        for label in ("cat", NAME):
            (folder / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / label / f"{number}?{label}.png")
    uri = sqlite_uri(folder / "store/mlflow.db")
    overrides = {"data.root": folder / "images", "run_dir": folder / "run", "tracking.uri": uri}
    typed = [f"{key}={hydra_quoted(str(value))}" for key, value in overrides.items()]
    done = run_train(*TINY, "data=folder", "data.image_size=32", *typed)
    assert (done.code, "not recorded" in done.err) == (0, False), done.err
    client = connect(uri)
    [run] = client.search_runs([client.get_experiment_by_name("inception").experiment_id])
    assert run.info.status == "FINISHED"
    assert "summary.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert sorted(path.name for path in folder.iterdir()) == ["images", "run", "store"]
    assert sorted(path.name for path in (folder / "store").iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]
    assert [path.name for path in tmp_path.iterdir()] == [
        NAME
    ]  # MLflow creates folders with names that are still quoted
    scored = run_command("make", "compare", f"uri={uri}", "experiment=inception", f"out={folder / 'compared'}")
    assert scored.code == 0, scored.err


def hydra_quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


# ---------------------------------------------------------------------------------------------- the project as a whole


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, set up with UV_SYSTEM_PYTHON, as in many container images."""
    folder = tmp_path_factory.mktemp("project") / NAME
    folder.mkdir()
    files = run_command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").out.split("\0")
    for name in filter(None, files):
        if (ROOT / name).exists():  # removed files are left out
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    done = make(folder, "setup")
    assert done.code == 0, done.err
    return folder


def make(project: Path, *words: str) -> Done:
    done = subprocess.run(
        ["make", *words], cwd=project, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    return inherited | {"UV_SYSTEM_PYTHON": "1"}


@contextmanager
def running(project: Path, *words: str) -> Iterator[Callable[[str], bool]]:
    """Run a command; yield a function that says whether a URL answers and fails once the command has ended."""
    with (project / "server.log").open("w+") as log:
        process = subprocess.Popen(
            ["make", *words], cwd=project, env=environment(), stdout=log, stderr=log, start_new_session=True
        )

        def serves(address: str) -> bool:
            assert process.poll() is None, Path(log.name).read_text()
            return answers(address) != b""

        try:
            yield serves
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


@pytest.mark.slow
def test_project_works_in_a_folder_with_an_odd_name(project: Path):
    """It trains, uploads, sweeps, compares, serves, and shows the runs in the MLflow UI."""
    done = make(project, "train", *TINY, "evaluate.report=false")
    assert (done.code, "record is" in done.err) == (0, False), done.err
    done = make(project, "sweep", *TINY, "seed=1,2", "sweep.search=random", "sweep.trials=2", "evaluate.report=false")
    assert (done.code, "record is" in done.err) == (0, False), done.err
    done = make(project, "compare", "experiment=inception", "metric=validation")
    assert done.code == 0, done.err
    assert (project / "mlflow.db").exists()
    assert (project / "optuna.db").exists()
    client = connect(sqlite_uri(project / "mlflow.db"))
    runs = client.search_runs([client.get_experiment_by_name("inception").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert len(client.search_model_versions("name = 'inception-digits'")) == 2

    port, example = free_port(), np.load(project / "runs/latest/input_example.npy")
    with running(project, "serve", "run=runs/latest", f"port={port}") as serves:
        wait_for(lambda: serves(f"http://127.0.0.1:{port}/health"), 300)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps({"inputs": example.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        answer = json.loads(urllib.request.urlopen(request, timeout=120).read())
    assert len(answer["predictions"][0]["probabilities"]) == 10

    port = free_port()
    with running(project, "ui", f"port={port}") as serves:
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=inception"
        wait_for(lambda: serves(address), 300)
        found = json.loads(answers(address))
    assert found["experiment"]["artifact_location"] == f"file://{quote(str(project))}/mlartifacts/inception"
    assert [path.name for path in project.parent.iterdir()] == [NAME]
