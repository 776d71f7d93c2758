"""scripts/compare_commits.py: equal runs are equal in either vocabulary, and every kind of difference is found."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from support.scripts import load_script

CHECKPOINT = "checkpoints/epoch-00002-batch-0000000"
ARRAYS = {"model/kernel": np.arange(6, dtype="float32").reshape(2, 3), "optimizer/iteration": np.array(4)}
OLD_JOURNAL: list[dict[str, Any]] = [
    {"epoch": 0, "step": 0, "time": 1.0, "values": {"cost/parameters": 6}},
    {
        "epoch": 0, "step": 2, "time": 2.0,
        "values": {
            "train/loss": 3.5, "train/main_loss": 2.5, "train/aux_loss": 2.0, "train/main_accuracy": 0.1,
            "validation/loss": float("nan"), "validation/main_accuracy": 0.30000000000000004, "images_per_second": 9.0,
        },
    },
    {
        "epoch": 1, "step": 4, "time": 3.0,
        "values": {
            "train/loss": 3.0, "train/main_loss": 2.0, "train/aux_loss": 2.0, "train/main_accuracy": 0.2,
            "validation/loss": 2.25, "validation/main_accuracy": 0.4, "images_per_second": 8.0,
        },
    },
]  # fmt: skip
OLD_SUMMARY: dict[str, Any] = {
    "status": "finished", "run_id": "a", "steps": 4, "lives": 1, "best": {"epoch": 1, "validation_main_accuracy": 0.4},
    "weights_sha256": "9f31c2", "test": {"loss": 2.5, "accuracy": 0.25}, "train_images_per_second": 8.5, "time": 4.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_commits.py")


def new_journal() -> list[dict[str, Any]]:
    """The old journal as a later version of the project writes it."""
    names = {
        "train/loss": "train/total_loss",
        "train/main_loss": "train/loss",
        "train/main_accuracy": "train/accuracy",
        "validation/main_accuracy": "validation/accuracy",
    }
    return [
        line | {"time": 7.0, "values": {names.get(name, name): value for name, value in line["values"].items()}}
        for line in OLD_JOURNAL
    ]


def new_summary() -> dict[str, Any]:
    kept = {name: OLD_SUMMARY[name] for name in ("status", "steps", "weights_sha256", "test")}
    return kept | {"run_id": "b", "attempts": 1, "best_epoch": 2, "validation": {"accuracy": 0.4, "loss": 2.25}}


def write_run(
    path: Path,
    *,
    journal: list[dict[str, Any]] = OLD_JOURNAL,
    summary: dict[str, Any] = OLD_SUMMARY,
    arrays: dict[str, np.ndarray] = ARRAYS,
    best: dict[str, np.ndarray] = ARRAYS,
) -> Path:
    """Write the compared files of a run."""
    for folder in (CHECKPOINT, "best"):
        (path / folder).mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    (path / "summary.json").write_text(json.dumps(summary))
    np.savez(path / CHECKPOINT / "arrays.npz", allow_pickle=False, **arrays)
    digest = hashlib.sha256((path / CHECKPOINT / "arrays.npz").read_bytes()).hexdigest()
    (path / CHECKPOINT / "manifest.json").write_text(json.dumps({"arrays_sha256": digest}))
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, value in best.items():
            file[name] = value
    with zipfile.ZipFile(path / "best/model.keras", "w") as archive:
        archive.writestr("model.weights.h5", content.getvalue())
    return path


@pytest.fixture
def differences(script: ModuleType, tmp_path: Path) -> Callable[..., list[str]]:
    """The differences between the old run and one written with the given parts."""

    def compare(**parts: Any) -> list[str]:
        before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after", **parts)
        return script.compare(script.read_result(before), script.read_result(after))

    return compare


def with_value(number: int, name: str, value: float) -> list[dict[str, Any]]:
    changed = json.loads(json.dumps(OLD_JOURNAL))
    changed[number]["values"][name] = value
    return changed


def test_equal_runs_are_equal_whatever_their_times_and_ids(differences: Callable):
    journal = [line | {"time": 9.0} for line in with_value(1, "images_per_second", 1.0)]
    assert differences(journal=journal, summary=OLD_SUMMARY | {"run_id": "b", "time": 9.0}) == []


def test_old_and_new_names_are_equal(script: ModuleType, differences: Callable, tmp_path: Path):
    assert differences(journal=new_journal(), summary=new_summary()) == []
    after, before = (script.read_result(tmp_path / name) for name in ("after", "before"))
    assert script.compare(after, before) == []
    assert script.compare(after, after) == []


def test_a_total_loss_that_is_the_loss_may_be_missing(script: ModuleType):
    old = [{"epoch": 0, "step": 1, "values": {"train/loss": 2.5, "train/main_loss": 2.5}}]
    new = [{"epoch": 0, "step": 1, "values": {"train/loss": 2.5}}]
    assert script.normalize_journal(old) == script.normalize_journal(new)


def test_loss_replacing_the_total_loss_is_found(differences: Callable):
    journal = new_journal()
    journal[1]["values"]["train/loss"] = journal[1]["values"]["train/total_loss"]
    assert differences(journal=journal, summary=new_summary())[0] == "journal line 2: train/total_loss 3.5 -> (missing)"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            {"journal": with_value(1, "validation/main_accuracy", 0.3)},
            "journal line 2: validation/accuracy 0.30000000000000004 -> 0.3",
        ),
        ({"journal": OLD_JOURNAL[:-1]}, "journal: 3 lines -> 2 lines"),
        ({"summary": OLD_SUMMARY | {"weights_sha256": "000000"}}, 'summary: weights_sha256 "9f31c2" -> "000000"'),
        ({"summary": OLD_SUMMARY | {"test": {"loss": 2.5}}}, "summary: test.accuracy 0.25 -> (missing)"),
        ({"summary": new_summary() | {"best_epoch": 1}}, "summary: best_epoch 2 -> 1"),
        (
            {"summary": new_summary() | {"validation": {"accuracy": 0.4, "loss": 2.0}}},
            "summary: validation.loss 2.25 -> 2.0",
        ),
        ({"arrays": {"model/kernel": ARRAYS["model/kernel"]}}, "checkpoint: optimizer/iteration int64[] "),
        (
            {"arrays": ARRAYS | {"model/kernel": ARRAYS["model/kernel"][::-1]}},
            "checkpoint: model/kernel float32[2, 3] ",
        ),
        ({"best": {"model/weights": ARRAYS["model/kernel"]}}, "best weights: model/kernel float32[2, 3] "),
    ],
)
def test_a_difference_is_found(parts: dict[str, Any], expected: str, differences: Callable):
    assert any(line.startswith(expected) for line in differences(**parts))


def test_another_hash_in_the_manifest_is_found(script: ModuleType, tmp_path: Path):
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after")
    (after / CHECKPOINT / "manifest.json").write_text(json.dumps({"arrays_sha256": "0"}))
    [line] = script.compare(script.read_result(before), script.read_result(after))
    assert line.startswith("checkpoint: SHA-256 ")


def test_a_failed_run_is_a_difference_on_either_side(script: ModuleType):
    failed, finished = script.Result(failure="exit code 1: no room"), script.Result()
    assert script.compare(finished, failed) == ["AFTER failed: exit code 1: no room"]
    assert script.compare(failed, failed) == [f"{side} failed: exit code 1: no room" for side in ("BEFORE", "AFTER")]


def test_a_line_is_printed_for_each_case(script: ModuleType):
    assert script.format_line("vgg16", [], "9f31c2…", 41.2) == "equal      vgg16                   41 s   9f31c2…"
    assert (
        script.format_line("vgg16", ["a 1 -> 2", "b"], "", 1)
        == "DIFFERENT  vgg16                    1 s   a 1 -> 2 (and 1 more)"
    )
