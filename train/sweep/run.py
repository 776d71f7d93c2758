"""Runs a sweep: overrides -> frozen trials -> one process per trial -> the best trial and a summary."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import fmean

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from train.cli.arguments import typed_keys
from train.cli.progress import print_and_log
from train.config import composition, serialization
from train.config import schema as schema
from train.config.overrides import HYDRA_ERRORS, check_overrides, explain
from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import config_hash, strip_credentials, to_dict
from train.config.validation import check
from train.evaluation.report import REPORT_FILE
from train.run.factory import check_files, check_sources
from train.runtime.setup import cores
from train.storage.json_types import JsonObject
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
    TrialResult,
    WorkerPool,
    visible_gpus,
)
from train.tracking import uploader
from train.tracking.run_metadata import quote_path, relative_path
from train.training.signals import StopSignals

JOBS_DIR = "jobs"  # folder for the files of an external launcher
FROZEN_SETTINGS = ("search", "trials", "seeds", "first_epochs", "reduction")  # the settings that determine the trials
# Model selection must not see the test split, and needs no report; the best trial gets all three.
DISABLED_DURING_SEARCH = {"evaluate.test": False, "evaluate.report": False, "tracking.log_model": False}
ComposeFunction = Callable[[list[str]], DictConfig]


@dataclass(frozen=True)
class ExternalLauncher:
    """Another Hydra launcher. launch: takes the overrides of every job, the number of the first one, and a folder."""

    name: str
    launch: Callable[[list[list[str]], int, str], object]


@dataclass
class SweepSession:
    """State of a sweep during one launch. launcher: an external one, or None to run the trials on this machine.

    trusted_references: environment references from the command line or from conf/.
    """

    folder: SweepDir
    config: Config
    launcher: ExternalLauncher | None
    signals: StopSignals
    trusted_references: composition.References = frozenset()
    algorithm: SearchAlgorithm = field(init=False)
    failures: dict[int, tuple[Trial, str]] = field(default_factory=dict)
    retry_queue: list[Trial] = field(default_factory=list)
    retry_counts: Counter[int] = field(default_factory=Counter)

    @property
    def stopped(self) -> bool:
        """Whether the sweep ends early, by a signal or a failure."""
        return bool(self.signals.received_signal()) or (self.config.sweep.fail_fast and bool(self.failures))


def run_sweep(
    overrides: list[str],
    config: Config,
    loader: ConfigLoader,
    compose_config: ComposeFunction,
    launcher: ExternalLauncher | None,
) -> int:
    """Runs or resumes a sweep. Returns 0 if all trials finished, 1 if one failed, 129, 130 or 143 if stopped.

    overrides: as typed. config: what all trials have in common.

    Raises: ConfigError for an invalid trial, before the first one starts.
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
        manifest, frozen, trusted = plan_sweep(overrides, config, loader, compose_config, local=launcher is None)
        if config.sweep.dry_run:
            labels = (f"{number}: {trial['label']}" for number, trial in enumerate(frozen, 1))
            print_and_log(*labels, "the config is valid")
            return 0
        folder = trials.create_sweep(runs, overrides, config.run_dir, manifest, frozen)
    else:
        print_and_log(f"resuming sweep {folder.path} with its stored configuration")
        trusted = frozenset()
        if composition.find_references({name: folder.manifest[name] for name in ("axes", "bases")}):
            trusted = find_trusted_references(
                *compose_bases(overrides, config, loader, compose_config, local=launcher is None)
            )
    os.environ[REFERENCES_VARIABLE] = json.dumps(sorted(trusted))
    config = replace(config, sweep=replace(config.sweep, **folder.manifest["settings"]))
    signals = StopSignals()
    with folder.locked(), nullcontext() if launcher else signals.installed():
        return run_trials(SweepSession(folder, config, launcher, signals, trusted))


def run_trials(session: SweepSession) -> int:
    """Runs the remaining trials, finalizes the best one and prints a summary. Returns the exit code."""
    folder = session.folder
    settings = session.config.sweep
    storage = uploader.sqlite_uri_beside(session.config.tracking.uri, ROOT, "optuna.db")
    make_trials = partial(freeze_trials, folder.manifest, settings, trusted_references=session.trusted_references)
    session.algorithm = search.create_algorithm(folder, settings, make_trials, storage)
    pool = WorkerPool(num_parallel_trials(session.config), settings.minutes, trial_gpus(session.config))
    if session.launcher:
        placement = f"submitted to {session.launcher.name}"
    else:
        placement = f"{len(pool.workers)} at a time, each on {len(pool.workers[0].cores)} of {cores()} cores"
    print_and_log(f"sweep: {session.algorithm.expected} trials, {placement}")
    with ParentRun(folder, session.config) as parent_run, LiveTable(folder, session.algorithm) as table:

        def on_trial_end(trial: Trial, result: TrialResult) -> bool:
            should_continue = handle_result(session, trial, result)
            prune_checkpoints(session)
            parent_run.log_progress(folder.trials, len(session.failures))
            table.print_result(trial, result, trial in session.retry_queue)
            return should_continue

        def run_from(source: Callable[[], Trial | None]) -> None:
            if session.launcher is None:
                pool.run(source, on_trial_end, lambda: table.refresh(pool), session.signals)
            else:
                run_externally(session, session.launcher, source, on_trial_end)

        run_from(lambda: next_trial(session))
        best_trials = find_best_trials(session)
        mark_pruned(session)
        finalize_best(session, best_trials, run_from)
        prune_checkpoints(session)
        return finish_sweep(session, parent_run, best_trials)


def next_trial(session: SweepSession) -> Trial | None:
    return session.retry_queue.pop(0) if session.retry_queue else session.algorithm.next_trial()


def handle_result(session: SweepSession, trial: Trial, result: TrialResult) -> bool:
    """Queues a retry or notes the failure after a trial has ended. Returns whether to start further trials."""
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
    """Halves the trial's batch size, which makes it another run with its own folder."""
    size = max(1, trial.config["batch_size"] // 2)
    return folder.update(trial, config={**trial.config, "batch_size": size}, batch_halvings=trial.batch_halvings + 1)


def find_best_trials(session: SweepSession) -> list[Trial]:
    """Returns the trials, one per seed, of the point with the best mean validation accuracy; the first one on ties."""
    points: dict[int, list[Trial]] = {}
    for trial in session.folder.trials:
        points.setdefault(trial.point, []).append(trial)
    ranking = []
    for point, point_trials in points.items():
        values = [value for trial in point_trials if (value := trial.objective()) is not None]
        if len(values) == len(point_trials):
            ranking.append((-fmean(values), point))
    return points[min(ranking)[1]] if ranking else []


def mark_pruned(session: SweepSession) -> None:
    """Records in the summary of each abandoned trial that it was pruned."""
    if session.stopped:
        return
    for trial in session.algorithm.abandoned():
        run_dir = trial.run()
        if run_dir and "pruned" not in (summary := trial.summary()):
            reason = f"pruned after epoch {trial.epochs_done()} of {trial.total_epochs()}: outperformed by other trials"
            run_dir.write_json("summary.json", summary | {"pruned": True, "failure": reason})
            uploader.start(run_dir, session.config.tracking.uri or uploader.default_uri(ROOT))


def prune_checkpoints(session: SweepSession) -> None:
    """Deletes the checkpoints of trials that have ended, except those of the best trials."""
    if session.config.sweep.keep_checkpoints:
        return
    needed = {trial.number for trial in find_best_trials(session)}
    for trial in session.folder.trials:
        has_ended = trial.state() == "finished" or "pruned" in trial.summary()
        if has_ended and trial.number not in needed:
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def finalize_best(
    session: SweepSession, best_trials: list[Trial], run_from: Callable[[Callable[[], Trial | None]], None]
) -> None:
    """Runs test, report and model upload for the best trials, unless the user has set these keys.

    The test split is used once: not while a failed trial may still become the best, nor for a second trial.
    """
    typed = typed_keys(session.folder.manifest["identity"])
    keys = [name for name in DISABLED_DURING_SEARCH if name not in typed]
    if not keys or not best_trials or session.stopped:
        return
    if retryable := [trial for trial, _ in session.failures.values() if not trial.summary().get("config_error")]:
        overrides = " ".join(f"{name}=true" for name in keys)
        print_and_log(
            f"the best trial has not been tested yet: failed trials ({len(retryable)}) may still beat it; run the same "
            f"command again, or test it now: make resume run={quote_path(best_trials[0].folder)} {overrides}"
        )
        return
    others = {trial.number for trial in session.folder.trials} - {trial.number for trial in best_trials}
    tested = [trial for trial in session.folder.trials if trial.number in others and "test" in trial.summary()]
    if "evaluate.test" in keys and tested:
        print_and_log(f"the best trial was not tested: the test split has already been used for {tested[0].label}")
        return
    override = f"sweep.final=[{','.join(keys)}]"
    remaining = [replace(trial, overrides=(override,)) for trial in best_trials if not is_finalized(trial, keys)]
    if remaining:
        print_and_log(f"finalizing the best trial: {best_trials[0].label}")
        session.retry_queue += remaining
        run_from(lambda: session.retry_queue.pop(0) if session.retry_queue else None)


def is_finalized(trial: Trial, keys: list[str]) -> bool:
    run_dir = trial.run()
    return run_dir is not None and all(
        {
            "evaluate.test": "test" in trial.summary(),
            "evaluate.report": (run_dir.path / REPORT_FILE).exists(),
            "tracking.log_model": run_dir.identity()["log_model"],
        }[name]
        for name in keys
    )


def run_externally(
    session: SweepSession,
    launcher: ExternalLauncher,
    trial_source: Callable[[], Trial | None],
    on_trial_end: Callable[[Trial, TrialResult], bool],
) -> None:
    """Runs trials with another launcher: all of a grid at once, of a search as many as may run in parallel."""
    num_started = 0
    should_continue = True
    max_jobs = None if session.config.sweep.search == "grid" else num_parallel_trials(session.config)
    while should_continue and (jobs := list(islice(iter(trial_source, None), max_jobs))):
        overrides = [[trial.selector, *trial.overrides] for trial in jobs]
        try:
            launcher.launch(overrides, num_started, str(session.folder.path / JOBS_DIR))
        except Exception as error:  # the launcher reports one job's failure; each job's result is in its own folder
            reason = " ".join(str(error).split())[:500]
            if all(trial.state() == "waiting" for trial in jobs):
                raise ConfigError(f"hydra/launcher={launcher.name} could not start the trials: {reason}") from None
            print_and_log(f"warning: {reason}")
        num_started += len(jobs)
        for trial in jobs:
            should_continue = on_trial_end(trial, external_result(trial)) and should_continue


def external_result(trial: Trial) -> TrialResult:
    """Returns the result of a trial that an external launcher ran, from its run's folder."""
    state = trial.state()
    if state == "finished" or trial.is_paused():
        return TrialResult(0)
    if state == "failed":
        return TrialResult(1, trial.summary()["failure"])
    return TrialResult(1, f"the job wrote no result to {trial.folder}", is_retryable=state == "interrupted")


def finish_sweep(session: SweepSession, parent_run: ParentRun, best_trials: list[Trial]) -> int:
    """Prints and stores the outcome of the sweep. Returns the exit code."""
    states = Counter("pruned" if trial.summary().get("pruned") else trial.state() for trial in session.folder.trials)
    best_trials = [trial for trial in best_trials if trial.objective() is not None]  # its test may have failed
    parent_run.write_summary(
        "interrupted" if session.signals.received_signal() else "failed" if session.failures else "finished",
        best_trials,
    )
    for failed, reason in session.failures.values():
        print_and_log(f"failed: {failed.label}: {reason} ({relative_path(failed.log_path())})")
    for trial in best_trials:
        test = trial.summary().get("test")
        tested = f", test accuracy {test['accuracy']:.4f}" if test else ""
        print_and_log(
            f"best: {trial.label}  validation accuracy {trial.objective():.4f}{tested}  run={quote_path(trial.folder)}"
        )
    remaining = session.algorithm.expected - states["finished"] - states["pruned"] - len(session.failures)
    counts = [f"{states['finished']} finished", f"{len(session.failures)} failed"]
    counts += [f"{states['pruned']} pruned"] * bool(states["pruned"])
    counts += [f"{remaining} remaining (run the same command to continue)"] * (remaining > 0)
    size = sum(path.stat().st_size for path in session.folder.path.rglob("*") if path.is_file())
    print_and_log(f"sweep: {', '.join(counts)}, {size / 2**20:,.0f} MiB  {relative_path(session.folder.path)}")
    return session.signals.exit_code() or int(bool(session.failures))


# ---------------------------------------------------------------------------------------------------------- planning


def plan_sweep(
    overrides: list[str], config: Config, loader: ConfigLoader, compose_config: ComposeFunction, *, local: bool
) -> tuple[JsonObject, list[JsonObject], composition.References]:
    """Returns the manifest of a new sweep, its frozen trials (none for a search), and the trusted references.

    Raises: ConfigError for an invalid trial, including the boundary points of a search.
    """
    settings = config.sweep
    bases, axes = compose_bases(overrides, config, loader, compose_config, local=local)
    trusted = find_trusted_references(bases, axes)
    manifest = {
        "settings": {name: getattr(settings, name) for name in FROZEN_SETTINGS},
        "seed": config.seed,
        "epochs": config.epochs,
        "axes": [vars(axis) for axis in axes],
        "bases": bases,
    }
    check_sweep(axes, config)
    if settings.search != "grid":
        for point in search_space.boundary_points(axes):
            freeze_trials(manifest, settings, point, trusted)
        return manifest, [], trusted
    frozen: dict[str, JsonObject] = {}
    for number, point in enumerate(search_space.grid_points(axes)):
        for trial in freeze_trials(manifest, settings, point, trusted):
            if trial["key"] in frozen:
                print_and_log(f"duplicate trial, run only once: {trial['label']}")
            frozen.setdefault(trial["key"], trial | {"point": number})
    return manifest, list(frozen.values()), trusted


def compose_bases(
    overrides: list[str], config: Config, loader: ConfigLoader, compose_config: ComposeFunction, *, local: bool
) -> tuple[list[JsonObject], list[Axis]]:
    """Returns the base configs, one per combination of config groups, and the axes along which trials differ."""
    typed = typed_keys(overrides)
    space = [f"{name}={value}" for name, value in config.sweep.space.items() if name not in typed]
    if space:  # the rest has been checked before composing
        check_overrides([*overrides, *space], loader, in_sweep=True)
    common, axes = search_space.parse_axes([*overrides, *space], loader)
    common += [f"{name}={value}" for name, value in DISABLED_DURING_SEARCH.items() if name not in typed]
    if local and config.threads is None and "threads" not in typed:
        common.append(f"threads={max(1, cores() // num_parallel_trials(config))}")
    return [
        {"words": choices, "config": compose_base(compose_config, [*common, *choices])}
        for choices in search_space.config_group_choices(axes)
    ], axes


def find_trusted_references(bases: list[JsonObject], axes: list[Axis]) -> composition.References:
    """Returns the environment references from the command line and from conf/."""
    values = ({axis.key: list(axis.values)} for axis in axes)
    return frozenset().union(*map(composition.find_references, (*(base["config"] for base in bases), *values)))


def compose_base(compose_config: ComposeFunction, overrides: list[str]) -> JsonObject:
    """Composes a config with its references unresolved, into which the values of a point are put later."""
    try:
        node = compose_config(overrides)
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from None
    config = OmegaConf.to_container(node)
    assert isinstance(config, dict)
    uri = config["tracking"]["uri"]
    if uri is not None and "${" not in uri:
        config["tracking"]["uri"] = strip_credentials(uri)
    return {str(name): value for name, value in config.items() if name != "sweep"}


def check_sweep(axes: list[Axis], config: Config) -> None:
    """Checks the sweep as a whole. Raises: ConfigError."""
    settings = config.sweep
    if not axes and settings.seeds == 1:
        raise ConfigError("nothing to sweep: every key has one value; use e.g. seed=0,1,2")
    if settings.seeds > 1 and "seed" in {axis.key for axis in axes}:
        raise ConfigError("seed has several values and sweep.seeds is above 1; use one of the two")
    if config.distributed.processes > 1:
        raise ConfigError(
            f"distributed.processes={config.distributed.processes} is not supported in a sweep, which runs each trial "
            "in one process; omit it"
        )
    points = math.prod(max(1, len(axis.values)) for axis in axes) if settings.search == "grid" else settings.trials
    if settings.search == "asha" and "epochs" in {axis.key for axis in axes}:
        raise ConfigError("epochs must be a single number with sweep.search=asha, got several; use e.g. epochs=27")
    number = points * settings.seeds
    if number > settings.most:
        raise ConfigError(f"{number:,} trials exceed sweep.most={settings.most}; raise it to continue")


def freeze_trials(
    manifest: JsonObject, settings: schema.Sweep, point: JsonObject, trusted_references: composition.References
) -> list[JsonObject]:
    """Freezes the trials of a point, one per seed. Raises: ConfigError for an invalid config."""
    choices = [f"{key}={value}" for key, value in point.items() if key in search_space.CONFIG_GROUP_KEYS]
    [base] = [base["config"] for base in manifest["bases"] if sorted(base["words"]) == sorted(choices)]
    values = {key: value for key, value in point.items() if key not in search_space.CONFIG_GROUP_KEYS}
    if settings.seeds == 1:
        return [freeze_trial(base, point, values, trusted_references)]
    seeds = ({"seed": manifest["seed"] + number} for number in range(settings.seeds))
    return [freeze_trial(base, point | seed, values | seed, trusted_references) for seed in seeds]


def freeze_trial(
    base_config: JsonObject,
    point: JsonObject,
    values: JsonObject,
    trusted_references: composition.References,
) -> JsonObject:
    """Freezes one trial: `base_config` with `values` set. Raises: ConfigError for an invalid config."""
    if unknown := composition.find_references(values) - trusted_references:  # of a resumed sweep, from its folder
        raise ConfigError(
            f"{min(unknown)[0]} of the stored sweep refers to an environment variable that neither conf/ nor the "
            "command line refers to; use another run_dir"
        )
    node = composition.from_stored(base_config, [], trusted_references)
    try:
        for name, value in values.items():
            OmegaConf.update(node, name, value)
    except HYDRA_ERRORS as error:
        raise ConfigError(explain(error)) from None
    redactor = composition.make_redactor(node)
    with composition.redacting_errors(redactor):
        config = composition.to_config(node)
        check_files(config)
        check_sources(config)
    stored = to_dict(config, redactor)
    key = config_hash(stored)
    stored["run_dir"] = None
    label = " ".join(f"{name}={format_value(value)}" for name, value in point.items()) or "unchanged"
    return {"label": label, "key": key, "values": point, "config": stored}


def format_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else serialization.format_value(value)


def num_parallel_trials(config: Config) -> int:
    """Number of trials at a time: sweep.parallel, else one per GPU, else one for every two cores."""
    return config.sweep.parallel or len(trial_gpus(config)) or max(1, cores() // 2)


def check_gpu_sharing(config: Config) -> None:
    """Raises: ConfigError if several trials would share a GPU without a limit on its memory."""
    num_gpus = len(trial_gpus(config))
    if num_gpus and num_parallel_trials(config) > num_gpus and config.gpu_memory is None:
        raise ConfigError(
            f"sweep.parallel must be at most the number of GPUs, {num_gpus}, got {num_parallel_trials(config)}; "
            "use gpu_memory=MIB to let several trials share one"
        )


def trial_gpus(config: Config) -> tuple[str, ...]:
    """Returns the GPUs that the trials share, each trial on one of them."""
    return () if config.device == "cpu" else visible_gpus()
