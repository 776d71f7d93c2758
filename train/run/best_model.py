"""What comes after training: the best weights are evaluated, plotted and reported."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from train.cli.progress import print_and_log
from train.config.schema import Config
from train.run import factory
from train.run.recorder import RunRecorder
from train.storage.json_types import JsonObject
from train.tracking import run_metadata
from train.tracking.run_dir import RunDir
from train.training.signals import SignalHandler

if TYPE_CHECKING:  # Keras and TensorFlow are imported by prepare_runtime, once their settings are known
    from train.data.dataset import Dataset, Split

log = logging.getLogger(__name__)


def evaluate_and_report(config: Config, signals: SignalHandler, recorder: RunRecorder, dataset: Dataset) -> None:
    """Evaluates the best weights on the test split, and writes the report, as far as the config asks for them."""
    run_dir = recorder.run_dir
    if config.evaluate.test:
        print_and_log("test: evaluating the best checkpoint on the held-out test split")
        recorder.record_test(evaluate_best(config, signals, run_dir, dataset, dataset.test))
    if config.evaluate.report:
        if not config.evaluate.test:
            evaluate_best(config, signals, run_dir, dataset, dataset.validation)
        write_report(run_dir, recorder.summary)


def evaluate_best(
    config: Config, signals: SignalHandler, run_dir: RunDir, dataset: Dataset, split: Split
) -> JsonObject:
    """Evaluates the best weights on a split and writes the results; returns the metrics that go into a summary."""
    from train.evaluation import results
    from train.evaluation.metrics import ClassificationResult

    output_dir = run_dir.path / "evaluation" / split.name
    model, predict = factory.load_best(run_dir, config)
    logits, labels = factory.predict_split(config, split, len(dataset.classes), predict, signals)
    result = ClassificationResult(logits, labels, dataset.classes)
    metrics = results.write_results(output_dir, split, result)
    if config.evaluate.report:
        with best_effort(run_dir, "draw the plots"):
            results.write_plots(output_dir, split, result, metrics, model)
            results.write_filters_plot(run_dir.path, model)
    return {name: metrics[name] for name in results.SUMMARY_METRICS}


def write_report(run_dir: RunDir, summary: JsonObject) -> None:
    """Writes report.html."""
    from train.evaluation import report

    with best_effort(run_dir, "write the report"):
        report.write_report(run_dir, summary | {"status": "finished"})
        print_and_log("report: written to report.html")


@contextmanager
def best_effort(run_dir: RunDir, action: str) -> Iterator[None]:
    """Turns an error into a warning: a run that has its numbers does not fail for lack of plots."""
    try:
        yield
    except Exception as error:
        log.exception("could not %s", action)
        path = run_metadata.quote_path(run_dir.path)
        print_and_log(
            f"warning: could not {action} ({type(error).__name__}: {error}); retry with: make report run={path}"
        )
