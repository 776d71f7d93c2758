"""Commands run as users run them, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2
FROM_MAKE = {
    "MAKELEVEL",
    "MAKEFLAGS",
    "MAKEOVERRIDES",
    "MFLAGS",
    "ARGS",
}  # its words are not ours
WITH_SUPPORT = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # for code in another process that imports `support`


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.strip().splitlines()[-1]


def run_train(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """`python -m train WORDS`, as make calls it, without the pictures, which take longer than the runs of the tests."""
    return run_command(sys.executable, "-m", "train", *words, "evaluate.report=false", env=env, timeout=timeout)


def run_command(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    inherited = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    done = subprocess.run(
        words, cwd=ROOT, env=inherited | (env or {}), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The line that it refuses with."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    said = str(caught.value)
    assert "\n" not in said
    return said
