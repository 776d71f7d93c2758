"""`make resume [run=<run folder>] [epochs=...]`: resumes an unfinished run, in its folder and its MLflow run.

    make resume
    make resume run=runs/latest epochs=20
    make resume run=runs/latest batch_size=64 accept=batch_size

The run's stored config is used, never conf/. The result has the bits, journal and record of an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from train.cli import arguments
from train.cli.arguments import typed_keys
from train.cli.fields import fields_by_key, setting
from train.config import composition
from train.config.compatibility import IGNORED_KEYS, differing_keys, unaccepted_changes
from train.config.schema import ROOT, Config, ConfigError, Sweep
from train.config.serialization import RUN_FORMAT_VERSION, Redactor, flatten, format_override, to_dict
from train.storage.json_types import JsonObject
from train.tracking import address
from train.tracking.run_dir import RunDir, latest_unfinished, open_run_dir

POST_TRAINING_KEYS = ("evaluate.test", "evaluate.report", "tracking.log_model")  # a finished run can still do these


@dataclass
class Resume:
    """The keys of `make resume`."""

    run: str | None = setting(None, "folder of the run; none: the newest unfinished run below runs/")
    accept: str = setting("", "changes to allow since the previous attempt, by name, separated by commas")


COMMAND_KEYS = tuple(fields_by_key(Resume))


def resume(argv: list[str]) -> int:
    """Resumes a run; returns the exit code. Raises: ValueError for what does not fit the run."""
    keys, others = arguments.parse_known(Resume, argv)
    process = {override.key: override.value for override in others}.get("distributed.index", "0")
    if keys.run is None and process != "0":
        raise ConfigError("run is missing; with several processes, each needs run=FOLDER")
    run_dir = open_run_dir(Path(keys.run)) if keys.run is not None else latest_unfinished(ROOT / "runs")
    accepted_changes = frozenset(filter(None, keys.accept.split(",")))
    return resume_run(run_dir, list(map(str, others)), accepted_changes)


def resume_run(
    run_dir: RunDir, overrides: list[str], accepted_changes: frozenset[str], sweep: Sweep | None = None
) -> int:
    """Starts another attempt at a run; returns the exit code. sweep: replaces the sweep settings of the config."""
    if run_dir.format_version() < RUN_FORMAT_VERSION:
        return report_old_format(run_dir)
    stored = run_dir.config()
    node = composition.from_stored(stored, overrides, command_keys=COMMAND_KEYS)
    redactor = composition.make_redactor(node)
    with composition.redacting_errors(redactor):
        config = composition.to_config(node, is_stored=True)
        config.sweep = sweep or config.sweep
        previous = flatten(stored)
        current = flatten(to_dict(config, redactor))
        check_overrides(previous, current, accepted_changes)
    is_leader = config.distributed.index == 0
    if is_leader and run_dir.is_running():
        raise ConfigError(f"run {run_dir.path} is still running; wait for it or stop it first")
    if is_complete(run_dir, previous, current):
        command = f"make resume run={shlex.quote(str(run_dir.path))} epochs=NUMBER"
        print(f"the run is finished: {run_dir.path}; to train longer: {command}")
        return 0
    if is_leader and "tracking.uri" not in typed_keys(overrides):
        address.use_stored_uri(run_dir, config.tracking.uri)
    from train.run import factory, lifecycle

    factory.check_files(config)
    factory.check_sources(config)
    if is_leader:
        return lifecycle.continue_run(run_dir, config, redactor, accepted_changes)
    return lifecycle.run_worker(config, redactor)


def report_old_format(run_dir: RunDir) -> int:
    """Says that a run is finished. Raises: ConfigError if it is not: only the version that wrote it can resume it."""
    if run_dir.status() == "finished":
        print(f"the run is finished: {run_dir.path}")
        return 0
    raise ConfigError(
        f"cannot resume {run_dir.path}: it was written by an older version (run format {run_dir.format_version()}, "
        f"this version resumes format {RUN_FORMAT_VERSION}); use that version, or start a new run"
    )


def is_complete(run_dir: RunDir, previous: JsonObject, current: JsonObject) -> bool:
    """Whether nothing is left to do. previous, current: the flattened config, as stored and with overrides."""
    has_new_task = any(current[name] and not previous.get(name) for name in POST_TRAINING_KEYS)
    return run_dir.status() == "finished" and current["epochs"] <= previous["epochs"] and not has_new_task


def resume_if_same_config(run_dir: RunDir, config: Config, redactor: Redactor) -> int:
    """Resumes the run in the folder that `make train` was given, if it has the same config.

    Raises: ConfigError naming the differences.
    """
    if run_dir.format_version() < RUN_FORMAT_VERSION:
        return report_old_format(run_dir)
    if differences := config_differences(run_dir, config, redactor):
        raise ConfigError(
            f"run_dir {run_dir.path} contains a run with another config ({'; '.join(differences)}); "
            f"use another run_dir, or make resume run={shlex.quote(str(run_dir.path))}"
        )
    return resume_run(run_dir, ignored_overrides(config, redactor), frozenset(), config.sweep)


def config_differences(run_dir: RunDir, config: Config, redactor: Redactor) -> list[str]:
    """Describes every key whose value is not the one the run was started with."""
    previous = run_dir.identity()["typed"]
    current = flatten(to_dict(config, redactor))
    return [
        f"{name} changed from {previous.get(name)} to {current.get(name)}" for name in differing_keys(previous, current)
    ]


def ignored_overrides(config: Config, redactor: Redactor) -> list[str]:
    """Overrides for the keys that may differ on resume, and for those that refer to environment variables.

    An address keeps its password.
    """
    references = {name: value for name, value in redactor.references.items() if value != composition.REDACTED}
    typed = flatten(dataclasses.asdict(config)) | references
    names = dict.fromkeys((*IGNORED_KEYS, *references))
    return [format_override(name, typed[name]) for name in names if name != "run_dir" and typed.get(name) is not None]


def check_overrides(previous: JsonObject, current: JsonObject, accepted_changes: frozenset[str]) -> None:
    """Rejects changes that affect the bits and were not accepted by name; more epochs are always allowed."""
    for name in unaccepted_changes(previous, current, accepted_changes):
        raise ConfigError(
            f"{name} is {previous.get(name)} in this run, got {current[name]}; "
            f"omit it, or pass accept={name} to continue with a different setting"
        )


if __name__ == "__main__":
    arguments.main(
        resume,
        Resume,
        other_keys="All other keys override the run's config: epochs, tracking.uri, data.root, ...; see make train "
        "ARGS=--help. Keys that change the result must also be named in accept.",
    )
