"""Run folders of format 1, written by earlier versions: they are read but not resumed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from support.commands import Done, run_command
from train.tracking import format_1
from train.tracking.run_dir import open_run_dir

ARCHIVE = Path(__file__).with_name("format_1.zip")  # of `make train model=vgg16 model.width=0.02`, two epochs
TEST_ACCURACY = 0.12058823529411765
VALIDATION_ACCURACY = 0.08522727272727272


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path / "run"


def command(name: str, run: Path, *words: str) -> Done:
    return run_command(sys.executable, "-m", f"train.{name}", f"run={run}", *words)


def test_format_1_files_are_read_in_the_current_format(run: Path):
    folder = open_run_dir(run)
    summary = folder.summary()
    assert (summary["best_epoch"], summary["validation"], summary["attempts"]) == (
        1,
        {"accuracy": VALIDATION_ACCURACY},
        1,
    )
    assert (folder.model_info()["epoch"], folder.model_info()["validation"]) == (1, {"accuracy": VALIDATION_ACCURACY})
    values = [line["values"] for line, _ in folder.read_journal()][1]
    assert (values["train/total_loss"], values["train/loss"]) == (3.0861358642578125, 2.301760196685791)
    assert (values["train/accuracy"], values["validation/accuracy"]) == (0.0, VALIDATION_ACCURACY)
    assert not [name for name in values if "main" in name]
    assert folder.config()["early_stopping"]["metric"] == "validation/accuracy"


@pytest.mark.slow
def test_evaluation_of_a_format_1_run_gives_the_old_metrics_and_a_report(run: Path):
    done = command("evaluate", run, "tracking.wait_seconds=0", f"tracking.uri=sqlite:///{run.parent}/mlflow.db")
    assert done.code == 0, done.err
    assert json.loads((run / "evaluation/test/scores.json").read_text())["accuracy"] == pytest.approx(TEST_ACCURACY)
    (run / "report.html").unlink()
    assert command("report", run).code == 0
    page = (run / "report.html").read_text()
    assert "validation accuracy, epoch 1" in page
    assert "validation/accuracy" in page


@pytest.mark.slow
def test_model_of_a_format_1_run_is_exported_and_classifies(run: Path):
    uri = f"tracking.uri=sqlite:///{run.parent}/mlflow.db"
    done = command("export", run, "format=keras", "tracking.wait_seconds=0", uri)
    assert done.code == 0, done.err
    assert "(accuracy 0.0852, epoch 1)" in (run / "export/keras/README.md").read_text()
    shown = command(
        "predict", run, f"images={Path(__file__).parents[2] / 'scripts/results/claims.png'}", "output=jsonl"
    )
    assert shown.code == 0, shown.err
    assert len(json.loads(shown.out)["predictions"]) == 5


def test_format_1_run_is_not_resumed(run: Path):
    done = command("resume", run)
    assert (done.code, done.out) == (0, f"the run is finished: {run}\n"), done.err
    (run / "summary.json").unlink()
    done = command("resume", run)
    assert (done.code, done.err) == (
        2,
        f"error: cannot resume {run}: it was written by an older version (run format 1, this version resumes "
        "format 2); use that version, or start a new run\n",
    )


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ({"metric": "train/loss"}, {"metric": "train/loss"}),
        ({"metric": "train/main_accuracy"}, {"metric": "train/accuracy"}),
        ({"metric": None}, {"metric": None}),
        (None, None),
    ],
)
def test_early_stopping_of_a_format_1_config_stays_valid(stored: dict | None, read: dict | None):
    assert format_1.current_config({"early_stopping": stored}) == {"early_stopping": read}


def test_metrics_of_format_1_runs_in_mlflow_get_the_current_names():
    old = {"train/loss": 3.0, "train/main_loss": 2.0, "best/validation_main_accuracy": 0.5, "test/accuracy": 0.4}
    assert format_1.current_metrics(old) == {
        "train/total_loss": 3.0, "train/loss": 2.0, "best/validation_accuracy": 0.5, "test/accuracy": 0.4,
    }  # fmt: skip
