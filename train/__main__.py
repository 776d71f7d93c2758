"""`python -m train key=value ...`: composes the config, checks it, and starts a run or a sweep.

TensorFlow is imported only after the whole command line has been checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra_plugins.inception_laboratory import register
from omegaconf import DictConfig, OmegaConf

from train.cli import arguments, terminal
from train.config import composition
from train.config.overrides import HYDRA_ERRORS, add_missing_keys, check_grammar, check_overrides, explain
from train.config.schema import ROOT, SeveralFaultsError
from train.sweep import trials, workers
from train.tracking.run_dir import open_run_dir

CHECK_FLAG = "--check"
INFO_CHOICES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of Hydra
argv: list[str] = []  # as typed


class ArgumentParser(argparse.ArgumentParser):
    """Splits the command line into Hydra's flags and the overrides."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("overrides", nargs="*")
        for flag in (CHECK_FLAG, "--hydra-help", "--resolve"):
            self.add_argument(flag, action="store_true")
        for flag, short in (("--multirun", "-m"), ("--run", "-r"), ("--shell-completion", "-sc")):
            self.add_argument(flag, short, action="store_true")
        for flag, short in (("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd")):
            self.add_argument(flag, short)
        self.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
        self.add_argument("--package", "-p")
        self.add_argument("--experimental-rerun")
        self.add_argument("--info", "-i", nargs="?", const="all", choices=INFO_CHOICES)

    def error(self, message: str) -> NoReturn:
        """Raises: ValueError."""
        raise ValueError(f"{message}; --help lists the flags")


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """Starts one run, or a trial of a sweep. Handles errors here, since Hydra would print several lines."""
    terminal.protect_output()  # for a cluster job, which does not call `main`
    try:
        code = run(trial_config(node) if node.sweep.trial else node)
    except ValueError as error:
        code = arguments.print_error(str(error))
    if HydraConfig.get().mode != RunMode.MULTIRUN:  # in a cluster job the sweep reads the result from the folder
        sys.exit(code)


def trial_config(node: DictConfig) -> DictConfig:
    """The frozen config of a trial, which replaces that of conf/."""
    if launcher := os.environ.get(workers.PARENT_PID_VARIABLE):
        workers.die_with_parent(int(launcher))  # stops the trial at its next batch
    stored, folder = trials.read_frozen_trial(node.sweep.trial)
    references = os.environ.get(workers.REFERENCES_VARIABLE)  # of the launcher, which knows what was typed
    trial_node = composition.from_stored(
        stored, [], frozenset(map(tuple, json.loads(references))) if references else None
    )
    trial_node.run_dir = folder
    trial_node.sweep = node.sweep
    uri = os.environ.get(workers.TRACKING_URI_VARIABLE)
    if uri is not None and not OmegaConf.is_interpolation(trial_node.tracking, "uri"):
        trial_node.tracking.uri = uri
    for name in node.sweep.final:
        OmegaConf.update(trial_node, name, True)
    return trial_node


def run(node: DictConfig) -> int:
    """Does every check that needs no TensorFlow, then starts the run; returns its exit code."""
    redactor = composition.make_redactor(node)
    with composition.redacting_errors(redactor):
        config = composition.to_config(node, is_stored=node.sweep.trial is not None)
        from train import resume
        from train.run import factory, lifecycle  # imported late: typing errors are reported at once

        factory.check_files(config)
        factory.check_sources(config)
    if CHECK_FLAG in argv:
        print("the config is valid")
        return 0
    is_leader = config.distributed.index == 0
    if config.run_dir and (Path(config.run_dir) / "run.json").exists():
        run_dir = open_run_dir(Path(config.run_dir))
        # With a different config process 0 rejects it here, and the others when they compare their configs.
        if is_leader or not resume.config_differences(run_dir, config, redactor):
            return resume.resume_if_same_config(run_dir, config, redactor)
    if is_leader:
        return lifecycle.start_run(config, redactor, latest=config.sweep.trial is None)
    return lifecycle.run_worker(config, redactor)


def main() -> None:
    """Exit codes: 0 finished, 1 failed, 2 invalid command line, 129, 130 and 143 interrupted."""
    terminal.protect_output()
    argv[:] = sys.argv[1:]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting
    composition.register_schema()
    register()
    try:
        if text := arguments.answer_flags(argv, help_text):
            print(text)
            sys.exit()
        sys.argv[1:] = check_command_line()
        compose_and_run()
    except HYDRA_ERRORS as error:
        sys.exit(arguments.print_error(explain(error)))
    except SeveralFaultsError as errors:
        sys.exit(max(map(arguments.print_error, errors.messages)))
    except ValueError as error:
        sys.exit(arguments.print_error(str(error)))
    except KeyboardInterrupt:  # before the run has installed its signal handlers
        sys.exit(130)


def help_text() -> str:
    """What `--help` prints, for a sweep if `--multirun` was typed, too."""
    from train.config import help as config_help

    if {"-m", "--multirun"} & set(argv):
        return config_help.sweep_help()
    return config_help.train_help(word for word in argv if not word.startswith("-") and "=" not in word)


def check_command_line() -> list[str]:
    """Checks what was typed; returns the arguments for Hydra. Raises: ConfigError."""
    flags = ArgumentParser().parse_intermixed_args(argv)
    if flags.shell_completion:
        return argv
    overrides = list(flags.overrides)
    keys = arguments.typed_keys(overrides)
    is_elsewhere = flags.config_path or flags.config_name or flags.config_dir or "hydra.searchpath" in keys
    if is_elsewhere:  # only Hydra knows the options
        checked = check_grammar(overrides, in_sweep=flags.multirun)
    else:
        with composition.conf_loader() as loader:
            check_overrides(overrides, loader, in_sweep=flags.multirun)
            checked = add_missing_keys(overrides, loader) if flags.multirun else overrides
    others = [word for word in argv if word not in overrides and word != CHECK_FLAG]
    return [*checked, *(sweep_overrides(keys) if flags.multirun else []), *others]


def sweep_overrides(typed: set[str]) -> list[str]:
    """Selects our sweeper and launcher for Hydra, unless others were typed; `--check` becomes a dry run."""
    plugins = {"hydra/sweeper": "trials", "hydra/launcher": "processes"}
    overrides = [f"{name}={value}" for name, value in plugins.items() if name not in typed]
    return [*overrides, "sweep.dry_run=true"] if CHECK_FLAG in argv else overrides


if __name__ == "__main__":
    main()
