"""`make setup` installs into the project's environment, whatever the shell exports and wherever the project is moved.

The real Makefile runs with stubs for python and uv, which record their arguments and their environment.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.commands import ROOT

FOLDER = "a b%20c?d#é'\""  # most of these cannot be in the name of a make target
GPU = Path("/proc/driver/nvidia/version").exists()

STAND_IN = r"""#!/bin/sh
{ printf '%s\0' "$(pwd -P)" "$0" "$@"; printf '\1'; env -0; printf '\2'; } >> "$CALLS"
case "$*" in
"-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip install "*) cp "$0" .venv/bin/uv ;;
esac
"""

REDIRECTING = [
    "UV_SYSTEM_PYTHON", "UV_PYTHON", "UV_BREAK_SYSTEM_PACKAGES", "UV_PROJECT_ENVIRONMENT", "UV_PROJECT",
    "UV_WORKING_DIR", "UV_MANAGED_PYTHON", "UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE",
    "UV_EXCLUDE_NEWER", "UV_RESOLUTION", "UV_PRERELEASE", "UV_TORCH_BACKEND", "UV_NO_BINARY", "UV_NO_BUILD",
    "UV_NO_EDITABLE", "UV_REQUIRE_HASHES", "UV_NO_VERIFY_HASHES", "UV_NOT_YET_INVENTED", "PIP_USER", "PIP_TARGET",
    "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_CONSTRAINT", "PIP_REQUIREMENT", "PIP_REQUIRE_VIRTUALENV",
    "PIP_PLATFORM", "PIP_NO_BINARY", "PIP_ONLY_BINARY", "PIP_NO_DEPS", "PIP_DRY_RUN", "PIP_NOT_YET_INVENTED",
    "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "PYTHONPLATLIBDIR",
]  # fmt: skip

FETCHING = [
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX_STRATEGY", "UV_FIND_LINKS",
    "UV_CONFIG_FILE", "UV_NO_CONFIG", "UV_INDEX_OURS_USERNAME", "UV_INDEX_OURS_PASSWORD", "UV_KEYRING_PROVIDER",
    "UV_CREDENTIALS_DIR", "UV_S3_ENDPOINT_URL", "UV_SYSTEM_CERTS", "UV_NATIVE_TLS", "UV_INSECURE_HOST",
    "UV_OFFLINE", "UV_HTTP_TIMEOUT", "UV_HTTP_CONNECT_TIMEOUT", "UV_HTTP_RETRIES", "UV_REQUEST_TIMEOUT",
    "UV_LOCK_TIMEOUT", "UV_CACHE_DIR", "UV_NO_CACHE", "UV_LINK_MODE", "UV_CONCURRENT_DOWNLOADS",
    "UV_CONCURRENT_INSTALLS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS",
    "PIP_CONFIG_FILE", "PIP_KEYRING_PROVIDER", "PIP_NO_INPUT", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_TRUSTED_HOST",
    "PIP_USE_FEATURE", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "PIP_RETRIES", "PIP_CACHE_DIR",
    "PIP_NO_CACHE_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "https_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "NETRC",
]  # fmt: skip

EXPORTED = {name: f"value of {name}" for name in REDIRECTING + FETCHING}


@dataclass
class Call:
    """A call of a stub."""

    folder: Path
    program: str
    arguments: list[str]
    environment: dict[str, str]

    @property
    def exported(self) -> dict[str, str]:
        """The variables about pip, uv and the module search path that it sees."""
        return {
            name: value
            for name, value in self.environment.items()
            if name in EXPORTED or name.startswith(("UV_", "PIP_"))
        }


@dataclass
class Project:
    """A folder with the files that setup reads."""

    folder: Path
    stand_ins: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.stand_ins}:{os.environ['PATH']}",
            "HOME": str(self.stand_ins),
            "CALLS": str(self.stand_ins / "calls"),
        }

    def make(self, *words: str, **exported: str) -> str:
        return self.run("make", *words, **exported)

    def run(self, *words: str, **exported: str) -> str:
        environment = self.environment | exported
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def calls(self) -> list[Call]:
        """The calls since the last query."""
        record = self.stand_ins / "calls"
        calls = [parse_call(text) for text in record.read_text().split("\2")[:-1]] if record.exists() else []
        record.unlink(missing_ok=True)
        return calls

    def copied_to(self, folder: Path) -> Project:
        self.run("cp", "-a", str(self.folder), str(folder))
        return Project(folder, self.stand_ins)

    def moved_to(self, folder: Path) -> Project:
        self.folder.rename(folder)
        return Project(folder, self.stand_ins)


def parse_call(text: str) -> Call:
    command, environment = text.split("\1")
    folder, program, *arguments = command.split("\0")[:-1]
    return Call(
        Path(folder), program, arguments, dict(entry.split("=", 1) for entry in environment.split("\0") if entry)
    )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path.resolve() / FOLDER, tmp_path.resolve() / "bin")
    project.folder.mkdir()
    (project.folder / "requirements").mkdir()
    for file in (ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("requirements/*.lock")):
        (project.folder / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    project.stand_ins.mkdir()
    for name in ("python3", "python3-other"):
        (project.stand_ins / name).write_text(STAND_IN)
        (project.stand_ins / name).chmod(0o755)
    return project


def calls_of_setup(python: str, *extras: str) -> list[list[str]]:
    """Every program that setup starts, with its arguments, without the code that checks the version of Python."""
    uv = [".venv/bin/uv", "pip", "install", "--python", ".venv/bin/python", "--system-certs", "--quiet"]
    locks = ["requirements/base.lock", "requirements/dev.lock"] + ["requirements/gpu.lock"] * GPU
    pip = [".venv/bin/python", "-m", "pip", "install", "--no-user", "--quiet", "--disable-pip-version-check"]
    return [
        [python, "-c"],
        [python, "-m", "venv", "--clear", ".venv"],
        [*pip, "--require-hashes", "-r", "requirements/uv.lock"],
        [*uv, "--require-hashes", *(word for lock in locks for word in ("-r", lock))],
        [*uv, "--no-deps", "--no-build-isolation", "--editable", "."],
        *([*uv, "--require-hashes", "-r", f"requirements/{extra}.lock"] for extra in extras),
    ]


def commands(calls: list[Call]) -> list[list[str]]:
    return [[call.program, *call.arguments[: 1 if call.arguments[0] == "-c" else None]] for call in calls]


EXTRAS = {
    ("setup",): [],
    ("export",): ["export"],
    ("train", "backend=jax"): ["jax-gpu" if GPU else "jax"],
}


@pytest.mark.parametrize("words", EXTRAS)
def test_setup_installs_into_the_environment_of_the_project(project: Project, words: tuple[str, ...]):
    project.make(*words, **EXPORTED)
    *setup, _ = calls = project.calls()
    assert commands(setup) == calls_of_setup(f"{project.stand_ins}/python3", *EXTRAS[words])
    assert {call.folder for call in calls} == {project.folder}


@pytest.mark.parametrize("words", EXTRAS)
def test_only_variables_about_fetching_packages_reach_setup(project: Project, words: tuple[str, ...]):
    project.make(*words, **EXPORTED)
    *setup, _ = project.calls()
    assert setup
    for call in setup:
        assert call.exported == {name: EXPORTED[name] for name in FETCHING}, call.arguments


def test_stubs_see_variables_that_are_not_cleared(project: Project):
    """Negative control of the test above."""
    project.run("python3", "-m", "pip", **EXPORTED)
    project.run("env", "-u", "UV_PYTHON", "python3", "-m", "pip", **EXPORTED)
    everything, all_but_one = project.calls()
    assert everything.exported == EXPORTED
    assert everything.exported.keys() - all_but_one.exported.keys() == {"UV_PYTHON"}


@pytest.mark.parametrize("transfer", [Project.copied_to, Project.moved_to])
def test_project_in_another_folder_is_set_up_again(project: Project, transfer):
    other = f"{project.stand_ins}/python3-other"
    run = [".venv/bin/python", "-m", "train.export"]
    project.make("export", f"PYTHON={other}")
    assert commands(project.calls()) == [*calls_of_setup(other, "export"), run]
    project.make("export")
    assert commands(project.calls()) == [run]

    transferred = transfer(project, project.folder.with_name(f"{FOLDER} too"))
    transferred.make("export")
    calls = project.calls()
    assert commands(calls) == [*calls_of_setup(other, "export"), run]
    assert {call.folder for call in calls} == {transferred.folder}
    transferred.make("export")
    assert commands(project.calls()) == [run]


def test_copy_does_not_change_the_environment_of_the_original(project: Project):
    project.make("export")
    copy = project.copied_to(project.folder.with_name("copy"))
    copy.make("setup")
    assert not (copy.folder / ".venv/.extra-export").exists()
    project.calls()
    project.make("export")
    assert commands(project.calls()) == [[".venv/bin/python", "-m", "train.export"]]


def test_every_target_notices_that_the_project_was_copied(project: Project):
    project.make("setup")
    copy = project.copied_to(project.folder.with_name("copy"))
    targets = {line.split()[0] for line in project.make("help").partition("\n\n")[0].splitlines()} - {"help"}
    assert len(targets) > 20
    assert {name for name in targets if "-m venv" in project.make("-n", name)} == set()
    assert {name for name in targets if "-m venv" in copy.make("-n", name)} == targets
