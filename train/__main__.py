"""`python -m train key=value ...`: compose the config, check it, hand it over.

TensorFlow is imported only after everything that was typed has been found right.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra_plugins.inception_laboratory import register
from omegaconf import DictConfig, OmegaConf

from train.cli import arguments, terminal
from train.config import composition
from train.config.schema import ROOT
from train.sweep import trials, workers
from train.tracking.run_dir import open_run_dir

CHECK_FLAG = "--check"
argv: list[str] = []  # as they were typed


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """One run, or a trial of a sweep. Its faults end here, since Hydra would tell them in several lines."""
    terminal.protect_output()  # in a cluster's job, which does not come by `main`
    try:
        code = run(trial_config(node) if node.sweep.trial else node)
    except ValueError as fault:
        code = arguments.print_error(str(fault))
    if HydraConfig.get().mode != RunMode.MULTIRUN:  # in a cluster's job: the sweep reads in the folder how it ended
        sys.exit(code)


def trial_config(node: DictConfig) -> DictConfig:
    """The config of a trial, in the place of what conf/ says."""
    if launcher := os.environ.get(workers.PARENT_PID_VARIABLE):
        workers.die_with_parent(int(launcher))  # which stops the trial at its next batch
    stored, folder = trials.read_frozen_trial(node.sweep.trial)
    typed = os.environ.get(workers.REFERENCES_VARIABLE)  # of the launcher, which knows what was typed
    found = composition.from_stored(stored, [], frozenset(map(tuple, json.loads(typed))) if typed else None)
    found.run_dir, found.sweep = folder, node.sweep
    address = os.environ.get(workers.TRACKING_URI_VARIABLE)
    if address is not None and not OmegaConf.is_interpolation(found.tracking, "uri"):
        found.tracking.uri = address
    for name in node.sweep.final:
        OmegaConf.update(found, name, True)
    return found


def run(node: DictConfig) -> int:
    """Every check that needs no TensorFlow, then the run itself; its exit code."""
    private = composition.make_redactor(node)
    with composition.redacting_errors(private):
        config = composition.to_config(node, is_stored=node.sweep.trial is not None)
        from train import resume
        from train.run import factory  # imported late: a mistake in what was typed is answered at once
        from train.run import train_and_evaluate as story

        factory.check_files(config)
        factory.check_sources(config)
    if CHECK_FLAG in argv:
        print("the config is valid")
        return 0
    there = (
        open_run_dir(Path(config.run_dir)) if config.run_dir and (Path(config.run_dir) / "run.json").exists() else None
    )
    leads = config.distributed.index == 0
    if there and (
        leads or not resume.config_differences(there, config, private)
    ):  # else all refuse it, when they have met
        return resume.resume_if_same_config(there, config, private)
    return (
        story.train(config, private, latest=config.sweep.trial is None) if leads else story.run_worker(config, private)
    )


def main() -> None:
    """Exit codes: 0 finished, 1 failed, 2 what was typed can't be run, 129, 130 and 143 interrupted."""
    terminal.protect_output()
    argv[:] = sys.argv[1:]
    sys.argv[1:] = [word for word in argv if word != CHECK_FLAG]
    if {"-m", "--multirun"} & set(argv):
        sys.argv += sweep_overrides()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing several lines and leaving
    composition.register_schema()
    register()
    try:
        compose_and_run()
    except composition.HYDRA_ERRORS as fault:
        sys.exit(arguments.print_error(composition.explain(fault, argv)))
    except ValueError as fault:
        sys.exit(arguments.print_error(str(fault)))
    except KeyboardInterrupt:  # before the run took the signals over
        sys.exit(130)


def sweep_overrides() -> list[str]:
    """What Hydra has to be told beside the words: who makes trials of them, and who runs these, unless it is typed."""
    typed = {word.partition("=")[0] for word in argv}
    ours = {"hydra/sweeper": "trials", "hydra/launcher": "processes"}
    found = [f"{name}={value}" for name, value in ours.items() if name not in typed]
    return [*found, "sweep.dry_run=true"] if CHECK_FLAG in argv else found


if __name__ == "__main__":
    main()
