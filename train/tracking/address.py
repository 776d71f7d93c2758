"""The MLflow address that a run is uploaded to, when only the run folder states it.

A run folder is untrusted. An address in it that differs from this machine's own is printed before anything is sent
there, and receives none of the MLflow credentials of this machine.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from train.cli.arguments import Override
from train.cli.progress import print_and_log
from train.config import composition
from train.config.schema import ROOT
from train.config.serialization import strip_credentials
from train.tracking.mlflow_store import default_uri
from train.tracking.run_dir import RunDir

URI_KEY = "tracking.uri"
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)  # fmt: skip
CREDENTIALS_FILE = Path("~/.mlflow/credentials")


def machine_uri() -> str:
    """The tracking address of this machine: the current value in conf/, or mlflow.db beside the Makefile."""
    return composition.compose([]).tracking.uri or default_uri(ROOT)


def run_uri(run_dir: RunDir, overrides: list[Override]) -> str | None:
    """The address that a run is uploaded to: from the overrides if given there, else the stored one.

    None, with a message, if the folder only holds a reference to the environment: the command does not need the
    address, and `make sync` can be given it later.
    """
    if uri_overrides := [str(override) for override in overrides if override.key == URI_KEY]:
        return composition.compose(uri_overrides).tracking.uri or default_uri(ROOT)
    try:
        return stored_uri(run_dir)
    except ValueError as error:
        print_and_log(f"upload to MLflow postponed: {error}")
        return None


def use_stored_uri(run_dir: RunDir, uri: str | None) -> str:
    """The address to use for a stored one (None: the default); announces one that is not this machine's own."""
    if uri is None:
        return default_uri(ROOT)
    local_uri = machine_uri()
    if uri != local_uri:
        withheld = _withhold_credentials()
        print_and_log(
            f"uploading to {strip_credentials(uri)}, the address in {run_dir.path / 'config.yaml'}; this machine's is "
            f"{strip_credentials(local_uri)}"
            + (f" ({', '.join(withheld)} not sent; pass the address to send them)" if withheld else "")
        )
    return uri


def stored_uri(run_dir: RunDir) -> str:
    """The address that the run was started with, without its password, which is never stored.

    Raises: ValueError if there is none, as in a sweep's record, or if it is a reference to the environment that conf/
    does not contain today.
    """
    if not run_dir.inside("config.yaml").exists():
        command = f"make sync run={shlex.quote(str(run_dir.path))} uri=ADDRESS"
        raise ValueError(f"no tracking.uri is stored in {run_dir.path}; use {command}")
    uri = run_dir.config().get("tracking", {}).get("uri")
    if "${" in str(uri) and (URI_KEY, uri) in composition.conf_references({}):
        return machine_uri()
    if uri is not None and ("${" in str(uri) or "://" not in str(uri)):
        raise ValueError(
            f"the run's tracking.uri is stored as {uri}, which is no address; "
            f"use make sync run={shlex.quote(str(run_dir.path))} uri=ADDRESS"
        )
    return use_stored_uri(run_dir, uri)


def _withhold_credentials() -> list[str]:
    """Hides this machine's MLflow credentials from this process and its children; returns their names."""
    names = [name for name in CREDENTIALS if os.environ.pop(name, None) is not None]
    if CREDENTIALS_FILE.expanduser().exists():
        # MLflow reads the file unless the environment names a user; it has no switch to ignore it.
        os.environ |= {"MLFLOW_TRACKING_USERNAME": "anonymous", "MLFLOW_TRACKING_PASSWORD": "anonymous"}
        names.append(str(CREDENTIALS_FILE))
    return names
