"""The code, package versions and machine that a run is tagged with."""

from __future__ import annotations

import getpass
import hashlib
import platform
import shlex
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from train.storage.checksummed import file_sha256

NUMERICAL_PACKAGES = ("tensorflow", "keras", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
NOTE_WIDTH = 100  # characters per line
LINE_CONTINUATION = " \\\n  "
PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy", "hydra-core", "mlflow")


def tags(root: Path) -> dict[str, str]:
    """MLflow tags: Git commit and dirty flag, host, user, Python and package versions."""
    tags = {
        "host": socket.gethostname(),
        "mlflow.user": _user(),
        "mlflow.source.name": "train",
        "mlflow.source.type": "LOCAL",
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"version.{name}": version(name) for name in PACKAGES},
    }
    commit = _git(root, "rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def versions(backend: str) -> dict[str, str]:
    """Versions of everything that computes, as other versions may give other bits."""
    names = (*NUMERICAL_PACKAGES, *(("jax", "jaxlib") if backend == "jax" else ()))
    return {"version.python": platform.python_version(), **{f"version.{name}": version(name) for name in names}}


def source_hash(package: Path) -> str:
    """The first 16 hex digits of the SHA-256 over names and contents of the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def requirements(packages: tuple[str, ...]) -> list[str]:
    """`name==version` for each installed package."""
    return [f"{name}=={version(name)}" for name in packages]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no passwd entry
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def command_note(command: str) -> dict[str, str]:
    """The tag that MLflow shows as a run's description: the command, wrapped to fit the page."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > NOTE_WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return {"mlflow.note.content": f"```sh\n{LINE_CONTINUATION.join(lines)}\n```"}
