"""`make ui`: serves the MLflow UI for this project's store on 127.0.0.1.

    make ui port=5001

It runs until Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from train.cli import arguments
from train.cli.fields import setting
from train.config.schema import ROOT
from train.tracking import mlflow_store
from train.tracking.mlflow_server import check_port_free


@dataclass
class Ui:
    """The keys of `make ui`."""

    port: int = setting(5000, "port on 127.0.0.1", ge=1, le=65535)
    uri: str = setting("", "MLflow store; none: mlflow.db beside the Makefile")


def ui(argv: list[str]) -> int:
    """Replaces this process with MLflow's own server.

    Raises: ValueError if the port is taken.
    """
    keys = arguments.parse(Ui, argv)
    check_port_free(keys.port)
    uri = keys.uri or mlflow_store.default_uri(ROOT)
    print(f"MLflow UI: http://127.0.0.1:{keys.port}   (Ctrl-C to stop)", flush=True)
    argv = ["server", "--host", "127.0.0.1", "--port", str(keys.port), "--workers", "1"]
    if (database := mlflow_store.database_path(uri)) is not None:
        argv += ["--default-artifact-root", (database.parent / "mlartifacts").as_uri()]
        # A relative address from the store's own folder: MLflow would create a folder named like the quoted path.
        database.parent.mkdir(parents=True, exist_ok=True)
        os.chdir(database.parent)
        uri = f"sqlite:///{mlflow_store.quote_sqlite_path(database.name)}"
    argv += ["--backend-store-uri", uri]
    if mlflow_store.SITE_PACKAGES:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (mlflow_store.SITE_PACKAGES, os.environ.get("PYTHONPATH")))
        )
    # MLflow's background jobs evaluate agents and prompts: eight processes that no view of a run needs.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *argv])


if __name__ == "__main__":
    arguments.main(ui, Ui)
