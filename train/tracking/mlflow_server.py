"""MLflow's model server."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path


def exec_server(module: str, run_path: Path, port: int) -> None:
    """Replaces this process by the server. module: what has `_load_pyfunc`. run: the folder that it is told of.

    Raises: ValueError if the port is taken.
    """
    check_port_free(port)
    import mlflow

    place = Path(tempfile.mkdtemp(prefix="serve-"))  # a few lines; the network stays where it is
    (place / "run.json").write_text(json.dumps({"run": str(run_path)}))
    mlflow.pyfunc.save_model(
        place / "model", loader_module=module, data_path=str(place / "run.json"), pip_requirements=[]
    )
    print(f"model server: http://127.0.0.1:{port}/invocations   (Ctrl-C ends it)", flush=True)
    words = ["models", "serve", "--model-uri", str(place / "model"), "--env-manager", "local"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # it looks for uvicorn there
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *words], {**os.environ, "PATH": path})


def bad_request(message: str) -> Exception:
    """What the server answers with status 400."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    return MlflowException(message, error_code=BAD_REQUEST)


def check_port_free(port: int) -> None:
    """Raises: ValueError for a port of 127.0.0.1 that nothing can listen on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise ValueError(f"port must be free, got {port}; use e.g. port={min(port, 65000) + 1}") from None
