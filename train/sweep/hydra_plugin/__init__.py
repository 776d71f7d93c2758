"""Hydra plugins: a sweeper, and a launcher for this machine.

Hydra accepts such classes only from the namespace `hydra_plugins`, so this folder is installed as
`hydra_plugins.inception_laboratory`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins import launcher, sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from train.config.schema import Config, ConfigError
from train.config.serialization import quote_value


class ProcessLauncher(launcher.Launcher):
    """Stands for the processes that TrialSweeper starts itself; it works with no other sweeper."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Does nothing."""

    def launch(self, *_: object, **__: object) -> Sequence[JobReturn]:
        """Raises: ConfigError."""
        raise ConfigError("hydra/launcher=processes needs hydra/sweeper=trials; use both, or neither")


class TrialSweeper(sweeper.Sweeper):
    """Freezes the trials of a sweep and runs each one from its frozen config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config_loader = hydra_context.config_loader
        self._config = config
        self._hydra_context = hydra_context
        self._task_function = task_function

    def sweep(self, arguments: list[str]) -> object:
        """Runs the sweep and ends the process with its exit code."""
        from train.sweep import run

        common = self._without_hydra(self._config)
        config = OmegaConf.to_object(common)
        assert isinstance(config, Config)
        name = self._config.hydra.runtime.choices["hydra/launcher"]
        external_launcher = None if name == "processes" else run.ExternalLauncher(name, self._launch)
        sys.exit(run.run_sweep(arguments, config, self._config_loader, self._compose, external_launcher))

    def _compose(self, overrides: list[str]) -> DictConfig:
        return self._without_hydra(self._config_loader.load_sweep_config(self._config, overrides))

    def _launch(self, jobs: list[list[str]], first_number: int, folder: str) -> object:
        """Runs the jobs with the launcher that the user has chosen, which keeps its files in `folder`."""
        with read_write(self._config):
            self._config.hydra.sweep.dir, self._config.hydra.sweep.subdir = folder, "."
        launcher = Plugins.instance().instantiate_launcher(
            config=self._config, hydra_context=self._hydra_context, task_function=self._task_function
        )
        directory = [f"hydra.sweep.dir={quote_value(folder)}", "hydra.sweep.subdir=."]  # each job composes again
        return launcher.launch([[*overrides, *directory] for overrides in jobs], initial_job_idx=first_number)

    @staticmethod
    def _without_hydra(node: DictConfig) -> DictConfig:
        config = node.copy()
        with read_write(config), open_dict(config):
            config.pop("hydra")
        return config


@dataclass
class _TrialSweeperConfig:
    _target_: str = f"{__name__}.TrialSweeper"


@dataclass
class _ProcessLauncherConfig:
    _target_: str = f"{__name__}.ProcessLauncher"


def register() -> None:
    """Registers both classes with Hydra, which does not search packages installed in editable mode."""
    ConfigStore.instance().store(group="hydra/sweeper", name="trials", node=_TrialSweeperConfig, provider="inception")
    ConfigStore.instance().store(
        group="hydra/launcher", name="processes", node=_ProcessLauncherConfig, provider="inception"
    )
    Plugins.instance().register(TrialSweeper)
    Plugins.instance().register(ProcessLauncher)
