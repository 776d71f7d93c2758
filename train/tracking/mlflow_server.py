"""Starts MLflow's model server."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path


def exec_server(module: str, run_path: Path, port: int) -> None:
    """Replaces this process with the server. module: the one with `_load_pyfunc`, which gets the folder `run_path`.

    Raises: ValueError if the port is taken.
    """
    check_port_free(port)
    import mlflow

    folder = Path(tempfile.mkdtemp(prefix="serve-"))  # small: the weights stay in the run folder
    (folder / "run.json").write_text(json.dumps({"run": str(run_path)}))
    mlflow.pyfunc.save_model(
        folder / "model", loader_module=module, data_path=str(folder / "run.json"), pip_requirements=[]
    )
    print(f"model server: http://127.0.0.1:{port}/invocations   (Ctrl-C to stop)", flush=True)
    arguments = ["models", "serve", "--model-uri", str(folder / "model"), "--env-manager", "local"]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # MLflow looks for uvicorn on the PATH.
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *arguments], {**os.environ, "PATH": search_path})


def bad_request(message: str) -> Exception:
    """The exception that the server answers with status 400."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    return MlflowException(message, error_code=BAD_REQUEST)


def check_port_free(port: int) -> None:
    """Raises: ValueError if no server can listen on the port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ValueError(f"cannot listen on port {port}; use e.g. port={min(port, 65000) + 1}") from None
