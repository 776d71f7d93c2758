"""The sweep as Hydra knows it: a sweeper, and a launcher for this machine.

Hydra takes such classes only from below the name `hydra_plugins`, so this folder is installed as
`hydra_plugins.inception_laboratory`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins import launcher, sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from train.config import composition
from train.config.schema import Config, ConfigError


class ProcessLauncher(launcher.Launcher):
    """Trials as processes of this machine. The sweeper below hands them over one by one; others can't use it."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is needed."""

    def launch(self, *_: Any, **__: Any) -> Sequence[Any]:
        """Raises: ConfigError."""
        raise ConfigError("hydra/launcher=processes goes with hydra/sweeper=trials; use both, or neither")


class TrialSweeper(sweeper.Sweeper):
    """Freezes the trials of a sweep, and has each one run from its frozen config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config_loader, self._config = hydra_context.config_loader, config
        self._hydra_context, self._task_function = hydra_context, task_function

    def sweep(self, arguments: list[str]) -> Any:
        """Ends the process with the sweep's exit code."""
        from train.sweep import run

        common = self._without_hydra(self._config)
        config = OmegaConf.to_object(common)
        assert isinstance(config, Config)
        name = self._config.hydra.runtime.choices["hydra/launcher"]
        elsewhere = None if name == "processes" else run.ExternalLauncher(name, self._launch)
        sys.exit(run.run_sweep(arguments, config, self._config_loader, self._compose, elsewhere))

    def _compose(self, overrides: list[str]) -> DictConfig:
        return self._without_hydra(self._config_loader.load_sweep_config(self._config, overrides))

    def _launch(self, jobs: list[list[str]], first_number: int, folder: str) -> Any:
        """By the launcher that the user has chosen, which keeps what it has to keep in the folder."""
        with read_write(self._config):
            self._config.hydra.sweep.dir, self._config.hydra.sweep.subdir = folder, "."
        launcher = Plugins.instance().instantiate_launcher(
            config=self._config, hydra_context=self._hydra_context, task_function=self._task_function
        )
        here = [f"hydra.sweep.dir={composition.quote_value(folder)}", "hydra.sweep.subdir=."]  # each job composes anew
        return launcher.launch([[*words, *here] for words in jobs], initial_job_idx=first_number)

    @staticmethod
    def _without_hydra(node: DictConfig) -> DictConfig:
        found = node.copy()
        with read_write(found), open_dict(found):
            found.pop("hydra")
        return found


@dataclass
class _TrialSweeperConfig:
    _target_: str = f"{__name__}.TrialSweeper"


@dataclass
class _ProcessLauncherConfig:
    _target_: str = f"{__name__}.ProcessLauncher"


def register() -> None:
    """Makes them known to Hydra, which does not look into a package that is installed in place."""
    ConfigStore.instance().store(group="hydra/sweeper", name="trials", node=_TrialSweeperConfig, provider="inception")
    ConfigStore.instance().store(
        group="hydra/launcher", name="processes", node=_ProcessLauncherConfig, provider="inception"
    )
    Plugins.instance().register(TrialSweeper)
    Plugins.instance().register(ProcessLauncher)
