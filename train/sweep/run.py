"""The story of a sweep: words -> trials, frozen -> each run in a process of its own -> what came of them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from train.cli.progress import say
from train.config import composition
from train.config import schema as schema
from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import config_hash, to_dict, without_secrets
from train.config.validation import check
from train.evaluation.report import PAGE
from train.run.factory import check_files, check_sources
from train.runtime.setup import cores
from train.sweep import ray_workers, search, search_space, trials
from train.sweep.live_table import Table
from train.sweep.mlflow_parent import SweepRecord
from train.sweep.search import Plan
from train.sweep.search_space import Axis
from train.sweep.trials import SweepFolder, Trial
from train.sweep.workers import ADDRESS, REFERENCES, STOPPED, Ended, Slots, Wish, visible_gpus
from train.tracking import uploader
from train.tracking.run_metadata import shell_path, short

JOBS = "jobs"  # where another launcher keeps what it has to keep
FROZEN = ("search", "trials", "seeds", "first_epochs", "reduction")  # settings that say which trials there are
# What chooses must not see the test, nor are pictures drawn of it; the best gets all of it.
QUIET = {"evaluate.test": False, "evaluate.report": False, "tracking.log_model": False}
Compose = Callable[[list[str]], DictConfig]


@dataclass(frozen=True)
class Elsewhere:
    """Another launcher of Hydra's. launch: words of every job, number of the first one, a folder for what it keeps."""

    name: str
    launch: Callable[[list[list[str]], int, str], Any]


@dataclass
class Sweep:
    """One launcher's share of a sweep. elsewhere: who runs the trials, where they are not processes of this machine.

    trusted: references to the environment that were typed or stand in conf/ now.
    """

    folder: SweepFolder
    config: Config
    elsewhere: Elsewhere | None
    wish: Wish
    trusted: composition.References = frozenset()
    plan: Plan = field(init=False)
    failures: dict[int, tuple[Trial, str]] = field(default_factory=dict)
    again: list[Trial] = field(default_factory=list)
    tries: Counter = field(default_factory=Counter)

    @property
    def stopped(self) -> bool:
        """Whether it ends before its end."""
        return bool(self.wish.number) or (self.config.sweep.fail_fast and bool(self.failures))


def sweep(words: list[str], config: Config, loader: Any, composed: Compose, elsewhere: Elsewhere | None) -> int:
    """The exit code: 0 where all trials have finished, 1 where one has failed, 129, 130 and 143 stopped.

    words: as typed. config: what they have in common.

    Raises: ConfigError for whatever is wrong with any trial, before the first one begins.
    """
    check(config.sweep, "sweep.")
    if config.sweep.engine == "ray":
        ray_workers.check()
        share = max(1, cores() // parallel(config))
        elsewhere = Elsewhere("ray", partial(ray_workers.launch, cores=config.threads or share))
    if elsewhere is None:
        share_gpus(config)
    if config.tracking.uri is not None:
        os.environ[ADDRESS] = config.tracking.uri
    runs = ROOT / "runs" / config.tracking.experiment
    folder = trials.find(runs, words, config.run_dir, fresh=config.sweep.fresh)
    if folder is None or config.sweep.dry_run:
        content, made, trusted = planned(words, config, loader, composed, local=elsewhere is None)
        if config.sweep.dry_run:
            say(*(f"{number}: {found['label']}" for number, found in enumerate(made, 1)), "the config is valid")
            return 0
        folder = trials.create(runs, words, config.run_dir, content, made)
    else:
        say(f"going on with a sweep as it was begun, whatever conf/ says now: {folder.path}")
        trusted = frozenset()
        if composition.references({name: folder.content[name] for name in ("axes", "bases")}):
            trusted = typed_references(*bases(words, config, loader, composed, local=elsewhere is None))
    os.environ[REFERENCES] = json.dumps(sorted(trusted))
    config = replace(config, sweep=replace(config.sweep, **folder.content["settings"]))
    wish = Wish()
    with folder.held(), nullcontext() if elsewhere else wish.heard():
        return tell(Sweep(folder, config, elsewhere, wish, trusted))


def tell(life: Sweep) -> int:
    """Runs what is left, and says what came of it."""
    folder, settings = life.folder, life.config.sweep
    storage = uploader.beside(life.config.tracking.uri, ROOT, "optuna.db")
    make_trials = partial(make, folder.content, settings, trusted=life.trusted)
    life.plan = search.plan(folder, settings, make_trials, storage)
    slots = Slots(parallel(life.config), settings.minutes, gpus(life.config))
    here = f"{len(slots.places)} at a time, each on {len(slots.places[0].cores)} of {cores()} cores"
    where = f"handed over to {life.elsewhere.name}" if life.elsewhere else here
    say(f"sweep: {life.plan.expected} trials, {where}")
    with SweepRecord(folder, life.config) as record, Table(folder, life.plan) as table:

        def told(trial: Trial, ended: Ended) -> bool:
            on = take(life, trial, ended)
            tidy(life)
            record.note(folder.trials, len(life.failures))
            table.tell(trial, ended, trial in life.again)
            return on

        def work(source: Callable[[], Trial | None]) -> None:
            if life.elsewhere is None:
                slots.work(source, told, lambda: table.show(slots), life.wish)
            else:
                hand_over(life, life.elsewhere, source, told)

        work(lambda: following(life))
        crowned = best(life)
        prune(life)
        crown(life, crowned, work)
        tidy(life)
        return close(life, record, crowned)


def following(life: Sweep) -> Trial | None:
    return life.again.pop(0) if life.again else life.plan.following()


def take(life: Sweep, trial: Trial, ended: Ended) -> bool:
    """What follows from the end of a trial; whether to go on with others."""
    settings = life.config.sweep
    if ended.code == 0:
        life.plan.ended(trial)
        return True
    if ended.why == STOPPED:
        return False
    if ended.again and life.tries[trial.number] < settings.retries:
        life.tries[trial.number] += 1
        life.again.append(halved(life.folder, trial) if ended.memory and settings.halve_batch else trial)
        return True
    life.failures[trial.number] = trial, ended.why
    life.plan.ended(trial)
    return not life.stopped


def halved(folder: SweepFolder, trial: Trial) -> Trial:
    """The trial with half the batch: another run, in a folder of its own."""
    size = max(1, trial.config["batch_size"] // 2)
    return folder.change(trial, config={**trial.config, "batch_size": size}, batch_halvings=trial.batch_halvings + 1)


def best(life: Sweep) -> list[Trial]:
    """The trials, one for every seed, of the point with the highest mean validation accuracy; the first of equals."""
    points: dict[int, list[Trial]] = {}
    for trial in life.folder.trials:
        points.setdefault(trial.point, []).append(trial)
    found = []
    for point, of_it in points.items():
        values = [value for trial in of_it if (value := trial.objective()) is not None]
        if len(values) == len(of_it):
            found.append((-fmean(values), point))
    return points[min(found)[1]] if found else []


def prune(life: Sweep) -> None:
    """Says of trials that others have beaten that they won't go on."""
    if life.stopped:
        return
    for trial in life.plan.left():
        run = trial.run()
        if run and "pruned" not in (summary := trial.summary()):
            why = f"pruned after epoch {trial.epochs_done()} of {trial.epochs()}: others did better"
            run.write_json("summary.json", summary | {"pruned": True, "failure": why})
            uploader.start(run, life.config.tracking.uri or uploader.default_uri(ROOT))


def tidy(life: Sweep) -> None:
    """Keeps of the checkpoints those that somebody may go on from: of what is not over, and of the best."""
    if life.config.sweep.keep_checkpoints:
        return
    needed = {trial.number for trial in best(life)}
    for trial in life.folder.trials:
        over = trial.state() == "finished" or "pruned" in trial.summary()
        if over and trial.number not in needed:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def crown(life: Sweep, crowned: list[Trial], work: Callable[[Callable[[], Trial | None]], None]) -> None:
    """The best gets what the others went without, and the user has not decided on: test, report, model in MLflow.

    That is for the final word: not as long as a trial that failed may still be the best, nor for a second trial.
    """
    keys = [name for name in QUIET if not typed(name, life.folder.content["identity"])]
    if not keys or not crowned or life.stopped:
        return
    if retryable := [trial for trial, _ in life.failures.values() if not trial.summary().get("config_error")]:
        words = " ".join(f"{name}=true" for name in keys)
        say(
            f"the best trial is not tested yet, since failed ones ({len(retryable)}) may still beat it; run the same "
            f"command again, or test it now: make resume run={shell_path(crowned[0].folder)} {words}"
        )
        return
    others = {trial.number for trial in life.folder.trials} - {trial.number for trial in crowned}
    tested = [trial for trial in life.folder.trials if trial.number in others and "test" in trial.summary()]
    if "evaluate.test" in keys and tested:
        say(f"the best trial is not tested: the test split was already used for {tested[0].label}")
        return
    word = f"sweep.final=[{','.join(keys)}]"
    left = [replace(trial, words=(word,)) for trial in crowned if not crowned_before(trial, keys)]
    if left:
        say(f"the best: {crowned[0].label}")
        life.again += left
        work(lambda: life.again.pop(0) if life.again else None)


def crowned_before(trial: Trial, keys: list[str]) -> bool:
    run = trial.run()
    return run is not None and all(
        {
            "evaluate.test": "test" in trial.summary(),
            "evaluate.report": (run.path / PAGE).exists(),
            "tracking.log_model": run.identity()["log_model"],
        }[name]
        for name in keys
    )


def hand_over(
    life: Sweep, elsewhere: Elsewhere, source: Callable[[], Trial | None], told: Callable[[Trial, Ended], bool]
) -> None:
    """Gives trials to another launcher: all of a grid at once, of a search as many as are to run at a time."""
    begun, on = 0, True
    most = None if life.config.sweep.search == "grid" else parallel(life.config)
    while on and (jobs := list(islice(iter(source, None), most))):
        try:
            elsewhere.launch([[trial.word, *trial.words] for trial in jobs], begun, str(life.folder.path / JOBS))
        except Exception as fault:  # of one job, in the launcher's own words; what became of each is in its folder
            why = " ".join(str(fault).split())[:500]
            if all(trial.state() == "waiting" for trial in jobs):
                raise ConfigError(f"hydra/launcher must be able to begin, got {elsewhere.name}: {why}") from None
            say(f"warning: {why}")
        begun += len(jobs)
        for trial in jobs:
            on = told(trial, ended_elsewhere(trial)) and on


def ended_elsewhere(trial: Trial) -> Ended:
    """How a trial has ended that was no process of ours."""
    state = trial.state()
    if state == "finished" or trial.paused():
        return Ended(0)
    if state == "failed":
        return Ended(1, trial.summary()["failure"])
    return Ended(1, f"its job has left no word in {trial.folder}", again=state == "interrupted")


def close(life: Sweep, record: SweepRecord, crowned: list[Trial]) -> int:
    """Says how it went. The exit code."""
    states = Counter("pruned" if found.summary().get("pruned") else found.state() for found in life.folder.trials)
    crowned = [found for found in crowned if found.objective() is not None]  # its test may have failed
    record.end("interrupted" if life.wish.number else "failed" if life.failures else "finished", crowned)
    for failed, why in life.failures.values():
        say(f"failed: {failed.label}: {why} ({short(failed.said())})")
    for found in crowned:
        test = found.summary().get("test")
        told = f", test accuracy {test['accuracy']:.4f}" if test else ""
        say(f"best: {found.label}  validation accuracy {found.objective():.4f}{told}  run={shell_path(found.folder)}")
    left = life.plan.expected - states["finished"] - states["pruned"] - len(life.failures)
    counts = [f"{states['finished']} finished", f"{len(life.failures)} failed"]
    counts += [f"{states['pruned']} pruned"] * bool(states["pruned"])
    counts += [f"{left} to go (the same command again)"] * (left > 0)
    size = sum(path.stat().st_size for path in life.folder.path.rglob("*") if path.is_file())
    say(f"sweep: {', '.join(counts)}, {size / 2**20:,.0f} MiB  {short(life.folder.path)}")
    return life.wish.code() or int(bool(life.failures))


# ------------------------------------------------------------------------------------------------------- what to run


def planned(
    words: list[str], config: Config, loader: Any, composed: Compose, *, local: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], composition.References]:
    """What a new sweep is made from, the trials that are known beforehand, and the references that were typed.

    Raises: ConfigError for a trial that can't be run, also for one that a search may come to.
    """
    settings = config.sweep
    found, axes = bases(words, config, loader, composed, local=local)
    trusted = typed_references(found, axes)
    content = {
        "settings": {name: getattr(settings, name) for name in FROZEN},
        "seed": config.seed,
        "epochs": config.epochs,
        "axes": [vars(axis) for axis in axes],
        "bases": found,
    }
    refuse(axes, config)
    if settings.search != "grid":
        for point in search_space.corners(axes):
            make(content, settings, point, trusted)
        return content, [], trusted
    made: dict[str, dict[str, Any]] = {}
    for number, point in enumerate(search_space.points(axes)):
        for trial in make(content, settings, point, trusted):
            if trial["key"] in made:
                say(f"given twice, run once: {trial['label']}")
            made.setdefault(trial["key"], trial | {"point": number})
    return content, list(made.values()), trusted


def bases(
    words: list[str], config: Config, loader: Any, composed: Compose, *, local: bool
) -> tuple[list[dict[str, Any]], list[Axis]]:
    """The configs that trials are made from, one for each choice of files in conf/; and what differs between trials."""
    space_words = (f"{name}={value}" for name, value in config.sweep.space.items() if not typed(name, words))
    common, axes = search_space.parse([*words, *space_words], loader)
    common += [word for word in (f"{name}={value}" for name, value in QUIET.items()) if not typed(word, words)]
    if local and config.threads is None and not typed("threads", words):
        common.append(f"threads={max(1, cores() // parallel(config))}")
    return [{"words": words, "config": base(composed, [*common, *words])} for words in search_space.choices(axes)], axes


def typed_references(bases: list[dict[str, Any]], axes: list[Axis]) -> composition.References:
    """The references to the environment that were typed or stand in conf/."""
    values = ({axis.key: list(axis.values)} for axis in axes)
    return frozenset().union(*map(composition.references, (*(base["config"] for base in bases), *values)))


def typed(name: str, words: Iterable[str]) -> bool:
    """Whether the key of that name is among the words."""
    return name.partition("=")[0] in {word.partition("=")[0].lstrip("+") for word in words}


def base(composed: Compose, words: list[str]) -> dict[str, Any]:
    """What conf/ and these words say, with references as they are: a point's values are put into it."""
    try:
        node = composed(words)
    except composition.FAULTS as fault:
        raise ConfigError(composition.explain(fault, words)) from None
    content = OmegaConf.to_container(node)
    assert isinstance(content, dict)
    address = content["tracking"]["uri"]
    if address is not None and "${" not in address:
        content["tracking"]["uri"] = without_secrets(address)
    return {str(name): value for name, value in content.items() if name != "sweep"}


def refuse(axes: list[Axis], config: Config) -> None:
    """Raises: ConfigError for a sweep that can't be meant."""
    settings = config.sweep
    if not axes and settings.seeds == 1:
        raise ConfigError("a sweep must have something to try, got one value for every key; use e.g. seed=0,1,2")
    if settings.seeds > 1 and "seed" in {axis.key for axis in axes}:
        raise ConfigError(f"sweep.seeds must be 1 where seed has several values, got {settings.seeds}; use one of them")
    if config.distributed.processes > 1:
        raise ConfigError(
            f"distributed.processes must be 1 in a sweep, whose trials are one process each, got "
            f"{config.distributed.processes}; leave it away"
        )
    points = math.prod(max(1, len(axis.values)) for axis in axes) if settings.search == "grid" else settings.trials
    if settings.search == "asha" and "epochs" in {axis.key for axis in axes}:
        raise ConfigError("epochs must be one number with sweep.search=asha, got several; use e.g. epochs=27")
    number = points * settings.seeds
    if number > settings.most:
        raise ConfigError(
            f"a sweep must have at most sweep.most={settings.most} trials, got {number:,}; "
            f"use sweep.most={number} if that is meant"
        )


def make(
    content: dict[str, Any], settings: schema.Sweep, point: dict[str, Any], trusted: composition.References
) -> list[dict[str, Any]]:
    """The trials of a point, one for every seed, as they are frozen.

    Raises: ConfigError naming what is wrong with them.
    """
    chosen = [f"{key}={value}" for key, value in point.items() if key in search_space.CHOOSES_FILES]
    [start] = [found["config"] for found in content["bases"] if sorted(found["words"]) == sorted(chosen)]
    values = {key: value for key, value in point.items() if key not in search_space.CHOOSES_FILES}
    if settings.seeds == 1:
        return [trial(start, point, values, trusted)]
    seeds = ({"seed": content["seed"] + number} for number in range(settings.seeds))
    return [trial(start, point | seed, values | seed, trusted) for seed in seeds]


def trial(
    start: dict[str, Any], point: dict[str, Any], values: dict[str, Any], trusted: composition.References
) -> dict[str, Any]:
    """A trial as it is frozen: `start` with these values. Raises: ConfigError."""
    if unknown := composition.references(values) - trusted:  # of a sweep that goes on, from its folder
        raise ConfigError(f"{min(unknown)[0]} refers to the environment, which was not typed; use another run_dir")
    node = composition.stored(start, [], trusted)
    try:
        for name, value in values.items():
            OmegaConf.update(node, name, value)
    except composition.FAULTS as fault:
        raise ConfigError(composition.explain(fault, [f"{name}={value}" for name, value in values.items()])) from None
    private = composition.private(node)
    with composition.hiding(private):
        config = composition.to_config(node)
        check_files(config)
        check_sources(config)
    stored = to_dict(config, private)
    stored["run_dir"] = None
    label = " ".join(f"{name}={shown(value)}" for name, value in point.items()) or "as it is"
    return {"label": label, "key": config_hash(config, private), "values": point, "config": stored}


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else composition.as_typed(value)


def parallel(config: Config) -> int:
    """How many trials at a time: as many as was asked for, else one for every GPU, else one for every two cores."""
    return config.sweep.parallel or len(gpus(config)) or max(1, cores() // 2)


def share_gpus(config: Config) -> None:
    """Raises: ConfigError where several trials would have one GPU and nothing says how much of it each may take."""
    there = len(gpus(config))
    if there and parallel(config) > there and config.gpu_memory is None:
        raise ConfigError(
            f"sweep.parallel must be at most the number of GPUs, {there}, got {parallel(config)}; "
            "use gpu_memory=MIB to let several trials share one"
        )


def gpus(config: Config) -> tuple[str, ...]:
    """Which GPUs the trials share, each trial on one of them."""
    return () if config.device == "cpu" else visible_gpus()
