"""Writes the lock files from pyproject.toml: `make lock`.

`requirements/base.lock` has the base requirements; `requirements/<extra>.lock` has those of an extra, constrained to
the base's versions so that both install together; `jax-gpu` also to those of `gpu`. All entries have hashes; none has
an index URL.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILE = [
    sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes",
    "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links",
]  # fmt: skip


def compile_lock(requirements: list[str], python: str, output: Path, *options: str) -> None:
    """Resolves `requirements` for every Python from `python` upwards and writes `output`."""
    subprocess.run(
        [*COMPILE, "--python-version", python, *options, "-", "--output-file", str(output)],
        input="\n".join(requirements), text=True, check=True, cwd=ROOT,
    )  # fmt: skip


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].split(",")[0].removeprefix(">=")
    base = ROOT / "requirements/base.lock"
    compile_lock(project["dependencies"], python, base)
    for extra, requirements in project["optional-dependencies"].items():
        others = [ROOT / "requirements/gpu.lock"] if extra.endswith("-gpu") else []
        constraints = [option for lock in (base, *others) for option in ("--constraint", str(lock))]
        compile_lock(requirements, python, ROOT / f"requirements/{extra}.lock", *constraints)


if __name__ == "__main__":
    main()
