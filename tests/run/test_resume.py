"""Runs that are killed and resumed: to the same bits, in the same folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.commands import ROOT, THREADS, run_command
from support.runs import EVERY_4_STEPS, TINY, Killed, read_journal, resume_run, same_journals, start_run
from support.waiting import wait_for
from train import models
from train.config import composition
from train.config.serialization import Redactor, config_hash, to_dict
from train.data import pipeline
from train.run import lifecycle, state
from train.tracking import uploader
from train.tracking.journal import ReplayError, comparable
from train.tracking.run_dir import create_run_dir
from train.training import checkpoint

pytestmark = pytest.mark.usefixtures("no_uploads")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that is not interrupted, with shifted crops; its folder and summary."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "start", lambda *_: None)
        return folder, start_run(folder, EVERY_4_STEPS)


def test_loader_threads_prefetch_and_logging_change_no_bit(
    uninterrupted: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    monkeypatch.setattr(pipeline, "PREFETCH", 7)
    other = start_run(tmp_path / "run", "tracking.every_steps=1", "checkpoint.every_minutes=0.001")
    assert other["weights_sha256"] == uninterrupted[1]["weights_sha256"]
    assert other["test"] == uninterrupted[1]["test"]
    ends = [
        [comparable(line) for line in read_journal(path) if "validation/loss" in line["values"]]
        for path in (uninterrupted[0], tmp_path / "run")
    ]
    assert len(ends[0]) == 2
    assert ends[0] == ends[1]


def test_compute_threads_change_the_config_hash():
    """They change bits, so the hashes must differ."""

    one, two = (composition.compose([f"threads={number}"]) for number in (1, 2))
    assert config_hash(to_dict(one, Redactor())) != config_hash(to_dict(two, Redactor()))


@pytest.mark.parametrize(
    ("point", "number", "executed"),
    [
        ("step", 5, 12 + 1),
        pytest.param("step", 11, 12 + 3, marks=pytest.mark.slow),
        pytest.param("journal", 6, 12 + 2, marks=pytest.mark.slow),
        pytest.param("life/ground", 1, 12, marks=pytest.mark.slow),
        ("life/settled", 1, 12),
    ],
)
def test_killed_run_resumes_to_the_same_bits(
    point: str, number: int, executed: int, uninterrupted: tuple[Path, dict], tmp_path: Path, kill_at: Any
):
    folder, (path, summary) = tmp_path / "run", uninterrupted
    kill_at(point, number)
    with pytest.raises(Killed):
        start_run(folder, EVERY_4_STEPS)
    kill_at(None)
    second = resume_run(folder)
    assert second["weights_sha256"] == summary["weights_sha256"]
    assert second["test"] == summary["test"]
    assert same_journals(folder, path)
    assert (second["attempts"], second["steps"], second["steps_executed"]) == (2, 12, executed)


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict]:
    """The overrides of a run in two stages, with every kind of optimizer state; its summary."""
    folder = tmp_path_factory.mktemp("staged_run")
    models.build("vgg16", (32, 32, 1), 10, width=0.1, head="fc").save(folder / "start.keras")
    overrides = [
        EVERY_4_STEPS, f"model.weights={folder / 'start.keras'}", "fine_tune.layer_decay=0.7", "optimizer=adamw",
        "ema=0.9", "gradient_accumulation=2", "evaluate.test=false",
        "fine_tune.stages=[{epochs:1,from_part:head,learning_rate_factor:1},"
        "{epochs:1,from_part:all,learning_rate_factor:0.5}]",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "start", lambda *_: None)
        return overrides, start_run(folder / "run", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [5, 7, 9]
)  # in the first stage; in the second, resumed from before it and from within it
def test_killed_run_with_stages_resumes_to_the_same_bits(
    step: int, staged_run: tuple[list[str], dict], tmp_path: Path, kill_at: Any, capsys: pytest.CaptureFixture
):
    overrides, summary = staged_run
    kill_at("step", step)
    with pytest.raises(Killed):
        start_run(tmp_path / "run", *overrides)
    assert (
        "weights: 13 layers loaded, block1_conv1 to block5_conv3; "
        "newly initialised: aux_1_conv, aux_1_bn, aux_2_conv, aux_2_bn, fc1, fc2, aux_predictions, predictions"
    ) in capsys.readouterr().out.splitlines()
    kill_at(None)
    assert resume_run(tmp_path / "run")["weights_sha256"] == summary["weights_sha256"]


@pytest.mark.slow
def test_killed_distillation_resumes_to_the_same_bits(uninterrupted: tuple[Path, dict], tmp_path: Path, kill_at: Any):
    overrides = [EVERY_4_STEPS, f"distill.teacher={uninterrupted[0]}", "model.width=0.05", "evaluate.test=false"]
    whole = start_run(tmp_path / "whole", *overrides)
    kill_at("step", 7)
    with pytest.raises(Killed):
        start_run(tmp_path / "run", *overrides)
    kill_at(None)
    assert resume_run(tmp_path / "run")["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_run_without_a_checkpoint_restarts_in_the_same_folder(
    uninterrupted: tuple[Path, dict], tmp_path: Path, kill_at: Any
):
    kill_at("step", 3)
    with pytest.raises(Killed):
        start_run(tmp_path / "run", EVERY_4_STEPS)
    kill_at(None)
    summary = resume_run(tmp_path / "run")
    assert summary["weights_sha256"] == uninterrupted[1]["weights_sha256"]
    assert same_journals(tmp_path / "run", uninterrupted[0])
    assert summary["steps_executed"] == 3 + 12


def test_corrupt_checkpoint_is_skipped(uninterrupted: tuple[Path, dict], tmp_path: Path, kill_at: Any):
    kill_at("step", 9)
    with pytest.raises(Killed):
        start_run(tmp_path / "run", EVERY_4_STEPS)
    kill_at(None)
    _, second = sorted((tmp_path / "run/checkpoints").iterdir())
    arrays = bytearray((second / checkpoint.ARRAYS).read_bytes())
    arrays[len(arrays) // 2] ^= 1
    (second / checkpoint.ARRAYS).write_bytes(arrays)
    summary = resume_run(tmp_path / "run")
    assert summary["weights_sha256"] == uninterrupted[1]["weights_sha256"]
    assert summary["steps_executed"] == 9 + 8
    assert (second.parent / f"damaged-{second.name}").is_dir()


def test_replay_with_other_bits_fails_and_names_the_step(tmp_path: Path, kill_at: Any):
    """As another machine might compute: a weight in the checkpoint is changed, and the checkpoint written again."""
    folder = tmp_path / "run"
    kill_at("step", 7)
    with pytest.raises(Killed):
        start_run(folder, EVERY_4_STEPS)
    kill_at(None)
    [path] = (folder / "checkpoints").iterdir()
    saved = checkpoint.read_checkpoint(path)
    name = next(name for name in saved.arrays if name.endswith("block1_conv1/kernel") and name.startswith("model/"))
    saved.arrays[name] = saved.arrays[name] * np.float32(1.1)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    writer = checkpoint.CheckpointManager(path.parent, keep=2)
    writer.save(path.name, saved.arrays, saved.metadata)
    writer.close()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ReplayError, match=r"not reproducible: replaying step 6 \(epoch 1\) gave .* .*, the journal has "
    ):
        resume_run(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("fill_at", "expected"),
    [(3, " (No space left on device); free some space, then run make resume run="),
     pytest.param(7, "cannot write the summary to {} (No space left on device); free some space",
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_full_disk_ends_the_run_in_one_line_and_it_resumes_with_free_space(
    fill_at: int,
    expected: str,
    uninterrupted: tuple[Path, dict],
    tiny_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """The disk fills up before the first checkpoint, or after it; nothing valid is lost."""
    disk = tiny_disk("16m")

    def point(name: str, number: int | None = None) -> None:
        if (name, number) == ("step", fill_at):
            with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    monkeypatch.setattr(state.fault_injection, "fail_point", point)
    config = composition.compose([f"run_dir={disk / 'run'}", f"threads={THREADS}", *TINY, EVERY_4_STEPS])
    folder = create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False)
    assert lifecycle.continue_run(folder, config, Redactor(), frozenset()) == 1
    errors = capsys.readouterr().err
    assert expected.format(disk / "run") in errors
    assert "error: cannot write " in errors
    assert "Traceback" not in errors
    if fill_at == 7:
        [saved] = (disk / "run/checkpoints").glob("epoch-*")
        assert checkpoint.read_checkpoint(saved).metadata["progress"]["steps"] == 4
        assert "cannot write a checkpoint to" in errors
    (disk / "filler").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(uploader, "start", lambda *_: None)
    summary = resume_run(disk / "run")
    assert summary["weights_sha256"] == uninterrupted[1]["weights_sha256"]
    assert summary["test"] == uninterrupted[1]["test"]
    assert same_journals(disk / "run", uninterrupted[0])


@pytest.mark.slow
def test_run_stopped_by_sigterm_resumes_to_the_same_bits(tmp_path: Path, uninterrupted: tuple[Path, dict]):
    """A real process, signal and store: exit code 143 during training, then one MLflow run of two attempts."""
    from mlflow import MlflowClient

    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = [
        f"threads={THREADS}", *TINY, "checkpoint.every_epochs=2", "tracking.log_model=false",
        f"run_dir={folder}", f"tracking.uri={uri}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "metrics.jsonl").exists() or '"step": 2' not in (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert all("the upload to MLflow " in line for line in err.splitlines())  # the upload may be late on a busy machine
    assert f"to continue: make resume run={folder}" in out
    summary = json.loads((folder / "summary.json").read_text())
    [saved] = (folder / "checkpoints").iterdir()
    assert (
        checkpoint.read_checkpoint(saved).metadata["progress"]["steps"]
        == summary["steps"]
        == summary["steps_executed"]
        < 12
    )
    assert "test" not in summary

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("inception")
    assert experiment is not None

    def recorded() -> Any:
        [run] = client.search_runs([experiment.experiment_id])
        return run

    wait_for(lambda: recorded().info.status == "KILLED", 300)
    done = run_command("make", "resume", f"run={folder}")
    assert done.code == 0, done.err
    second = json.loads((folder / "summary.json").read_text())
    assert second["weights_sha256"] == uninterrupted[1]["weights_sha256"]
    assert second["steps_executed"] == 12  # no step is repeated after a signal
    assert same_journals(folder, uninterrupted[0])
    assert (recorded().info.status, recorded().data.tags["attempts"]) == ("FINISHED", "2")
    assert "failure" not in recorded().data.tags
    points = client.get_metric_history(recorded().info.run_id, "train/loss")
    assert [point.step for point in points] == [2, 4, 6, 8, 10, 12]


def run_stress_script(*arguments: str, timeout: float = 3600) -> tuple[int, str, dict[str, Any]]:
    report = Path(arguments[-1])
    done = run_command(
        sys.executable, "scripts/stress/runs.py", *arguments[:-1], "--report", str(report), timeout=timeout
    )
    return done.code, done.out + done.err, json.loads(report.read_text())


@pytest.mark.slow
def test_run_killed_at_random_times_ends_the_same(tmp_path: Path):
    """The short version of `make stress`."""
    arguments = ["--kills", "2", "--workers", "1", "--cases", "dropout and augmentation", str(tmp_path / "report.json")]
    code, output, report = run_stress_script(*arguments)
    assert code == 0, output
    assert report["identical"] == report["kills"] >= 2
    trial = next(trial for trial in report["trials"] if trial["counts"])
    repeated = len(trial["kills"]) * (6 + 6)  # at most, see WRITING in the script
    assert trial["steps"] < trial["steps_executed"] <= trial["steps"] + repeated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        ("inception_v1", ["seeds"]),  # of its dropout
        ("dropout and augmentation", ["optimizer", "metrics", "statistics"]),  # the fastest; it has no dropout state
    ],
)
def test_stress_script_detects_what_a_checkpoint_lacks(case: str, left_out: list[str], tmp_path: Path):
    """Each item is left out by itself, in a run that is killed once."""
    arguments = ["--kills", "1", "--workers", "1", "--cases", case, "--forget", ",".join(left_out)]
    code, output, report = run_stress_script(*arguments, str(tmp_path / "report.json"))
    assert code == 1, output
    assert report["differing"] == report["kills"] >= len(left_out)
    assert [trial["forget"] for trial in report["trials"]] == left_out
    for trial in report["trials"]:  # the difference was found in the bits
        assert any(
            " differs, see " in difference or "not reproducible: replaying" in difference
            for difference in trial["differences"]
        )
    [kept] = re.findall(r"the differing runs are kept in (\S+)", output)
    assert len(list(Path(kept).glob("* 1 *"))) >= len(left_out)
    shutil.rmtree(kept)
