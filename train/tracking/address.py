"""Where the record of a run goes, when only the run's folder says so.

Anybody may have written the folder. An address in it that is not this machine's own is named before anything is sent
there, and gets none of the credentials that this machine keeps for MLflow.
"""

from __future__ import annotations

import os
from pathlib import Path

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
    """The tracking address of this machine: what conf/ says now, or mlflow.db beside the Makefile."""
    return composition.compose([]).tracking.uri or default_uri(ROOT)


def run_uri(folder: RunDir, overrides: list[str]) -> str | None:
    """The address for the record of a run, of the `key=value` words if it was typed.

    None where the folder holds a reference to the environment, which says so: what was asked for can be done without
    the address, and `make sync` can be told it later.
    """
    if typed := [word for word in overrides if word.partition("=")[0] == URI_KEY]:
        return composition.compose(typed).tracking.uri or default_uri(ROOT)
    try:
        return stored_uri(folder)
    except ValueError as error:
        print_and_log(f"the record in MLflow has to wait: {error}")
        return None


def use_stored_uri(folder: RunDir, uri: str | None) -> str:
    """An address that stands in the folder, None for the default; one that is not this machine's is named."""
    if uri is None:
        return default_uri(ROOT)
    own = machine_uri()
    if uri != own:
        withheld = _withhold_credentials()
        print_and_log(
            f"the record goes to {strip_credentials(uri)}, as {folder.path / 'config.yaml'} says; this machine's is "
            f"{strip_credentials(own)}"
            + (f" ({', '.join(withheld)} not sent; type the address to send them)" if withheld else "")
        )
    return uri


def stored_uri(folder: RunDir) -> str:
    """The address that the run was started with; its password was not kept.

    Raises: ValueError where that is a reference to the environment which conf/ does not hold now.
    """
    uri = folder.config().get("tracking", {}).get("uri")
    if "${" in str(uri) and (URI_KEY, uri) in composition.conf_references({}):
        return machine_uri()
    if uri is not None and ("${" in str(uri) or "://" not in str(uri)):
        raise ValueError(f"uri must be given, since the run's was {uri}; use make sync uri=ADDRESS")
    return use_stored_uri(folder, uri)


def _withhold_credentials() -> list[str]:
    """Takes this machine's credentials for MLflow out of this process and those that it starts; their names."""
    names = [name for name in CREDENTIALS if os.environ.pop(name, None) is not None]
    if CREDENTIALS_FILE.expanduser().exists():
        # MLflow reads the file where the environment has no user; there is no other way to tell it not to.
        os.environ |= {"MLFLOW_TRACKING_USERNAME": "anonymous", "MLFLOW_TRACKING_PASSWORD": "anonymous"}
        names.append(str(CREDENTIALS_FILE))
    return names
