"""`make ui`: the MLflow UI over this project's store, on 127.0.0.1."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

from train import command
from train.config import ROOT
from train.tracking import store


@dataclass
class Ui:
    """`port`: where it listens on 127.0.0.1; `uri`: the store, by default mlflow.db beside the Makefile."""

    port: int = 5000
    uri: str = ""


def ui(words: list[str]) -> int:
    """Becomes MLflow's own server.

    Raises: ValueError if the port is taken.
    """
    keys = command.parse(Ui, words)
    refuse_taken(keys.port)
    uri = keys.uri or store.default_uri(ROOT)
    print(f"MLflow UI: http://127.0.0.1:{keys.port}   (Ctrl-C ends it)", flush=True)
    words = ["server", "--host", "127.0.0.1", "--port", str(keys.port), "--workers", "1"]
    if (database := store.database_path(uri)) is not None:
        words += ["--default-artifact-root", (database.parent / "mlartifacts").as_uri()]
        # From its own folder by a relative address: MLflow would make the folder that a quoted path names.
        database.parent.mkdir(parents=True, exist_ok=True)
        os.chdir(database.parent)
        uri = f"sqlite:///{store.quoted(database.name)}"
    words += ["--backend-store-uri", uri]
    if store.SITE_PACKAGES:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (store.SITE_PACKAGES, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *words])


def refuse_taken(port: int) -> None:
    """Raises: ValueError for a port of 127.0.0.1 that nothing can listen on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ValueError(f"port must be free, got {port}; use e.g. port={min(port, 65000) + 1}") from None


if __name__ == "__main__":
    command.run(ui)
