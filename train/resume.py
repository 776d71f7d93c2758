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
from train.config.compatibility import FREE, changed, unaccepted
from train.config.schema import ROOT, Config, ConfigError, Sweep
from train.config.serialization import Private, flatten, to_dict
from train.tracking import address
from train.tracking.run_dir import RunFolder, newest_unfinished, open_folder

OWN = ("run", "accept")
LATER = ("evaluate.test", "evaluate.report", "tracking.log_model")  # what a finished run may still be asked for


def resume(words: list[str]) -> int:
    """`run`: the folder (default: the newest unfinished run below runs/). `accept`: names, separated by commas, of what
    may differ from the life before. Every other word is a key of the run's config.

    Raises: ValueError for whatever does not fit the run.
    """
    typed = dict(split(word) for word in words)
    if "run" not in typed and typed.get("distributed.index", "0") != "0":
        raise ConfigError("run must be named where there are several processes, got none; use run=FOLDER for each")
    folder = open_folder(Path(typed["run"])) if "run" in typed else newest_unfinished(ROOT / "runs")
    accepted = frozenset(filter(None, typed.get("accept", "").split(",")))
    return go_on(folder, [word for word in words if split(word)[0] not in OWN], accepted)


def go_on(folder: RunFolder, words: list[str], accepted: frozenset[str], sweep: Sweep | None = None) -> int:
    """One more life; the exit code. sweep: what a sweep wants of it."""
    stored = folder.config()
    node = composition.stored(stored, words)
    private = composition.private(node)
    with composition.hiding(private):
        config = composition.to_config(node, stored=True)
        config.sweep = sweep or config.sweep
        before, now = flatten(stored), flatten(to_dict(config, private))
        refuse_words(before, now, accepted)
    leads = config.distributed.index == 0
    if leads and folder.alive():
        raise ConfigError(f"run must not be alive, got {folder.path}, where a process is at work; wait, or end it")
    if is_over(folder, before, now):
        again = f"make resume run={shlex.quote(str(folder.path))} epochs=NUMBER"
        print(f"the run is finished: {folder.path}; to train longer: {again}")
        return 0
    if leads and "tracking.uri" not in {split(word)[0] for word in words}:
        address.use_stored(folder, config.tracking.uri)
    from train.run import factory
    from train.run import train_and_evaluate as story

    factory.check_files(config)
    factory.check_sources(config)
    return story.live(folder, config, private, accepted) if leads else story.follow(config, private)


def is_over(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the run has nothing to do any more. before, now: its config, flat, as stored and as it is wanted."""
    wanting = any(now[name] and not before.get(name) for name in LATER)
    return folder.status() == "finished" and now["epochs"] <= before["epochs"] and not wanting


def train_again(folder: RunFolder, config: Config, private: Private) -> int:
    """`make train` with the folder of a run that is there: goes on if it is the same config.

    Raises: ConfigError naming what is another.
    """
    if found := differing(folder, config, private):
        raise ConfigError(
            f"run_dir must be a folder without a run, or with one of the same config, got {folder.path}, where "
            f"{'; '.join(found)}; use another run_dir, or make resume run={shlex.quote(str(folder.path))}"
        )
    return go_on(folder, free_words(config, private), frozenset(), config.sweep)


def differing(folder: RunFolder, config: Config, private: Private) -> list[str]:
    """What is not as it was typed for the run, in words."""
    before, now = folder.identity()["typed"], flatten(to_dict(config, private))
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed(before, now)]


def free_words(config: Config, private: Private) -> list[str]:
    """What may differ in the folder of a run that is there, and what refers to the environment, as words.

    An address keeps its password.
    """
    references = {name: value for name, value in private.stored.items() if value != composition.HIDDEN}
    typed = flatten(dataclasses.asdict(config)) | references
    names = dict.fromkeys((*FREE, *references))
    return [f"{name}={typed[name]}" for name in names if name != "run_dir" and typed.get(name) is not None]


def refuse_words(before: dict[str, Any], now: dict[str, Any], accepted: frozenset[str]) -> None:
    """More epochs are fine; whatever else changes a bit has to be accepted by name."""
    for name in unaccepted(before, now, accepted):
        raise ConfigError(
            f"{name} must stay as it was in the run, {before.get(name)}, got {now[name]}; "
            f"leave it away, or add accept={name} to go on with another run than was begun"
        )


def split(word: str) -> tuple[str, str]:
    """Raises: ConfigError if it is no key=value."""
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"words must be key=value, got {word}; use e.g. run=runs/latest")
    return name, value


if __name__ == "__main__":
    arguments.run(resume)
