"""Whole runs through the command line, and what they leave behind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from support.commands import ROOT, THREADS, run_command, run_train
from support.runs import train_session
from support.shared import SECRET, Finished
from train.config.composition import compose
from train.config.schema import ConfigError
from train.config.serialization import Redactor
from train.run import factory, recorder
from train.tracking import run_metadata
from train.tracking.run_dir import create_run_dir, open_run_dir

pytestmark = pytest.mark.usefixtures("no_uploads")


def in_process(path: Path, *overrides: str) -> dict[str, Any]:
    """Train or resume a run within this process, without MLflow; return its summary."""
    config = compose([f"run_dir={path}", f"threads={THREADS}", "evaluate.report=false", *overrides])
    exists = (path / "run.json").exists()
    run_dir = open_run_dir(path) if exists else create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False)
    return train_session(run_dir, config, Redactor())


# ------------------------------------------------------------------------------------------- what a run leaves behind


def test_run_dir_holds_all_files(finished: Finished):
    names = {path.name for path in finished.path.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "summary.json", "train.log", "best", "model_summary.txt", "input_example.npy",
        "dataset.json", "augmented.png",
    }  # fmt: skip
    assert {path.name for path in (finished.path / "best").iterdir()} == {"model.keras", "model.json"}


def test_the_last_line_is_the_summary(finished: Finished):
    summary, last = finished.summary, finished.done.last_line
    assert last.startswith("status=finished model=vgg16_inception data=digits seed=0 epochs=2 steps=80 ")
    assert f" test_accuracy={summary['test']['accuracy']:.4f} test_examples=340 " in last
    assert last.endswith(f" run={finished.path}")


def test_output_is_one_plain_line_per_epoch(finished: Finished):
    assert "\x1b" not in finished.done.out
    # The upload may be late on a busy machine.
    assert all("the upload to MLflow " in line for line in finished.done.err.splitlines())
    epochs = re.findall(
        r"^epoch (\d)/2  loss \d+\.\d{4}  accuracy train 0\.\d{4}  validation 0\.\d{4}  \d+ images/s",
        finished.done.out,
        re.M,
    )
    assert epochs == ["1", "2"]
    assert "40 steps per epoch, batch size 32 (1 example dropped per epoch)" in finished.done.out


def test_summary_describes_the_run(finished: Finished):
    summary = finished.summary
    expected = {"status": "finished", "model": "vgg16_inception", "data": "digits", "seed": 0, "epochs": 2, "steps": 80}
    assert expected.items() <= summary.items()
    assert summary["steps_executed"] == 80
    assert summary["test"]["examples"] == 340
    assert set(summary["test"]) == {
        "loss", "accuracy", "accuracy_interval", "top5_accuracy", "macro_f1", "roc_auc", "ece", "examples",
    }  # fmt: skip
    assert summary["training_parameters"] > summary["parameters"] == 134_652
    assert summary["training_macs"] > summary["macs"] == 3_636_992
    for name in ("run_id", "config_hash", "data_fingerprint", "weights_sha256"):
        assert re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", summary[name]), name
    assert summary["train_images_per_second"] > 0
    assert 0 <= summary["data_wait_fraction"] < 1
    assert summary["peak_memory_bytes"] > 10**8


def test_the_journal_has_a_line_per_logged_step(finished: Finished):
    lines = finished.journal
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (0, 0), *((0, step) for step in range(7, 40, 7)), (0, 40),
        *((1, step) for step in range(42, 80, 7)), (1, 80), (1, 80), (1, 80),  # the epoch, its cost, the test
    ]  # fmt: skip
    assert lines[0]["values"] == {"cost/parameters": 134_652, "cost/macs": 3_636_992}
    assert "test/accuracy" in lines[-1]["values"]
    assert lines[-1]["values"]["test/accuracy"] == finished.summary["test"]["accuracy"]


def test_stored_config_is_resolved(finished: Finished):
    config = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert config["model"]["width"] == 0.125
    assert config["data"]["image_size"] == 32
    assert config["precision"] in ("float32", "mixed_bfloat16")
    assert config["jit"] == "off"
    assert config["threads"] == len(os.sched_getaffinity(0))
    assert config["data"]["fingerprint"] == finished.summary["data_fingerprint"]


def test_dataset_json_describes_the_data(finished: Finished):
    dataset = json.loads((finished.path / "dataset.json").read_text())
    assert dataset["counts"] == {"train": 1281, "validation": 176, "test": 340}
    assert [sum(dataset["class_counts"][split]) for split in dataset["counts"]] == [1281, 176, 340]
    assert dataset["class_counts"]["test"] == [27, 39, 27, 41, 37, 32, 34, 39, 30, 34]
    assert len(set(dataset["splits"].values())) == 3
    assert (dataset["skipped"], dataset["leaks"]) == ([], {"shared": 0, "conflicts": 0, "alike": 0})
    assert "pixel cache: train, validation, test in memory (0.00 GiB)\n" in finished.done.out


def test_first_batch_is_drawn_as_network_input(finished: Finished):
    """augmented.png shows its 32 examples on white, each pixel as 2x2."""
    from support.batches import train_stream
    from support.image_folders import load_digits

    sheet = np.asarray(Image.open(finished.path / "augmented.png").resize((270, 134), Image.Resampling.NEAREST))
    split = load_digits(ROOT / "data", image_size=32).train
    [(images, _)] = train_stream(split, batch_size=32, seed=0, num_classes=10).take(1)
    for number, image in enumerate(images.numpy()):
        top, left = 34 * (number // 8), 34 * (number % 8)
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], image[..., 0])
    assert (sheet[32:34] == 255).all()


def test_data_with_another_fingerprint_is_rejected(tmp_path: Path):
    config = compose([f"run_dir={tmp_path}", "data.fingerprint=0123"])
    dataset, _ = factory.load_data(config, crops=False)
    with pytest.raises(ConfigError) as refused:
        factory.check_fingerprint(config, dataset)
    assert str(refused.value) == (
        f"the data has fingerprint {dataset.fingerprint}, but data.fingerprint=0123; "
        "use the data of the earlier run, or data.fingerprint=null"
    )
    factory.check_fingerprint(compose([f"data.fingerprint={dataset.fingerprint}"]), dataset)


def test_input_bound_run_prints_a_warning():
    assert recorder.input_bound_warning(0.049) == ""
    assert recorder.input_bound_warning(0.314) == (
        "training was input-bound (31% of the time waiting for data); try a larger "
        "data.ram_budget, data.cache=disk, a cheaper augment, smaller files, or more processor cores"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["augment.mixup=0.2", "augment.cutmix=1", "augment.erase=0.25", "data.class_weights=true"],
        ["augment=randaugment", "data.balanced=true", "data.cache=disk"],
        ["augment=inception", "data.cache=none"],
    ],
    ids=["mixed and weighted", "painted and balanced", "cropped from the files"],
)
def test_every_input_pipeline_trains_and_resumes_to_the_same_bits(overrides: list[str], tmp_path: Path):
    """Also when each attempt decodes, draws and mixes again."""
    small = [
        "model=vgg16",
        "model.width=0.1",
        "batch_size=16",
        "steps_per_epoch=4",
        "evaluate.test=false",
        "schedule=constant",
        *overrides,
    ]
    whole = in_process(tmp_path / "whole", *small, "epochs=2")
    in_process(tmp_path / "parts", *small, "epochs=1")
    parts = in_process(tmp_path / "parts", *small, "epochs=2")
    assert (parts["attempts"], parts["steps_executed"], whole["steps_executed"]) == (2, 8, 8)
    assert parts["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_stored_model_gives_the_measured_metrics(finished: Finished, tmp_path: Path):
    """In a process without this project, its accuracy on the test split is that of the summary."""
    from support.image_folders import load_digits

    split = load_digits(ROOT / "data", image_size=32).test
    pixels = np.stack([split.load_example(index) for index in range(len(split))])
    np.savez(tmp_path / "test.npz", images=pixels, labels=split.labels)
    script = (
        "import sys, keras, numpy as np\n"
        "model, test = keras.models.load_model(sys.argv[1]), np.load(sys.argv[2])\n"
        "assert not any(layer.name.startswith('aux') for layer in model.layers)\n"
        "print((model.predict(test['images'], verbose=0).argmax(1) == test['labels']).mean())\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, finished.path / "best/model.keras", tmp_path / "test.npz"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(finished.summary["test"]["accuracy"], abs=1 / 340)


def test_best_model_describes_itself(finished: Finished):
    model_info = json.loads((finished.path / "best/model.json").read_text())
    assert model_info["classes"] == [str(digit) for digit in range(10)]
    assert model_info["input"] == {"shape": [32, 32, 1], "dtype": "uint8", "range": [0, 255]}
    accuracies = {
        line["epoch"]: line["values"]["validation/accuracy"]
        for line in finished.journal
        if "validation/accuracy" in line["values"]
    }
    assert model_info["validation"]["accuracy"] == max(accuracies.values()) == accuracies[model_info["epoch"] - 1]
    assert model_info["data_fingerprint"] == finished.summary["data_fingerprint"]


def test_secret_in_the_tracking_uri_is_written_nowhere(finished: Finished):
    """The tracking URI came from the environment; only the reference to it is stored."""
    config = (finished.path / "config.yaml").read_text()
    assert "uri: ${oc.env:INCEPTION_TEST_STORE}" in config
    for path in finished.path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in finished.done.out + finished.done.err


def test_second_run_does_not_use_an_existing_run_dir(finished: Finished):
    before = hashlib.sha256((finished.path / "summary.json").read_bytes()).hexdigest()
    done = run_train("model=vgg16_inception", f"run_dir={finished.path}")
    assert done.code == 2
    assert done.err == (
        f"error: run_dir {finished.path} contains a run with another config (epochs changed from 2 to 12; "
        "model.width changed from 0.125 to 1.0; tracking.every_steps changed from 7 to 50); "
        f"use another run_dir, or make resume run='{finished.path}'\n"
    )
    assert hashlib.sha256((finished.path / "summary.json").read_bytes()).hexdigest() == before


def test_unwritable_run_dir_is_rejected(tmp_path: Path):
    (tmp_path / "file").touch()
    done = run_train(f"run_dir={tmp_path / 'file' / 'run'}")
    assert done.code == 2
    assert done.err == (f"error: cannot write to run_dir {tmp_path}/file/run (Not a directory); use run_dir=PATH\n")


def test_storage_without_locks_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    folder = create_run_dir(str(tmp_path / "run"), tmp_path, "tests", latest=False)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError) as refused, folder.locked():
        raise AssertionError("it was held")
    expected = f"cannot lock files in {tmp_path}/run (No locks available); use a run_dir on storage with file locks"
    assert str(refused.value) == expected


def test_latest_points_at_the_newest_run_under_runs(tmp_path: Path):
    first = create_run_dir(None, tmp_path / "runs", "tests", latest=True)
    second = create_run_dir(None, tmp_path / "runs", "tests", latest=True)
    create_run_dir(None, tmp_path / "runs", "tests", latest=False)
    create_run_dir(str(tmp_path / "elsewhere"), tmp_path / "runs", "tests", latest=True)
    link = tmp_path / "runs/latest"
    assert link.resolve() == second.path != first.path
    assert str(link.readlink()) == str(second.path.relative_to(tmp_path / "runs"))
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", second.path.name)


# ---------------------------------------------------------------------------------------------- bad input, bad luck


def test_missing_gpu_is_an_error(tmp_path: Path):
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("there is an NVIDIA driver here")
    with pytest.raises(ConfigError, match="device=gpu is not available: TensorFlow finds no GPU; use"):
        in_process(tmp_path / "run", "device=gpu")


def test_batch_larger_than_the_split_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.1281, the size of the train split, got 1282"):
        in_process(tmp_path / "run", "batch_size=1282")


def test_ctrl_c_ends_the_run_cleanly(tmp_path: Path):
    """After the first epoch: status interrupted, exit code 130, a best model, and the status in MLflow."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = ["model=vgg16", "model.width=0.05", "steps_per_epoch=9", "epochs=500", "tracking.log_model=false"]
    overrides.append(f"tracking.uri={uri}")
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *overrides, f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out = process.stdout.read()
    assert process.wait(300) == 130
    assert out.strip().splitlines()[-1].startswith("status=interrupted model=vgg16 ")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["failure"]) == ("interrupted", "stopped by SIGINT")
    assert 9 <= summary["steps"] < 500 * 9
    assert "test" not in summary
    assert (tmp_path / "run/best/model.keras").exists()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "inception"]
    [mlflow_run] = client.search_runs([experiment.experiment_id])
    assert mlflow_run.info.status == "KILLED"
    assert mlflow_run.data.tags["status"] == "interrupted"


def test_sigterm_during_the_tensorflow_import_stops_before_any_step(tmp_path: Path):
    overrides = ["tracking.wait_seconds=0", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *overrides, f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "run/run.json").exists():
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert out.strip().splitlines()[-1].startswith("status=interrupted")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["failure"], summary["steps"]) == ("stopped by SIGTERM", 0)


def holders(secret: bytes, *folders: Path) -> list[Path]:
    """Files that contain the secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret in path.read_bytes()]


def test_unreachable_server_does_not_stop_the_run_and_its_password_is_written_nowhere(tmp_path: Path):
    """A typed password and a closed port: the run finishes, and its folder does not contain the password."""
    run = tmp_path / "run"
    done = run_train(
        "model=vgg16", "model.width=0.05", "epochs=1", "steps_per_epoch=3", "evaluate.test=false",
        "tracking.wait_seconds=1", f"run_dir={run}",
        "tracking.uri=http://me:hunter2-typed@127.0.0.1:9",
    )  # fmt: skip
    for pid in subprocess.run(["pgrep", "-f", f"uploader {run}"], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGTERM)
    assert done.code == 0, done.err
    assert done.last_line.startswith("status=finished")
    assert "make sync run=" in done.err
    assert "uri: http://127.0.0.1:9" in (run / "config.yaml").read_text()
    assert "could not upload yet" in (run / "uploader.log").read_text()
    assert holders(b"hunter2", run) == []
    assert "hunter2" not in done.out + done.err
    (run / "planted").write_text("hunter2")
    assert holders(b"hunter2", run) == [run / "planted"]


@pytest.mark.slow
def test_preparing_the_data_set_during_the_run_changes_no_bit(tmp_path: Path):
    """Preparation draws random numbers; the initial weights must depend on the seed, not on them."""
    overrides = ["model=vgg16", "model.width=0.1", "epochs=1", "steps_per_epoch=2", "evaluate.test=false"]
    prepared = in_process(tmp_path / "prepared", *overrides)
    unprepared = in_process(tmp_path / "unprepared", *overrides, f"data.directory={tmp_path / 'data'}")
    other = in_process(tmp_path / "other", *overrides, "seed=1")
    assert unprepared["weights_sha256"] == prepared["weights_sha256"] != other["weights_sha256"]


def test_warnings_of_the_project_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture):
    """For example about classifier layers that are initialised anew; other packages' warnings stay in train.log."""
    with run_metadata.log_to_file(create_run_dir(str(tmp_path / "run"), tmp_path, "x", latest=False)):
        logging.getLogger("train.models.weights").warning("predictions starts anew")
        logging.getLogger("train.models.weights").info("loaded")
        logging.getLogger("elsewhere").warning("noise")
    assert capsys.readouterr().err == "warning: predictions starts anew\n"
    assert {"predictions starts anew", "loaded", "noise"} <= {
        line.split(": ", 1)[1] for line in (tmp_path / "run/train.log").read_text().splitlines()
    }


def test_two_runs_of_one_process_have_the_same_provenance(tmp_path: Path):
    log = tmp_path / "log"
    factory.prepare_runtime(compose([f"threads={THREADS}"]), log)
    with pytest.raises(ConfigError, match=f"threads cannot change within a process, from {THREADS} to 1; start"):
        factory.prepare_runtime(compose(["threads=1"]), log)


def test_gradient_accumulation_over_more_steps_than_the_run_has_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="gradient_accumulation must be at most the run's 6 steps, got 7"):
        in_process(tmp_path / "run", "epochs=2", "steps_per_epoch=3", "gradient_accumulation=7", "model.width=0.1")


# --------------------------------------------------------------------------------------------- every network learns

SMALL = {
    "vgg16": ["model.width=0.125", "epochs=4", "optimizer=adamw"],
    "vgg16_inception": ["model.width=0.125", "epochs=3", "ema=0.5", "gradient_clip=50"],
    "inception_v1": ["model.width=0.25", "epochs=3"],
    "inception_v3": ["model.width=0.125", "epochs=2", "batch_size=16", "optimizer.learning_rate=0.02"],
    "inception_resnet_v2": ["model.width=0.125", "epochs=1", "batch_size=16", "optimizer.learning_rate=0.02"],
}


LONG = ("vgg16_inception", "inception_v1", "inception_v3", "inception_resnet_v2")  # up to a minute each


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SMALL]
)
def test_every_network_learns_digits(model: str, tmp_path: Path):
    """Chance is 0.1: a vanished gradient or stale moving statistics would stay below 0.5."""
    summary = in_process(tmp_path / "run", f"model={model}", "evaluate.test=false", *SMALL[model])
    assert summary["validation"]["accuracy"] > 0.5
    assert summary["training_parameters"] > summary["parameters"]  # with the auxiliary heads


@pytest.mark.slow
def test_default_momentum_avoids_stale_moving_statistics(finished: Finished, tmp_path: Path):
    """Negative control: with the default momentum of Keras the same run validates far worse."""
    overrides = ["evaluate.test=false", "model.width=0.125", "epochs=2", "model.batch_norm_momentum=0.99"]
    bad = in_process(tmp_path / "bad", "model=vgg16_inception", *overrides)
    good = finished.summary["validation"]["accuracy"]
    assert bad["validation"]["accuracy"] < good - 0.2


# ------------------------------------------------------------------------------------------------------ longer runs


@pytest.mark.slow
def test_sweep_gives_one_run_per_combination(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = run_command(
        "make", "sweep", "model=vgg16,vgg16_inception", "seed=0,1", "epochs=1", "steps_per_epoch=4", "model.width=0.1",
        "evaluate.report=false", f"tracking.uri={uri}", "tracking.experiment=sweep-test", "tracking.log_model=false",
        timeout=1800,
    )  # fmt: skip
    assert done.code == 0, done.err
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "sweep-test"]
    runs = client.search_runs([experiment.experiment_id])
    [sweep] = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    trials = [run for run in runs if run is not sweep]
    assert sorted((run.data.params["model.name"], run.data.params["seed"]) for run in trials) == [
        ("vgg16", "0"), ("vgg16", "1"), ("vgg16_inception", "0"), ("vgg16_inception", "1"),
    ]  # fmt: skip
    assert (sweep.data.params["model"], sweep.data.params["seed"]) == ("vgg16,vgg16_inception", "0,1")
    assert {run.info.status for run in runs} == {"FINISHED"}
    shutil.rmtree(Path(sweep.data.tags["run_dir"]).parent)


@pytest.mark.slow
@pytest.mark.real_data
def test_image_folder_of_photographs_is_learned(tmp_path: Path):
    root = os.environ.get("INCEPTION_REAL_DATA")
    if not root:
        pytest.skip("INCEPTION_REAL_DATA names no folder with sign_digits in it")
    done = run_train(
        "model=vgg16_inception", "data=folder", f"data.root={root}/sign_digits", "data.image_size=32", "epochs=6",
        "model.width=0.25", "tracking.log_model=false", f"run_dir={tmp_path / 'run'}",
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", timeout=900,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["test"]["accuracy"] >= 0.95
