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

from train.cli.progress import print_and_log
from train.config import composition
from train.config import schema as schema
from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import config_hash, strip_credentials, to_dict
from train.config.validation import check
from train.evaluation.report import REPORT_FILE
from train.run.factory import check_files, check_sources
from train.runtime.setup import cores
from train.sweep import ray_workers, search, search_space, trials
from train.sweep.live_table import LiveTable
from train.sweep.mlflow_parent import ParentRun
from train.sweep.search import SearchAlgorithm
from train.sweep.search_space import Axis
from train.sweep.trials import SweepDir, Trial
from train.sweep.workers import (
    REFERENCES_VARIABLE,
    STOPPED_REASON,
    TRACKING_URI_VARIABLE,
    SweepSignalHandler,
    TrialResult,
    WorkerPool,
    visible_gpus,
)
from train.tracking import uploader
from train.tracking.run_metadata import quote_path, relative_path

JOBS_DIR = "jobs"  # where another launcher keeps what it has to keep
FROZEN_SETTINGS = ("search", "trials", "seeds", "first_epochs", "reduction")  # settings that say which trials there are
# What chooses must not see the test, nor are pictures drawn of it; the best gets all of it.
DISABLED_DURING_SEARCH = {"evaluate.test": False, "evaluate.report": False, "tracking.log_model": False}
ComposeFunction = Callable[[list[str]], DictConfig]


@dataclass(frozen=True)
class ExternalLauncher:
    """Another launcher of Hydra's. launch: words of every job, number of the first one, a folder for what it keeps."""

    name: str
    launch: Callable[[list[list[str]], int, str], Any]


@dataclass
class SweepSession:
    """One launcher's share of a sweep. elsewhere: who runs the trials, where they are not processes of this machine.

    trusted: references to the environment that were typed or stand in conf/ now.
    """

    folder: SweepDir
    config: Config
    launcher: ExternalLauncher | None
    signals: SweepSignalHandler
    trusted_references: composition.References = frozenset()
    algorithm: SearchAlgorithm = field(init=False)
    failures: dict[int, tuple[Trial, str]] = field(default_factory=dict)
    retry_queue: list[Trial] = field(default_factory=list)
    retry_counts: Counter = field(default_factory=Counter)

    @property
    def stopped(self) -> bool:
        """Whether it ends before its end."""
        return bool(self.signals.signal) or (self.config.sweep.fail_fast and bool(self.failures))


def run_sweep(
    overrides: list[str],
    config: Config,
    loader: Any,
    compose_config: ComposeFunction,
    launcher: ExternalLauncher | None,
) -> int:
    """The exit code: 0 where all trials have finished, 1 where one has failed, 129, 130 and 143 stopped.

    words: as typed. config: what they have in common.

    Raises: ConfigError for whatever is wrong with any trial, before the first one begins.
    """
    check(config.sweep, "sweep.")
    if config.sweep.engine == "ray":
        ray_workers.check_installed()
        share = max(1, cores() // num_parallel_trials(config))
        launcher = ExternalLauncher("ray", partial(ray_workers.launch, cores=config.threads or share))
    if launcher is None:
        check_gpu_sharing(config)
    if config.tracking.uri is not None:
        os.environ[TRACKING_URI_VARIABLE] = config.tracking.uri
    runs = ROOT / "runs" / config.tracking.experiment
    folder = trials.find_sweep(runs, overrides, config.run_dir, fresh=config.sweep.fresh)
    if folder is None or config.sweep.dry_run:
        content, made, trusted = plan_sweep(overrides, config, loader, compose_config, local=launcher is None)
        if config.sweep.dry_run:
            print_and_log(
                *(f"{number}: {found['label']}" for number, found in enumerate(made, 1)), "the config is valid"
            )
            return 0
        folder = trials.create_sweep(runs, overrides, config.run_dir, content, made)
    else:
        print_and_log(f"going on with a sweep as it was begun, whatever conf/ says now: {folder.path}")
        trusted = frozenset()
        if composition.find_references({name: folder.manifest[name] for name in ("axes", "bases")}):
            trusted = find_trusted_references(
                *compose_bases(overrides, config, loader, compose_config, local=launcher is None)
            )
    os.environ[REFERENCES_VARIABLE] = json.dumps(sorted(trusted))
    config = replace(config, sweep=replace(config.sweep, **folder.manifest["settings"]))
    wish = SweepSignalHandler()
    with folder.locked(), nullcontext() if launcher else wish.installed():
        return run_trials(SweepSession(folder, config, launcher, wish, trusted))


def run_trials(session: SweepSession) -> int:
    """Runs what is left, and says what came of it."""
    folder, settings = session.folder, session.config.sweep
    storage = uploader.sqlite_uri_beside(session.config.tracking.uri, ROOT, "optuna.db")
    make_trials = partial(freeze_trials, folder.manifest, settings, trusted_references=session.trusted_references)
    session.algorithm = search.create_algorithm(folder, settings, make_trials, storage)
    slots = WorkerPool(num_parallel_trials(session.config), settings.minutes, trial_gpus(session.config))
    here = f"{len(slots.workers)} at a time, each on {len(slots.workers[0].cores)} of {cores()} cores"
    where = f"handed over to {session.launcher.name}" if session.launcher else here
    print_and_log(f"sweep: {session.algorithm.expected} trials, {where}")
    with ParentRun(folder, session.config) as record, LiveTable(folder, session.algorithm) as table:

        def told(trial: Trial, ended: TrialResult) -> bool:
            on = handle_result(session, trial, ended)
            prune_checkpoints(session)
            record.log_progress(folder.trials, len(session.failures))
            table.print_result(trial, ended, trial in session.retry_queue)
            return on

        def work(source: Callable[[], Trial | None]) -> None:
            if session.launcher is None:
                slots.run(source, told, lambda: table.refresh(slots), session.signals)
            else:
                run_externally(session, session.launcher, source, told)

        work(lambda: next_trial(session))
        crowned = find_best_trials(session)
        mark_pruned(session)
        finalize_best(session, crowned, work)
        prune_checkpoints(session)
        return finish_sweep(session, record, crowned)


def next_trial(session: SweepSession) -> Trial | None:
    return session.retry_queue.pop(0) if session.retry_queue else session.algorithm.next_trial()


def handle_result(session: SweepSession, trial: Trial, result: TrialResult) -> bool:
    """What follows from the end of a trial; whether to go on with others."""
    settings = session.config.sweep
    if result.exit_code == 0:
        session.algorithm.on_trial_end(trial)
        return True
    if result.reason == STOPPED_REASON:
        return False
    if result.is_retryable and session.retry_counts[trial.number] < settings.retries:
        session.retry_counts[trial.number] += 1
        session.retry_queue.append(
            with_half_batch(session.folder, trial) if result.is_out_of_memory and settings.halve_batch else trial
        )
        return True
    session.failures[trial.number] = trial, result.reason
    session.algorithm.on_trial_end(trial)
    return not session.stopped


def with_half_batch(folder: SweepDir, trial: Trial) -> Trial:
    """The trial with half the batch: another run, in a folder of its own."""
    size = max(1, trial.config["batch_size"] // 2)
    return folder.update(trial, config={**trial.config, "batch_size": size}, batch_halvings=trial.batch_halvings + 1)


def find_best_trials(session: SweepSession) -> list[Trial]:
    """The trials, one for every seed, of the point with the highest mean validation accuracy; the first of equals."""
    points: dict[int, list[Trial]] = {}
    for trial in session.folder.trials:
        points.setdefault(trial.point, []).append(trial)
    found = []
    for point, of_it in points.items():
        values = [value for trial in of_it if (value := trial.objective()) is not None]
        if len(values) == len(of_it):
            found.append((-fmean(values), point))
    return points[min(found)[1]] if found else []


def mark_pruned(session: SweepSession) -> None:
    """Says of trials that others have beaten that they won't go on."""
    if session.stopped:
        return
    for trial in session.algorithm.abandoned():
        run = trial.run()
        if run and "pruned" not in (summary := trial.summary()):
            why = f"pruned after epoch {trial.epochs_done()} of {trial.total_epochs()}: others did better"
            run.write_json("summary.json", summary | {"pruned": True, "failure": why})
            uploader.start(run, session.config.tracking.uri or uploader.default_uri(ROOT))


def prune_checkpoints(session: SweepSession) -> None:
    """Keeps of the checkpoints those that somebody may go on from: of what is not over, and of the best."""
    if session.config.sweep.keep_checkpoints:
        return
    needed = {trial.number for trial in find_best_trials(session)}
    for trial in session.folder.trials:
        over = trial.state() == "finished" or "pruned" in trial.summary()
        if over and trial.number not in needed:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def finalize_best(
    session: SweepSession, best_trials: list[Trial], run_from: Callable[[Callable[[], Trial | None]], None]
) -> None:
    """The best gets what the others went without, and the user has not decided on: test, report, model in MLflow.

    That is for the final word: not as long as a trial that failed may still be the best, nor for a second trial.
    """
    keys = [name for name in DISABLED_DURING_SEARCH if not is_overridden(name, session.folder.manifest["identity"])]
    if not keys or not best_trials or session.stopped:
        return
    if retryable := [trial for trial, _ in session.failures.values() if not trial.summary().get("config_error")]:
        words = " ".join(f"{name}=true" for name in keys)
        print_and_log(
            f"the best trial is not tested yet, since failed ones ({len(retryable)}) may still beat it; run the same "
            f"command again, or test it now: make resume run={quote_path(best_trials[0].folder)} {words}"
        )
        return
    others = {trial.number for trial in session.folder.trials} - {trial.number for trial in best_trials}
    tested = [trial for trial in session.folder.trials if trial.number in others and "test" in trial.summary()]
    if "evaluate.test" in keys and tested:
        print_and_log(f"the best trial is not tested: the test split was already used for {tested[0].label}")
        return
    word = f"sweep.final=[{','.join(keys)}]"
    left = [replace(trial, overrides=(word,)) for trial in best_trials if not is_finalized(trial, keys)]
    if left:
        print_and_log(f"the best: {best_trials[0].label}")
        session.retry_queue += left
        run_from(lambda: session.retry_queue.pop(0) if session.retry_queue else None)


def is_finalized(trial: Trial, keys: list[str]) -> bool:
    run = trial.run()
    return run is not None and all(
        {
            "evaluate.test": "test" in trial.summary(),
            "evaluate.report": (run.path / REPORT_FILE).exists(),
            "tracking.log_model": run.identity()["log_model"],
        }[name]
        for name in keys
    )


def run_externally(
    session: SweepSession,
    launcher: ExternalLauncher,
    trial_source: Callable[[], Trial | None],
    on_trial_end: Callable[[Trial, TrialResult], bool],
) -> None:
    """Gives trials to another launcher: all of a grid at once, of a search as many as are to run at a time."""
    begun, on = 0, True
    most = None if session.config.sweep.search == "grid" else num_parallel_trials(session.config)
    while on and (jobs := list(islice(iter(trial_source, None), most))):
        try:
            launcher.launch(
                [[trial.selector, *trial.overrides] for trial in jobs], begun, str(session.folder.path / JOBS_DIR)
            )
        except Exception as fault:  # of one job, in the launcher's own words; what became of each is in its folder
            why = " ".join(str(fault).split())[:500]
            if all(trial.state() == "waiting" for trial in jobs):
                raise ConfigError(f"hydra/launcher must be able to begin, got {launcher.name}: {why}") from None
            print_and_log(f"warning: {why}")
        begun += len(jobs)
        for trial in jobs:
            on = on_trial_end(trial, external_result(trial)) and on


def external_result(trial: Trial) -> TrialResult:
    """How a trial has ended that was no process of ours."""
    state = trial.state()
    if state == "finished" or trial.is_paused():
        return TrialResult(0)
    if state == "failed":
        return TrialResult(1, trial.summary()["failure"])
    return TrialResult(1, f"its job has left no word in {trial.folder}", is_retryable=state == "interrupted")


def finish_sweep(session: SweepSession, record: ParentRun, best_trials: list[Trial]) -> int:
    """Says how it went. The exit code."""
    states = Counter("pruned" if found.summary().get("pruned") else found.state() for found in session.folder.trials)
    best_trials = [found for found in best_trials if found.objective() is not None]  # its test may have failed
    record.write_summary(
        "interrupted" if session.signals.signal else "failed" if session.failures else "finished", best_trials
    )
    for failed, why in session.failures.values():
        print_and_log(f"failed: {failed.label}: {why} ({relative_path(failed.log_path())})")
    for found in best_trials:
        test = found.summary().get("test")
        told = f", test accuracy {test['accuracy']:.4f}" if test else ""
        print_and_log(
            f"best: {found.label}  validation accuracy {found.objective():.4f}{told}  run={quote_path(found.folder)}"
        )
    left = session.algorithm.expected - states["finished"] - states["pruned"] - len(session.failures)
    counts = [f"{states['finished']} finished", f"{len(session.failures)} failed"]
    counts += [f"{states['pruned']} pruned"] * bool(states["pruned"])
    counts += [f"{left} to go (the same command again)"] * (left > 0)
    size = sum(path.stat().st_size for path in session.folder.path.rglob("*") if path.is_file())
    print_and_log(f"sweep: {', '.join(counts)}, {size / 2**20:,.0f} MiB  {relative_path(session.folder.path)}")
    return session.signals.exit_code() or int(bool(session.failures))


# ------------------------------------------------------------------------------------------------------- what to run


def plan_sweep(
    overrides: list[str], config: Config, loader: Any, compose_config: ComposeFunction, *, local: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], composition.References]:
    """What a new sweep is made from, the trials that are known beforehand, and the references that were typed.

    Raises: ConfigError for a trial that can't be run, also for one that a search may come to.
    """
    settings = config.sweep
    found, axes = compose_bases(overrides, config, loader, compose_config, local=local)
    trusted = find_trusted_references(found, axes)
    content = {
        "settings": {name: getattr(settings, name) for name in FROZEN_SETTINGS},
        "seed": config.seed,
        "epochs": config.epochs,
        "axes": [vars(axis) for axis in axes],
        "bases": found,
    }
    check_sweep(axes, config)
    if settings.search != "grid":
        for point in search_space.boundary_points(axes):
            freeze_trials(content, settings, point, trusted)
        return content, [], trusted
    made: dict[str, dict[str, Any]] = {}
    for number, point in enumerate(search_space.grid_points(axes)):
        for trial in freeze_trials(content, settings, point, trusted):
            if trial["key"] in made:
                print_and_log(f"given twice, run once: {trial['label']}")
            made.setdefault(trial["key"], trial | {"point": number})
    return content, list(made.values()), trusted


def compose_bases(
    overrides: list[str], config: Config, loader: Any, compose_config: ComposeFunction, *, local: bool
) -> tuple[list[dict[str, Any]], list[Axis]]:
    """The configs that trials are made from, one for each choice of files in conf/; and what differs between trials."""
    space_words = (
        f"{name}={value}" for name, value in config.sweep.space.items() if not is_overridden(name, overrides)
    )
    common, axes = search_space.parse_axes([*overrides, *space_words], loader)
    common += [
        word
        for word in (f"{name}={value}" for name, value in DISABLED_DURING_SEARCH.items())
        if not is_overridden(word, overrides)
    ]
    if local and config.threads is None and not is_overridden("threads", overrides):
        common.append(f"threads={max(1, cores() // num_parallel_trials(config))}")
    return [
        {"words": words, "config": compose_base(compose_config, [*common, *words])}
        for words in search_space.config_group_choices(axes)
    ], axes


def find_trusted_references(bases: list[dict[str, Any]], axes: list[Axis]) -> composition.References:
    """The references to the environment that were typed or stand in conf/."""
    values = ({axis.key: list(axis.values)} for axis in axes)
    return frozenset().union(*map(composition.find_references, (*(base["config"] for base in bases), *values)))


def is_overridden(name: str, overrides: Iterable[str]) -> bool:
    """Whether the key of that name is among the words."""
    return name.partition("=")[0] in {word.partition("=")[0].lstrip("+") for word in overrides}


def compose_base(compose_config: ComposeFunction, overrides: list[str]) -> dict[str, Any]:
    """What conf/ and these words say, with references as they are: a point's values are put into it."""
    try:
        node = compose_config(overrides)
    except composition.HYDRA_ERRORS as fault:
        raise ConfigError(composition.explain(fault, overrides)) from None
    content = OmegaConf.to_container(node)
    assert isinstance(content, dict)
    address = content["tracking"]["uri"]
    if address is not None and "${" not in address:
        content["tracking"]["uri"] = strip_credentials(address)
    return {str(name): value for name, value in content.items() if name != "sweep"}


def check_sweep(axes: list[Axis], config: Config) -> None:
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


def freeze_trials(
    content: dict[str, Any], settings: schema.Sweep, point: dict[str, Any], trusted_references: composition.References
) -> list[dict[str, Any]]:
    """The trials of a point, one for every seed, as they are frozen.

    Raises: ConfigError naming what is wrong with them.
    """
    chosen = [f"{key}={value}" for key, value in point.items() if key in search_space.CONFIG_GROUP_KEYS]
    [start] = [found["config"] for found in content["bases"] if sorted(found["words"]) == sorted(chosen)]
    values = {key: value for key, value in point.items() if key not in search_space.CONFIG_GROUP_KEYS}
    if settings.seeds == 1:
        return [freeze_trial(start, point, values, trusted_references)]
    seeds = ({"seed": content["seed"] + number} for number in range(settings.seeds))
    return [freeze_trial(start, point | seed, values | seed, trusted_references) for seed in seeds]


def freeze_trial(
    base_config: dict[str, Any],
    point: dict[str, Any],
    values: dict[str, Any],
    trusted_references: composition.References,
) -> dict[str, Any]:
    """A trial as it is frozen: `start` with these values. Raises: ConfigError."""
    if unknown := composition.find_references(values) - trusted_references:  # of a sweep that goes on, from its folder
        raise ConfigError(f"{min(unknown)[0]} refers to the environment, which was not typed; use another run_dir")
    node = composition.from_stored(base_config, [], trusted_references)
    try:
        for name, value in values.items():
            OmegaConf.update(node, name, value)
    except composition.HYDRA_ERRORS as fault:
        raise ConfigError(composition.explain(fault, [f"{name}={value}" for name, value in values.items()])) from None
    private = composition.make_redactor(node)
    with composition.redacting_errors(private):
        config = composition.to_config(node)
        check_files(config)
        check_sources(config)
    stored = to_dict(config, private)
    stored["run_dir"] = None
    label = " ".join(f"{name}={format_value(value)}" for name, value in point.items()) or "as it is"
    return {"label": label, "key": config_hash(config, private), "values": point, "config": stored}


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else composition.format_value(value)


def num_parallel_trials(config: Config) -> int:
    """How many trials at a time: as many as was asked for, else one for every GPU, else one for every two cores."""
    return config.sweep.parallel or len(trial_gpus(config)) or max(1, cores() // 2)


def check_gpu_sharing(config: Config) -> None:
    """Raises: ConfigError where several trials would have one GPU and nothing says how much of it each may take."""
    there = len(trial_gpus(config))
    if there and num_parallel_trials(config) > there and config.gpu_memory is None:
        raise ConfigError(
            f"sweep.parallel must be at most the number of GPUs, {there}, got {num_parallel_trials(config)}; "
            "use gpu_memory=MIB to let several trials share one"
        )


def trial_gpus(config: Config) -> tuple[str, ...]:
    """Which GPUs the trials share, each trial on one of them."""
    return () if config.device == "cpu" else visible_gpus()
