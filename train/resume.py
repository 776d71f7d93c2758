"""`make resume [run=<run folder>] [epochs=...]`: goes on with an unfinished run, in its folder and its MLflow run.

The stored config is read, never conf/. Bits, journal and record become those of a run that was never stopped.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from train.cli import arguments
from train.config import composition
from train.config.compatibility import IGNORED_KEYS, differing_keys, unaccepted_changes
from train.config.schema import ROOT, Config, ConfigError, Sweep
from train.config.serialization import RUN_FORMAT_VERSION, Redactor, flatten, to_dict
from train.tracking import address
from train.tracking.run_dir import RunDir, latest_unfinished, open_run_dir

COMMAND_KEYS = ("run", "accept")
POST_TRAINING_KEYS = (
    "evaluate.test",
    "evaluate.report",
    "tracking.log_model",
)  # what a finished run may still be asked for


def resume(argv: list[str]) -> int:
    """`run`: the folder (default: the newest unfinished run below runs/). `accept`: names, separated by commas, of what
    may differ from the life before. Every other word is a key of the run's config.

    Raises: ValueError for whatever does not fit the run.
    """
    typed = dict(split_override(word) for word in argv)
    if "run" not in typed and typed.get("distributed.index", "0") != "0":
        raise ConfigError("run must be named where there are several processes, got none; use run=FOLDER for each")
    folder = open_run_dir(Path(typed["run"])) if "run" in typed else latest_unfinished(ROOT / "runs")
    accepted = frozenset(filter(None, typed.get("accept", "").split(",")))
    return resume_run(folder, [word for word in argv if split_override(word)[0] not in COMMAND_KEYS], accepted)


def resume_run(
    folder: RunDir, overrides: list[str], accepted_changes: frozenset[str], sweep: Sweep | None = None
) -> int:
    """One more life; the exit code. sweep: what a sweep wants of it."""
    stored = folder.config()
    node = composition.from_stored(stored, overrides)
    private = composition.make_redactor(node)
    with composition.redacting_errors(private):
        config = composition.to_config(node, is_stored=True)
        config.sweep = sweep or config.sweep
        before, now = flatten(stored), flatten(to_dict(config, private))
        check_overrides(before, now, accepted_changes)
    leads = config.distributed.index == 0
    if leads and folder.is_running():
        raise ConfigError(f"run must not be alive, got {folder.path}, where a process is at work; wait, or end it")
    if is_complete(folder, before, now):
        again = f"make resume run={shlex.quote(str(folder.path))} epochs=NUMBER"
        print(f"the run is finished: {folder.path}; to train longer: {again}")
        return 0
    if folder.format_version() < RUN_FORMAT_VERSION:
        raise ConfigError(
            f"cannot resume {folder.path}: an older version of this project wrote it (run format "
            f"{folder.format_version()}, this one resumes format {RUN_FORMAT_VERSION}); use that version, or start anew"
        )
    if leads and "tracking.uri" not in {split_override(word)[0] for word in overrides}:
        address.use_stored_uri(folder, config.tracking.uri)
    from train.run import factory
    from train.run import train_and_evaluate as story

    factory.check_files(config)
    factory.check_sources(config)
    return story.run_session(folder, config, private, accepted_changes) if leads else story.run_worker(config, private)


def is_complete(folder: RunDir, previous: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether the run has nothing to do any more. before, now: its config, flat, as stored and as it is wanted."""
    wanting = any(current[name] and not previous.get(name) for name in POST_TRAINING_KEYS)
    return folder.status() == "finished" and current["epochs"] <= previous["epochs"] and not wanting


def resume_if_same_config(folder: RunDir, config: Config, redactor: Redactor) -> int:
    """`make train` with the folder of a run that is there: goes on if it is the same config.

    Raises: ConfigError naming what is another.
    """
    if found := config_differences(folder, config, redactor):
        raise ConfigError(
            f"run_dir must be a folder without a run, or with one of the same config, got {folder.path}, where "
            f"{'; '.join(found)}; use another run_dir, or make resume run={shlex.quote(str(folder.path))}"
        )
    return resume_run(folder, ignored_overrides(config, redactor), frozenset(), config.sweep)


def config_differences(folder: RunDir, config: Config, redactor: Redactor) -> list[str]:
    """What is not as it was typed for the run, in words."""
    before, now = folder.identity()["typed"], flatten(to_dict(config, redactor))
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing_keys(before, now)]


def ignored_overrides(config: Config, redactor: Redactor) -> list[str]:
    """What may differ in the folder of a run that is there, and what refers to the environment, as words.

    An address keeps its password.
    """
    references = {name: value for name, value in redactor.references.items() if value != composition.REDACTED}
    typed = flatten(dataclasses.asdict(config)) | references
    names = dict.fromkeys((*IGNORED_KEYS, *references))
    return [f"{name}={typed[name]}" for name in names if name != "run_dir" and typed.get(name) is not None]


def check_overrides(previous: dict[str, Any], current: dict[str, Any], accepted_changes: frozenset[str]) -> None:
    """More epochs are fine; whatever else changes a bit has to be accepted by name."""
    for name in unaccepted_changes(previous, current, accepted_changes):
        raise ConfigError(
            f"{name} must stay as it was in the run, {previous.get(name)}, got {current[name]}; "
            f"leave it away, or add accept={name} to go on with another run than was begun"
        )


def split_override(override: str) -> tuple[str, str]:
    """Raises: ConfigError if it is no key=value."""
    name, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"words must be key=value, got {override}; use e.g. run=runs/latest")
    return name, value


if __name__ == "__main__":
    arguments.main(resume)
