"""`make evaluate` and `make report` on a real run: metrics, files, messages."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import Done, message, run_command
from support.shared import Finished, once
from train.evaluate import evaluate
from train.evaluation.html import format_compact

PICTURES = {"confusion.png", "reliability.png", "classes.png", "mistakes.png", "attention.png"}


def evaluated(path: Path, *words: str) -> Done:
    return run_command(sys.executable, "-m", "train.evaluate", f"run={path}", "tracking.wait_seconds=0", *words)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def copied(finished: Finished, folder: Path) -> Path:
    """A copy of the run that is not uploaded."""
    shutil.copytree(finished.path, folder / "run", symlinks=True)
    config = folder / "run" / "config.yaml"
    config.write_text(re.sub(r"uri: .*", f"uri: sqlite:///{folder / 'mlflow.db'}", config.read_text()))
    return folder / "run"


def test_run_writes_metrics_predictions_and_plots(finished: Finished):
    folder = finished.path / "evaluation/test"
    metrics, summary = json.loads((folder / "scores.json").read_text()), finished.summary["test"]
    assert {name: metrics[name] for name in summary} == summary
    low, high = summary["accuracy_interval"]
    assert low < summary["accuracy"] < high
    rows = rows_of(folder)
    assert len(rows) == summary["examples"] == sum(map(sum, metrics["confusion"]))
    right = [row["class"] == row["predicted"] for row in rows]
    assert np.mean(right) == pytest.approx(summary["accuracy"])
    assert -np.log([float(row["probability_of_class"]) for row in rows]).mean() == pytest.approx(
        summary["loss"], abs=1e-3
    )
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    for name in ("loss", "accuracy", "learning_rate", "filters"):
        assert (finished.path / f"{name}.png").exists()


def test_report_is_one_self_contained_file(finished: Finished):
    text, summary = (finished.path / "report.html").read_text(), finished.summary
    assert text.count("data:image/png;base64,") == len(PICTURES) + 5
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert f"{summary['test']['accuracy']:.4f}" in text
    assert format_compact(summary["macs"]) in text
    assert "make train model=vgg16_inception data=digits" in text
    assert "model.width=0.125" in text
    assert "Block_3_1" in text
    assert "hunter2" not in text


def test_command_in_the_report_reproduces_the_run(finished: Finished):
    command = json.loads((finished.path / "run.json").read_text())["command"]
    assert command == "make train model=vgg16_inception data=digits model.width=0.125 tracking.every_steps=7 epochs=2"


@pytest.mark.slow
def test_evaluation_of_the_same_weights_gives_the_same_metrics(finished: Finished, tmp_path: Path):
    path = copied(finished, tmp_path)
    before = (path / "evaluation/test/scores.json").read_text()
    shutil.rmtree(path / "evaluation")
    done = evaluated(path)
    assert done.code == 0, done.err
    assert done.last_line == str(path / "evaluation/test")
    assert (path / "evaluation/test/scores.json").read_text() == before
    assert f"{finished.summary['test']['accuracy']:.4f}" in done.out


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three of the ten digits, one folder per class."""

    def draw(place: Path) -> Path:
        noise = np.random.default_rng(0)
        for name in ("0", "3", "7"):
            (place / "photos" / name).mkdir(parents=True)
            for number in range(8):
                image = Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8))
                image.save(place / "photos" / name / f"{number}.png")
        return place / "photos"

    return once(tmp_path_factory, "photos", draw)


@pytest.mark.slow
def test_evaluation_on_other_data_with_some_of_the_classes(finished: Finished, photos: Path, tmp_path: Path):
    path = copied(finished, tmp_path)
    done = evaluated(path, "data=folder", f"data.root={photos}", "split=all", "evaluate.views=mirror")
    assert done.code == 0, done.err
    folder = path / "evaluation/photos-all-mirror"
    metrics = json.loads((folder / "scores.json").read_text())
    assert metrics["examples"] == 24
    assert [row["examples"] for row in metrics["classes"]] == [8, 0, 0, 8, 0, 0, 0, 8, 0, 0]
    assert {row["class"] for row in rows_of(folder)} == {"0", "3", "7"}
    assert "classes without examples are excluded from the means: 1, 2, 4, 5, 6, 8, 9" in done.out
    assert "photos-all-mirror: 24 examples" in (path / "report.html").read_text()


def test_invalid_evaluation_is_rejected(finished: Finished, photos: Path, tmp_path: Path):
    path = copied(finished, tmp_path)
    strange = tmp_path / "strange"
    shutil.copytree(photos, strange)
    (strange / "0").rename(strange / "zebra")
    done = evaluated(path, "data=folder", f"data.root={strange}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "; its classes are 0, 1, 2" in done.err
    assert "the run was not trained on zebra" in done.err
    for overrides, expected in (
        (("split=half",), "split must be one of train, validation, test, all, got half"),
        (("optimizer.beauty=1",), 'unknown key "optimizer.beauty"; valid keys: run, split, '),
        (("evaluate.views=five",), "evaluate.views must be one of one, mirror, ten_crop, got five"),
    ):
        assert expected in message(evaluate, [f"run={path}", *overrides])
    (path / "best").unlink()
    assert f"run {path} has no saved weights yet" in message(evaluate, [f"run={path}"])
    assert f"{tmp_path / 'nowhere'} is not a run folder" in message(evaluate, [f"run={tmp_path / 'nowhere'}"])


def test_report_is_written_again_even_without_test_results(finished: Finished, tmp_path: Path):
    path = copied(finished, tmp_path)
    shutil.rmtree(path / "evaluation")
    (path / "report.html").unlink()
    summary = json.loads((path / "summary.json").read_text())
    summary.pop("test")
    (path / "summary.json").write_text(json.dumps(summary | {"status": "failed", "failure": "<b>boom</b>"}))
    done = run_command(sys.executable, "-m", "train.report", f"run={path}")
    assert (done.code, done.last_line) == (0, str(path / "report.html"))
    text = (path / "report.html").read_text()
    assert "The run was not evaluated on the test split" in text
    assert "failed: &lt;b&gt;boom&lt;/b&gt;" in text
    (path / "summary.json").unlink()  # as in a run that is still running, or was killed
    done = run_command(sys.executable, "-m", "train.report", f"run={path}")
    assert (done.code, done.err) == (0, "")
    assert "not finished" in (path / "report.html").read_text()
    (path / "metrics.jsonl").write_text("")
    done = run_command(sys.executable, "-m", "train.report", f"run={path}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "has no finished epoch" in done.err


def test_sizes_are_readable():
    assert [format_compact(n) for n in (14714688, 1.5e9, 999, 2e12, 1234)] == [
        "14.7 M",
        "1.5 G",
        "999",
        "2 T",
        "1.23 k",
    ]
