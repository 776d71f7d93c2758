"""Facts about the code and the machine that a run is tagged with."""

from __future__ import annotations

import getpass
import hashlib
import platform
import shlex
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

NUMERICAL_PACKAGES = ("tensorflow", "keras", "numpy", "pillow", "opencv-python-headless", "simplejpeg")
NOTE_WIDTH = 100  # characters of a line
LINE_CONTINUATION = " \\\n  "  # a shell reads on
PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy", "hydra-core", "mlflow")


def tags(root: Path) -> dict[str, str]:
    """Git commit and dirtiness, host, Python and package versions."""
    found = {
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
        found["git.commit"] = commit
        found["mlflow.source.git.commit"] = commit
        found["git.dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return found


def versions(backend: str) -> dict[str, str]:
    """Of everything that computes: other versions may give other bits."""
    names = (*NUMERICAL_PACKAGES, *(("jax", "jaxlib") if backend == "jax" else ()))
    return {"version.python": platform.python_version(), **{f"version.{name}": version(name) for name in names}}


def source_hash(package: Path) -> str:
    """SHA-256 over the package's sources, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def requirements(packages: tuple[str, ...]) -> list[str]:
    """`name==version` of what is installed."""
    return [f"{name}=={version(name)}" for name in packages]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command_note(command: str) -> dict[str, str]:
    """The tag that MLflow shows as a run's description: the command, in lines that a page has room for."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > NOTE_WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return {"mlflow.note.content": f"```sh\n{LINE_CONTINUATION.join(lines)}\n```"}
