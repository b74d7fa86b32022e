"""A real MLflow server on loopback that can be killed, and a proxy that makes it slow."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from tests.helpers.mlflow_reading import free_port

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a process more, for what is not used here
}


class Server:
    """`mlflow server` on a SQLite file in `folder`; the same port and file at every start."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "log").open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **QUIET}, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        assert self.process is not None
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.2)
        raise AssertionError(f"no MLflow server: {(self.folder / 'log').read_text()}")

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class SlowProxy:
    """Passes everything on to a port of this machine, answers `delay` seconds later."""

    def __init__(self, port: int, delay: float):
        self.port, self.delay = port, delay
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.listening.close()

    def _serve(self) -> None:
        while True:
            try:
                asking, _ = self.listening.accept()
            except OSError:  # closed
                return
            try:
                answering = socket.create_connection(("127.0.0.1", self.port))
            except OSError:  # the server is dead
                asking.close()
                continue
            for pair in ((asking, answering, 0.0), (answering, asking, self.delay)):
                threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, delay: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            time.sleep(delay)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
