"""What surrounds a run: its folder and lock, signals, exit code, and a summary whatever happens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.config.schema import ROOT, Config, ConfigError
from train.config.serialization import Redactor
from train.distributed.process_group import ProcessGroup, WorkerLostError
from train.run.recorder import Recorder, RunRecorder
from train.run.train_and_evaluate import RunSession, TrialPausedError, train_and_evaluate
from train.storage.json_types import JsonObject
from train.tracking import run_metadata
from train.tracking.run_dir import RunDir, create_run_dir
from train.training.signals import Interrupted, SignalHandler

INTERRUPTED_UPLOAD_SECONDS = 4.0  # a stopped run waits no longer than this for its upload, so that it exits soon


def start_run(config: Config, redactor: Redactor, *, latest: bool) -> int:
    """Starts a new run; returns the exit code. `latest`: whether runs/latest shall point to it."""
    run_dir = create_run_dir(config.run_dir, ROOT / "runs", config.tracking.experiment, latest=latest)
    return continue_run(run_dir, config, redactor, frozenset())


def continue_run(run_dir: RunDir, config: Config, redactor: Redactor, accepted_changes: frozenset[str]) -> int:
    """Makes an attempt at the run in `run_dir`, from the start or from its latest checkpoint; returns the exit code."""
    return make_attempt(config, redactor, RunRecorder(run_dir, config, redactor, accepted_changes))


def run_worker(config: Config, redactor: Redactor) -> int:
    """Runs a process other than process 0 of a run; returns the exit code."""
    return make_attempt(config, redactor, Recorder(config))


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended: the exit code, and what the summary says of it.

    `max_upload_seconds`: limit to the time that the upload to MLflow may take from now on. `all_processes`: all
    processes of the run have ended in the same way.
    """

    exit_code: int
    ending: JsonObject
    max_upload_seconds: float = math.inf
    all_processes: bool = False


def make_attempt(config: Config, redactor: Redactor, recorder: Recorder) -> int:
    """Trains and evaluates, and closes the record whatever happens; returns the exit code."""
    process_group = ProcessGroup(config.distributed.index, config.distributed.processes)
    with recorder.opened(), SignalHandler().installed() as signals:
        result = _result_of(RunSession(config, redactor, signals, process_group, recorder))
        with signals.deferred():
            exit_code = recorder.close(result.ending, result.exit_code)
        recorder.finish(exit_code, min(config.tracking.wait_seconds, result.max_upload_seconds))
        exit_code = exit_code or signals.exit_code()
        with signals.deferred():  # process 0 may still have to test and to write
            return process_group.shutdown(exit_code, all_processes=result.all_processes) or signals.exit_code()


def _result_of(session: RunSession) -> AttemptResult:
    """Runs the session, and reports what ended it early."""
    try:
        train_and_evaluate(session)
    except TrialPausedError as pause:
        return AttemptResult(0, {"status": "paused", "failure": str(pause)})
    except Interrupted as interruption:
        return AttemptResult(
            128 + interruption.signal_number,
            {"status": "interrupted", "failure": str(interruption)},
            0 if interruption.immediate else INTERRUPTED_UPLOAD_SECONDS,
            interruption.all_processes,
        )
    except Exception as error:
        failure = session.redactor.redact(f"{type(error).__name__}: {error}")
        return AttemptResult(
            run_metadata.report_failure(error, session.recorder.run_dir, session.redactor),
            {"status": "failed", "failure": failure, "config_error": isinstance(error, ConfigError)},
            0 if isinstance(error, WorkerLostError) else math.inf,  # JAX may end this process soon
        )
    return AttemptResult(0, {"status": "finished"}, all_processes=True)
