"""An image that becomes unreadable while a run trains: the run fails with one line that names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.batches import make_noise_folder
from support.image_folders import load_dataset
from support.runs import start_run
from train.config.serialization import Redactor
from train.data.example_error import ExampleError
from train.tracking import run_metadata

pytestmark = pytest.mark.usefixtures("no_uploads")


def replace_unnoticed(path: Path):
    """Changes a file but neither its size nor its time, so that only its digest tells."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_run_fails_with_the_line_that_names_the_example(split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Training itself needs only the train split; validation follows an epoch of it, and the test the last one."""
    root = make_noise_folder(tmp_path / "root", {"train": (6, 6, 6), "validation": (2, 2, 2), "test": (2, 2, 2)})
    loaded = load_dataset("folder", tmp_path / "data", image_size=32, channels=3, root=str(root))
    broken = root / loaded.splits[split].example_id(3)
    replace_unnoticed(broken)
    with pytest.raises(ExampleError) as caught:
        start_run(
            tmp_path / "run", "data=folder", f"data.root={root}", f"data.directory={tmp_path / 'data'}",
            "data.cache=none", "data.image_size=32", "batch_size=18", "steps_per_epoch=1", "epochs=1",
        )  # fmt: skip
    assert caught.value.split == split
    assert (tmp_path / "run" / "best" / "model.keras").exists() == (split == "test")
    capsys.readouterr()
    assert run_metadata.report_failure(caught.value, None, Redactor()) == 2
    line = f"error: cannot read {broken}: changed since it was indexed; restore the file"
    assert capsys.readouterr().err.splitlines() == [line]
