"""Whole runs that die and go on: to the same bits, in the same folder, or with a refusal that says why."""

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
import yaml

from support.commands import ROOT, THREADS, run_command
from support.waiting import wait_for
from train import models, resume
from train.config import composition
from train.config.compatibility import check_compatible
from train.config.schema import ConfigError
from train.config.serialization import Redactor, to_dict
from train.data import pipeline
from train.run import state, train_and_evaluate
from train.tracking import run_metadata, uploader
from train.tracking.journal import ReplayError, comparable
from train.tracking.run_dir import RunDir, create_run_dir, open_run_dir
from train.training import checkpoint
from train.training.loop import DivergedError, SignalHandler

# The quickest network to build.
TINY = [
    "model=vgg16",
    "model.head=fc",
    "model.width=0.1",
    "batch_size=16",
    "steps_per_epoch=6",
    "epochs=2",
    "tracking.every_steps=2",
    "evaluate.report=false",
]
EVERY = "checkpoint.every_steps=4"


@pytest.fixture(autouse=True)
def no_record(monkeypatch: pytest.MonkeyPatch):
    """Stories that are told in this process don't feed MLflow; commands do."""
    monkeypatch.setattr(uploader, "start", lambda *_: None)


class Dead(BaseException):
    """Stands for SIGKILL where the process has to live on: nobody catches it, nothing is saved any more."""


def begin(folder: Path, *words: str) -> dict[str, Any]:
    """The first life of a run; its summary."""
    config = composition.compose([f"run_dir='{folder}'", f"threads={THREADS}", *TINY, *words])
    return life(create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False), config, Redactor())


def go_on(folder: Path, *words: str, accepted: str = "") -> dict[str, Any]:
    """One more life, with the stored config and these words."""
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    node = composition.from_stored(stored, list(words))
    return life(
        open_run_dir(folder),
        composition.to_config(node),
        composition.make_redactor(node),
        frozenset(filter(None, accepted.split(","))),
    )


def life(folder: RunDir, config: Any, private: Redactor, accepted: frozenset[str] = frozenset()) -> dict[str, Any]:
    told = train_and_evaluate.RunSession(
        folder, config, private, SignalHandler(), accepted, run_metadata.initial_summary(folder, config)
    )
    train_and_evaluate.train_and_evaluate(told)
    return told.summary


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch):
    """dying(point, number) lets the next lives die there; dying(None) lets them live."""

    def die(name: str | None, number: int = 1) -> None:
        passed: dict[str, int] = {}

        def point(where: str, at: int | None = None) -> None:
            passed[where] = passed.get(where, 0) + 1
            if where == name and (passed[where] if at is None else at) == number:
                raise Dead

        monkeypatch.setattr(state.fault_injection, "fail_point", point)

    return die


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def the_same(first: Path, second: Path) -> bool:
    return list(map(comparable, journal(first))) == list(map(comparable, journal(second)))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody stops, with shifted crops."""
    patch = pytest.MonkeyPatch()
    patch.setattr(uploader, "start", lambda *_: None)
    folder = tmp_path_factory.mktemp("untouched") / "run"
    summary = begin(folder, EVERY)
    patch.undo()
    return folder, summary


# ------------------------------------------------------------------------------------------------- same in, same out


def test_loading_threads_prefetch_and_logging_change_no_bit(
    untouched: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "cores", lambda: 1)
    monkeypatch.setattr(pipeline, "PREFETCH", 7)
    other = begin(tmp_path / "run", "tracking.every_steps=1", "checkpoint.every_minutes=0.001")
    assert other["weights_sha256"] == untouched[1]["weights_sha256"]
    assert other["test"] == untouched[1]["test"]
    ends = [
        [comparable(line) for line in journal(path) if "validation/loss" in line["values"]]
        for path in (untouched[0], tmp_path / "run")
    ]
    assert len(ends[0]) == 2
    assert ends[0] == ends[1]


def test_compute_threads_belong_to_the_config():
    """They change bits, so that the same hash must not stand for both."""
    from train.config.serialization import config_hash

    one, two = (composition.compose([f"threads={number}"]) for number in (1, 2))
    assert config_hash(one, Redactor()) != config_hash(two, Redactor())


# -------------------------------------------------------------------------------------------------------- going on


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
def test_a_run_that_died_goes_on_to_the_same_bits(
    point: str, number: int, executed: int, untouched: tuple[Path, dict], tmp_path: Path, dying: Any
):
    folder, (path, summary) = tmp_path / "run", untouched
    dying(point, number)
    with pytest.raises(Dead):
        begin(folder, EVERY)
    dying(None)
    second = go_on(folder)
    assert second["weights_sha256"] == summary["weights_sha256"]
    assert second["test"] == summary["test"]
    assert the_same(folder, path)
    assert (second["attempts"], second["steps"], second["steps_executed"]) == (2, 12, executed)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict]:
    """The words of a run that learns in two stages, with all that an optimizer remembers; its summary."""
    place = tmp_path_factory.mktemp("staged")
    models.build("vgg16", (32, 32, 1), 10, width=0.1, head="fc").save(place / "start.keras")
    words = [
        EVERY, f"model.weights={place / 'start.keras'}", "fine_tune.layer_decay=0.7", "optimizer=adamw", "ema=0.9",
        "gradient_accumulation=2", "evaluate.test=false",
        "fine_tune.stages=[{epochs:1,from_part:head,learning_rate_factor:1},"
        "{epochs:1,from_part:all,learning_rate_factor:0.5}]",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploader, "start", lambda *_: None)
        return words, begin(place / "run", *words)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 7, 9])  # in the first stage; in the second, from before it, and from within it
def test_a_run_in_stages_that_died_goes_on_to_the_same_bits(
    step: int, staged: tuple[list[str], dict], tmp_path: Path, dying: Any, capsys: pytest.CaptureFixture
):
    words, summary = staged
    dying("step", step)
    with pytest.raises(Dead):
        begin(tmp_path / "run", *words)
    assert (
        "weights: 13 layers loaded, block1_conv1 to block5_conv3; "
        "new: aux_1_conv, aux_1_bn, aux_2_conv, aux_2_bn, fc1, fc2, aux_predictions, predictions"
    ) in capsys.readouterr().out.splitlines()
    dying(None)
    assert go_on(tmp_path / "run")["weights_sha256"] == summary["weights_sha256"]


@pytest.mark.slow
def test_a_pupil_that_died_goes_on_to_the_same_bits(untouched: tuple[Path, dict], tmp_path: Path, dying: Any):
    words = [EVERY, f"distill.teacher={untouched[0]}", "model.width=0.05", "evaluate.test=false"]
    whole = begin(tmp_path / "whole", *words)
    dying("step", 7)
    with pytest.raises(Dead):
        begin(tmp_path / "run", *words)
    dying(None)
    assert go_on(tmp_path / "run")["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_without_a_checkpoint_it_starts_over_in_the_same_folder(
    untouched: tuple[Path, dict], tmp_path: Path, dying: Any
):
    dying("step", 3)
    with pytest.raises(Dead):
        begin(tmp_path / "run", EVERY)
    dying(None)
    summary = go_on(tmp_path / "run")
    assert summary["weights_sha256"] == untouched[1]["weights_sha256"]
    assert the_same(tmp_path / "run", untouched[0])
    assert summary["steps_executed"] == 3 + 12


def test_damaged_checkpoints_are_stepped_over(untouched: tuple[Path, dict], tmp_path: Path, dying: Any):
    dying("step", 9)
    with pytest.raises(Dead):
        begin(tmp_path / "run", EVERY)
    dying(None)
    _, second = sorted((tmp_path / "run/checkpoints").iterdir())
    content = bytearray((second / checkpoint.ARRAYS).read_bytes())
    content[len(content) // 2] ^= 1
    (second / checkpoint.ARRAYS).write_bytes(content)
    summary = go_on(tmp_path / "run")
    assert summary["weights_sha256"] == untouched[1]["weights_sha256"]
    assert summary["steps_executed"] == 9 + 8
    assert (second.parent / f"damaged-{second.name}").is_dir()


def test_other_bits_are_an_error_that_names_the_step(tmp_path: Path, dying: Any):
    """As they come from another machine: here a bit of the state is turned, and the checkpoint signed again."""
    folder = tmp_path / "run"
    dying("step", 7)
    with pytest.raises(Dead):
        begin(folder, EVERY)
    dying(None)
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
    with pytest.raises(ReplayError, match=r"must give the same bits, but in epoch 1 at step 6 .* was .*, is "):
        go_on(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after its first checkpoint."""
    patch = pytest.MonkeyPatch()
    patch.setattr(uploader, "start", lambda *_: None)

    def point(where: str, at: int | None = None) -> None:
        if (where, at) == ("step", 7):
            raise Dead

    patch.setattr(state.fault_injection, "fail_point", point)
    folder = tmp_path_factory.mktemp("halted") / "run"
    with pytest.raises(Dead):
        begin(folder, EVERY)
    patch.undo()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["batch_size=8"], "batch_size must stay as it was in the run, 16, got 8; leave it away, or add accept=batch_"),
        (["model.width=0.2"], "model.width must stay as it was in the run, 0.1, got 0.2"),
        (["tracking.every_steps=3"], "tracking.every_steps must stay as it was in the run, 2, got 3"),
        (["epochs=1"], "epochs must stay as it was in the run, 2, got 1"),
        (["epochs=two"], "epochs must be a whole number, got two; use e.g. epochs=12"),
        (["precision=float16"], "precision must be one of auto, float32, mixed_bfloat16, mixed_float16, got float16"),
        (["colour=red"], "colour is no key of this run; use one of run, accept, augment.cutmix, "),
        (["model=vgg16"], "model is no key of this run; use one of run, accept, "),
        (["again"], "words must be key=value, got again; use e.g. run=runs/latest"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_in_one_line(words: list[str], answer: str, halted: Path):
    before = contents(halted)
    with pytest.raises(ConfigError) as caught:
        resume.resume([f"run={halted}", *words])
    assert str(caught.value).startswith(answer)
    assert contents(halted) == before


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
def test_another_ground_is_refused_and_named(name: str, value: str, halted: Path):
    """A real checkpoint's ground has all these names in it."""
    [path] = (halted / "checkpoints").iterdir()
    ground = checkpoint.read_checkpoint(path).metadata["provenance"]
    now = ground[name]
    with pytest.raises(ConfigError) as caught:
        check_compatible(ground | {name: value}, ground, frozenset())
    assert str(caught.value) == (
        f"a run goes on as it was, but {name} was {value}, is {now}; put it back, or use make resume accept={name}"
    )


def test_a_ground_that_was_accepted_is_recorded_and_begins_a_branch(halted: Path, tmp_path: Path):
    folder = tmp_path / "run"
    run_command("cp", "-r", str(halted), str(folder))
    [path] = (folder / "checkpoints").iterdir()
    saved = checkpoint.read_checkpoint(path)
    (folder / "provenance.json").write_text(
        json.dumps(saved.metadata["provenance"] | {"code": "0123", "version.keras": "3.0"})
    )
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"code was 0123, is \w+; version.keras was 3.0, is .* accept=code,version.k"):
        go_on(folder)
    with pytest.raises(ConfigError, match=r"but version.keras was 3.0, is .* accept=code,version.keras$"):
        go_on(folder, accepted="code")
    assert contents(folder) == before
    summary = go_on(folder, accepted="code,version.keras")
    assert [sentence.partition(" is")[0] for sentence in summary["changes"]] == [
        "code was 0123,", "version.keras was 3.0,",
    ]  # fmt: skip
    lines = journal(folder)
    old = len(before[str(folder / "metrics.jsonl")].splitlines())
    assert all("branch" not in line for line in lines[:old])
    assert {tuple(line["branch"]) for line in lines[old:]} == {(2, 0)}
    assert lines[old]["step"] == 6  # the steps after the checkpoint at 4 are recorded anew, on the branch


@pytest.mark.slow
def test_a_branch_that_has_lost_its_checkpoints_is_begun_anew(halted: Path, tmp_path: Path, dying: Any):
    """The run starts before a change that was accepted: what it does now can't be compared with what came of that."""
    folder = tmp_path / "run"
    run_command("cp", "-r", str(halted), str(folder))
    dying("step", 11)
    with pytest.raises(Dead):
        go_on(folder, "optimizer.momentum=0.5", accepted="optimizer.momentum")
    dying(None)
    for path in (folder / "checkpoints").glob("epoch-*"):
        (path / checkpoint.MANIFEST).unlink()
    summary = go_on(folder)
    assert summary["changes"][0] == "optimizer.momentum was 0.9, is 0.5"
    assert summary["changes"][1].startswith("journal_lines was ")
    branches = [tuple(line.get("branch", (0, 0))) for line in journal(folder)]
    assert sorted(set(branches)) == [(0, 0), (1, 0), (2, 0)]
    assert branches == sorted(branches)
    assert (summary["steps"], summary["attempts"]) == (12, 3)


def test_more_epochs_are_fine_and_recorded(tmp_path: Path):
    """A finished run goes on from its end; a second life of that needs no words any more."""
    folder = tmp_path / "run"
    first = begin(folder, "schedule=constant")
    (folder / "summary.json").write_text(json.dumps(first | {"status": "finished", "time": time.time()}))
    assert resume.resume([f"run={folder}"]) == 0
    second = go_on(folder, "epochs=3")
    assert (second["epochs"], second["steps"], second["steps_executed"]) == (3, 18, 18)
    assert second["changes"] == ["epochs was 2, is 3"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 3
    whole = begin(tmp_path / "whole", "schedule=constant", "epochs=3")
    assert second["weights_sha256"] == whole["weights_sha256"]


def test_a_finished_run_says_so_before_tensorflow_is_loaded(tmp_path: Path, halted: Path):
    folder = tmp_path / "run"
    run_command("cp", "-r", str(halted), str(folder))
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
    done = run_command("make", "resume", f"run={folder}")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"the run is finished: {folder}; to train longer: make resume run={folder} epochs=NUMBER\n"
    loaded = (
        f"import sys; from train.resume import resume; code = resume(['run={folder}']);"
        "print(code, *sorted({'tensorflow', 'keras', 'mlflow'} & set(sys.modules)))"
    )
    assert run_command(sys.executable, "-c", loaded).last_line == "0"


def test_a_run_that_is_alive_is_refused(halted: Path):
    with open_run_dir(halted).locked(), pytest.raises(ConfigError, match=f"run must not be alive, got {halted}, where"):
        resume.resume([f"run={halted}"])


def test_training_into_the_folder_of_another_config_is_refused(halted: Path):
    config = composition.compose([f"run_dir={halted}", f"threads={THREADS}", *TINY, EVERY, "seed=5", "optimizer=adamw"])
    with pytest.raises(ConfigError) as caught:
        resume.resume_if_same_config(open_run_dir(halted), config, Redactor())
    assert "optimizer.name was sgd, is adamw; " in str(caught.value)
    assert f"seed was 0, is 5; use another run_dir, or make resume run={halted}" in str(caught.value)


def test_training_again_takes_what_may_differ_from_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICTURES", str(tmp_path))
    config = composition.compose(
        ["data=folder", f"data.root={tmp_path}", "tracking.uri=http://me:secret@h:1", "seed=3"]
    )
    reference = Redactor({"data.root": "${oc.env:PICTURES}"}, {})
    for private, root in ((Redactor(), tmp_path), (reference, "${oc.env:PICTURES}")):
        words = resume.ignored_overrides(config, private)
        assert f"data.root={root}" in words and "tracking.uri=http://me:secret@h:1" in words
        node = composition.from_stored(to_dict(config, Redactor()), words)
        assert composition.to_config(node).data == config.data
    assert not any(word.startswith(("seed", "run_dir", "data.manual_dir")) for word in words)


def test_a_value_from_the_environment_that_was_not_stored_has_to_be_given(halted: Path):
    stored = yaml.safe_load((halted / "config.yaml").read_text())
    stored["tracking"]["uri"] = composition.REDACTED
    with pytest.raises(ConfigError, match=r"tracking.uri must be given again, since it was not stored; use tracking"):
        composition.from_stored(stored, [])
    assert composition.from_stored(stored, ["tracking.uri=http://h:1"]).tracking.uri == "http://h:1"


# ----------------------------------------------------------------------------------------------- numbers gone bad


def test_a_run_that_diverges_stops_with_advice_and_no_bad_checkpoint(tmp_path: Path):
    words = ["optimizer.learning_rate=1e25", "schedule.warmup_epochs=0", "checkpoint.every_steps=1"]
    with pytest.raises(DivergedError) as caught:
        begin(tmp_path / "run", *words)
    assert str(caught.value) == (
        "the loss must stay finite, but did not in epoch 1 at step 2; the last good checkpoint is "
        "epoch-00000-batch-0000001; use a lower optimizer.learning_rate, a gradient_clip, on_divergence=rollback, "
        "or precision=float32"
    )
    [path] = (tmp_path / "run/checkpoints").iterdir()
    assert all(np.isfinite(array).all() for array in checkpoint.read_checkpoint(path).arrays.values())


@pytest.mark.slow
def test_a_rollback_lowers_the_learning_rate_and_is_recorded(tmp_path: Path, dying: Any):
    """Killed after it, the run comes to the same bits."""
    words = [
        "optimizer.learning_rate=1e25", "schedule=constant", "schedule.warmup_epochs=0", "on_divergence=rollback",
        "rollback.learning_rate_factor=1e-27", EVERY,
    ]  # fmt: skip
    summary = begin(tmp_path / "run", *words)
    assert (summary["rollbacks"], summary["steps"]) == (1, 12)
    lines = journal(tmp_path / "run")
    [told] = [line for line in lines if "rollback/number" in line["values"]]
    assert told["values"] == {"rollback/number": 1.0, "rollback/learning_rate_factor": 1e-27, "rollback/to_step": 0.0}
    assert (told["step"], told["branch"]) == (2, [0, 1])
    assert lines[-3]["values"]["learning_rate"] == pytest.approx(0.01)
    dying("step", 9)
    with pytest.raises(Dead):
        begin(tmp_path / "killed", *words)
    dying(None)
    second = go_on(tmp_path / "killed")
    assert second["weights_sha256"] == summary["weights_sha256"]
    assert the_same(tmp_path / "killed", tmp_path / "run")


def test_rollbacks_come_to_an_end(tmp_path: Path):
    words = ["optimizer.learning_rate=1e25", "schedule.warmup_epochs=0", "on_divergence=rollback", "rollback.at_most=2"]
    with pytest.raises(DivergedError, match=r"did not in epoch 1 at step 2 after 2 rollbacks; the last good check"):
        begin(tmp_path / "run", *words)
    numbers = [line["values"].get("rollback/number") for line in journal(tmp_path / "run")]
    assert [number for number in numbers if number] == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize(
    ("fill_at", "answer"),
    [(3, "can't be written (No space left on device); mend that, then: make resume run="),
     pytest.param(7, "the summary could not be written to {} (No space left on device); mend that",
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on(
    fill_at: int,
    answer: str,
    untouched: tuple[Path, dict],
    tiny_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Full before the first checkpoint, and after it: nothing that was good is lost."""
    disk = tiny_disk("16m")

    def point(where: str, at: int | None = None) -> None:
        if (where, at) == ("step", fill_at):
            with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    monkeypatch.setattr(state.fault_injection, "fail_point", point)
    config = composition.compose([f"run_dir={disk / 'run'}", f"threads={THREADS}", *TINY, EVERY])
    folder = create_run_dir(config.run_dir, ROOT / "runs", "tests", latest=False)
    assert train_and_evaluate.run_session(folder, config, Redactor()) == 1
    told = capsys.readouterr().err
    assert answer.format(disk / "run") in told
    assert "Traceback" not in told
    if fill_at == 7:
        [saved] = (disk / "run/checkpoints").glob("epoch-*")
        assert checkpoint.read_checkpoint(saved).metadata["progress"]["steps"] == 4
        assert "a checkpoint could not be written to" in told
    (disk / "filler").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(uploader, "start", lambda *_: None)
    summary = go_on(disk / "run")
    assert summary["weights_sha256"] == untouched[1]["weights_sha256"]
    assert summary["test"] == untouched[1]["test"]
    assert the_same(disk / "run", untouched[0])


# --------------------------------------------------------------------------------------------- through the commands


def test_sigterm_saves_and_resume_comes_to_the_same_bits(tmp_path: Path, untouched: tuple[Path, dict]):
    """A real process, a real signal, a real store: exit code 143 in the middle of training, one MLflow run, twice
    alive.
    """
    from mlflow import MlflowClient

    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [
        f"threads={THREADS}", *TINY, "checkpoint.every_epochs=2", "tracking.log_model=false",
        f"run_dir={folder}", f"tracking.uri={uri}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "metrics.jsonl").exists() or '"step": 2' not in (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert all("the MLflow record is " in line for line in err.splitlines())  # it may be late on a busy machine
    assert f"to go on: make resume run={folder}" in out
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
        [found] = client.search_runs([experiment.experiment_id])
        return found

    wait_for(lambda: recorded().info.status == "KILLED", 300)
    done = run_command("make", "resume", f"run={folder}")
    assert done.code == 0, done.err
    second = json.loads((folder / "summary.json").read_text())
    assert second["weights_sha256"] == untouched[1]["weights_sha256"]
    assert second["steps_executed"] == 12  # nothing is done again after a signal
    assert the_same(folder, untouched[0])
    assert (recorded().info.status, recorded().data.tags["attempts"]) == ("FINISHED", "2")
    assert "failure" not in recorded().data.tags
    points = client.get_metric_history(recorded().info.run_id, "train/loss")
    assert [point.step for point in points] == [2, 4, 6, 8, 10, 12]


def torture(*words: str, timeout: float = 3600) -> tuple[int, str, dict[str, Any]]:
    report = Path(words[-1])
    done = run_command(sys.executable, "scripts/stress/runs.py", *words[:-1], "--report", str(report), timeout=timeout)
    return done.code, done.out + done.err, json.loads(report.read_text())


@pytest.mark.slow
def test_killed_at_drawn_instants_it_ends_the_same(tmp_path: Path):
    """The short version of `make stress`."""
    words = ["--kills", "2", "--workers", "1", "--cases", "dropout and augmentation", str(tmp_path / "report.json")]
    code, told, report = torture(*words)
    assert code == 0, told
    assert report["identical"] == report["kills"] >= 2
    trial = next(trial for trial in report["trials"] if trial["counts"])
    assert trial["steps"] < trial["steps_executed"] <= trial["steps"] + len(trial["kills"]) * (6 + 6)  # see WRITING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("inception_v1", ["seeds"]),  # of its dropout
        ("dropout and augmentation", ["optimizer", "metrics", "statistics"]),  # the quickest; only its name has dropout
    ],
)
def test_the_torture_notices_what_a_checkpoint_has_lost(case: str, lost: list[str], tmp_path: Path):
    """Each of these by itself, in a run that is killed once."""
    words = ["--kills", "1", "--workers", "1", "--cases", case, "--forget", ",".join(lost)]
    code, told, report = torture(*words, str(tmp_path / "report.json"))
    assert code == 1, told
    assert report["differing"] == report["kills"] >= len(lost)
    assert [trial["forget"] for trial in report["trials"]] == lost
    for trial in report["trials"]:  # it is the bits that are noticed
        assert any(" differs, see " in said or "must give the same bits" in said for said in trial["differences"])
    [kept] = re.findall(r"what differs is kept in (\S+)", told)
    assert len(list(Path(kept).glob("* 1 *"))) >= len(lost)
    shutil.rmtree(kept)
