"""Resuming with changes: which are rejected, which can be accepted, and how they are recorded."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import THREADS, run_command
from support.runs import EVERY_4_STEPS, TINY, Killed, read_journal, resume_run, start_run
from train import resume
from train.config import composition
from train.config.compatibility import check_compatible
from train.config.schema import ConfigError
from train.config.serialization import Redactor, quote_value, to_dict
from train.run import state
from train.tracking import uploader
from train.tracking.run_dir import open_run_dir
from train.training import checkpoint

pytestmark = pytest.mark.usefixtures("no_uploads")


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed_run") / "run"

    def point(name: str, number: int | None = None) -> None:
        if (name, number) == ("step", 7):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "start", lambda *_: None)
        patch.setattr(state.fault_injection, "fail_point", point)
        with pytest.raises(Killed):
            start_run(folder, EVERY_4_STEPS)
    return folder


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["batch_size=8"],
            "batch_size is 16 in this run, got 8; omit it, or pass accept=batch_size to continue with",
        ),
        (["model.width=0.2"], "model.width is 0.1 in this run, got 0.2"),
        (["tracking.every_steps=3"], "tracking.every_steps is 2 in this run, got 3"),
        (["epochs=1"], "epochs is 2 in this run, got 1"),
        (["epochs=two"], "epochs must be a whole number, got two; use e.g. epochs=12"),
        (["precision=float16"], "precision must be one of auto, float32, mixed_bfloat16, mixed_float16, got float16"),
        (["colour=red"], 'unknown key "colour"; valid keys: run, accept, augment.cutmix, '),
        (["model=vgg16"], 'unknown key "model"; valid keys: run, accept, '),
        (["again"], "arguments must be key=value, got again; --help lists the keys"),
        (["optimizer.lr=1"], 'unknown key "optimizer.lr"; did you mean optimizer.learning_rate?'),
        (["run="], ". is not a run folder; use e.g. run=runs/latest"),
        (["epochs=3,4"], "epochs takes a single value, got 3,4; use one of them"),
    ],
)
def test_incompatible_override_is_rejected_in_one_line(overrides: list[str], expected: str, killed_run: Path):
    before = file_contents(killed_run)
    with pytest.raises(ValueError) as caught:
        resume.resume([f"run={killed_run}", *overrides])
    assert str(caught.value).startswith(expected)
    assert file_contents(killed_run) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version.tensorflow", "2.20.0"),
        ("version.python", "3.10.1"),
        ("data_fingerprint", "0123"),
        ("code", "0123"),
        ("processor", "another"),
        ("precision", "mixed_float16"),
        ("backend", "jax"),
        ("optimizer.name", "adamw"),
        ("model.name", "inception_v1"),
    ],
)
def test_changed_provenance_is_rejected_and_named(name: str, value: str, killed_run: Path):
    """The provenance in a real checkpoint has all these names."""
    [path] = (killed_run / "checkpoints").iterdir()
    provenance = checkpoint.read_checkpoint(path).metadata["provenance"]
    value_now = provenance[name]
    with pytest.raises(ConfigError) as caught:
        check_compatible(provenance | {name: value}, provenance, frozenset(), Path("runs/one"))
    assert str(caught.value) == (
        f"cannot resume: {name} changed from {value} to {value_now}; restore it, or allow the change: "
        f"make resume run=runs/one accept={name}"
    )


def test_accepted_change_of_provenance_is_recorded_and_starts_a_branch(killed_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    run_command("cp", "-r", str(killed_run), str(folder))
    [path] = (folder / "checkpoints").iterdir()
    saved = checkpoint.read_checkpoint(path)
    (folder / "provenance.json").write_text(
        json.dumps(saved.metadata["provenance"] | {"code": "0123", "version.keras": "3.0"})
    )
    before = file_contents(folder)
    expected = r"code changed from 0123 to \w+; version.keras changed from 3.0 to .* run=\S+ accept=code,version.keras$"
    with pytest.raises(ConfigError, match=expected):
        resume_run(folder)
    with pytest.raises(
        ConfigError,
        match=r"^cannot resume: version.keras changed from 3.0 to .* make resume run=\S+ accept=code,version.keras$",
    ):
        resume_run(folder, accepted="code")
    assert file_contents(folder) == before
    summary = resume_run(folder, accepted="code,version.keras")
    assert [sentence.partition(" is")[0] for sentence in summary["changes"]] == [
        "code was 0123,", "version.keras was 3.0,",
    ]  # fmt: skip
    lines = read_journal(folder)
    old = len(before[str(folder / "metrics.jsonl")].splitlines())
    assert all("branch" not in line for line in lines[:old])
    assert {tuple(line["branch"]) for line in lines[old:]} == {(2, 0)}
    assert lines[old]["step"] == 6  # the steps after the checkpoint at 4 are recorded again, on the branch


@pytest.mark.slow
def test_branch_without_checkpoints_restarts_as_a_new_branch(killed_run: Path, tmp_path: Path, kill_at: Any):
    """The run restarts from before an accepted change, so its steps cannot be compared with those after the change."""
    folder = tmp_path / "run"
    run_command("cp", "-r", str(killed_run), str(folder))
    kill_at("step", 11)
    with pytest.raises(Killed):
        resume_run(folder, "optimizer.momentum=0.5", accepted="optimizer.momentum")
    kill_at(None)
    for path in (folder / "checkpoints").glob("epoch-*"):
        (path / checkpoint.MANIFEST).unlink()
    summary = resume_run(folder)
    assert summary["changes"][0] == "optimizer.momentum was 0.9, is 0.5"
    assert summary["changes"][1].startswith("journal_lines was ")
    branches = [tuple(line.get("branch", (0, 0))) for line in read_journal(folder)]
    assert sorted(set(branches)) == [(0, 0), (1, 0), (2, 0)]
    assert branches == sorted(branches)
    assert (summary["steps"], summary["attempts"]) == (12, 3)


@pytest.mark.slow
def test_more_epochs_are_allowed_and_recorded(tmp_path: Path):
    """A finished run is extended from its end."""
    folder = tmp_path / "run"
    first = start_run(folder, "schedule=constant")
    (folder / "summary.json").write_text(json.dumps(first | {"status": "finished", "time": time.time()}))
    assert resume.resume([f"run={folder}"]) == 0
    second = resume_run(folder, "epochs=3")
    assert (second["epochs"], second["steps"], second["steps_executed"]) == (3, 18, 18)
    assert second["changes"] == ["epochs was 2, is 3"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 3
    whole = start_run(tmp_path / "whole", "schedule=constant", "epochs=3")
    assert second["weights_sha256"] == whole["weights_sha256"]


def test_finished_run_is_reported_before_tensorflow_is_imported(tmp_path: Path, killed_run: Path):
    folder = tmp_path / "run"
    run_command("cp", "-r", str(killed_run), str(folder))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
    done = run_command("make", "resume", f"run={folder}")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"the run is finished: {folder}; to train longer: make resume run={folder} epochs=NUMBER\n"
    loaded = (
        f"import sys; from train.resume import resume; code = resume(['run={folder}']);"
        "print(code, *sorted({'tensorflow', 'keras', 'mlflow'} & set(sys.modules)))"
    )
    assert run_command(sys.executable, "-c", loaded).last_line == "0"


def test_running_run_is_not_resumed(killed_run: Path):
    with (
        open_run_dir(killed_run).locked(),
        pytest.raises(ConfigError, match=f"run {killed_run} is still running; wait for it or stop it first"),
    ):
        resume.resume([f"run={killed_run}"])


def test_training_into_the_run_dir_of_another_config_is_rejected(killed_run: Path):
    config = composition.compose(
        [f"run_dir={killed_run}", f"threads={THREADS}", *TINY, EVERY_4_STEPS, "seed=5", "optimizer=adamw"]
    )
    with pytest.raises(ConfigError) as caught:
        resume.resume_if_same_config(open_run_dir(killed_run), config, Redactor())
    assert "optimizer.name changed from sgd to adamw; " in str(caught.value)
    assert f"seed changed from 0 to 5); use another run_dir, or make resume run={killed_run}" in str(caught.value)


def test_restarted_training_applies_overrides_that_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICTURES", str(tmp_path))
    config = composition.compose(
        ["data=folder", f"data.root={tmp_path}", "tracking.uri=http://me:secret@h:1", "seed=3"]
    )
    reference = Redactor({"data.root": "${oc.env:PICTURES}"}, {})
    for redactor, root in ((Redactor(), tmp_path), (reference, "${oc.env:PICTURES}")):
        overrides = resume.ignored_overrides(config, redactor)
        assert f"data.root='{root}'" in overrides and "tracking.uri='http://me:secret@h:1'" in overrides
        node = composition.from_stored(to_dict(config, Redactor()), overrides)
        assert composition.to_config(node).data == config.data
    assert not any(override.startswith(("seed", "run_dir", "data.manual_dir")) for override in overrides)


PATHS = ["/data/a(1)", "~ é = # & [ ] { } ,", "it's", "C:\\", "null", "7", " "]
ADDRESS = "postgresql://me:pw@h/db?sslmode=require&x=(1)"


@pytest.mark.parametrize("path", PATHS)
def test_restarted_training_takes_any_path_and_address(path: str):
    typed = [f"data.root={quote_value(path)}", f"tracking.uri={quote_value(ADDRESS)}", "gpu_memory=512"]
    config = composition.compose(["data=folder", *typed])
    overrides = resume.ignored_overrides(config, Redactor())
    resumed = composition.to_config(composition.from_stored(to_dict(config, Redactor()), overrides), is_stored=True)
    assert (resumed.data, resumed.tracking, resumed.gpu_memory) == (config.data, config.tracking, 512)


def test_redacted_value_must_be_given_again(killed_run: Path):
    stored = yaml.safe_load((killed_run / "config.yaml").read_text())
    stored["tracking"]["uri"] = composition.REDACTED
    with pytest.raises(ConfigError, match=r"tracking.uri was not stored with the run; pass it again: tracking"):
        composition.from_stored(stored, [])
    assert composition.from_stored(stored, ["tracking.uri=http://h:1"]).tracking.uri == "http://h:1"
