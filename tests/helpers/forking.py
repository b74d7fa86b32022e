"""A process that has imported the libraries, and forks where a test would start a Python.

Importing torch, transformers and MLflow takes many times longer than a tiny run. `python()` is an
executable that takes what `python` takes ([-u] SCRIPT, -m MODULE or -c CODE) and stands for it: its
process hands output, input and signals on to a fork, and ends as that does. The fork has the
libraries and nothing of this project's, which it imports from its own PYTHONPATH and folder as any
new process does. What is to show that a start works, or what it imports, takes `sys.executable`.

This file is also that executable's program, and the server's: it imports nothing of the project's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

LIBRARIES = (
    "torch", "transformers", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama", "transformers.models.gemma2.modeling_gemma2",
    "sae_lens", "datasets", "mlflow", "mlflow.tracking.client",
    "mlflow.store.tracking.sqlalchemy_store", "sklearn.linear_model", "scipy.stats",
    "scipy.optimize", "pandas", "pyarrow.parquet", "matplotlib.figure", "hydra",
    "hydra._internal.utils", "hydra._internal.hydra", "submitit", "rich.console", "rich.progress",
    "psutil", "safetensors.torch",
)  # fmt: skip
HANDED_ON = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
START_SECONDS = 300.0
EVERYBODYS = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
"""The tests' process, also in a fork of it: that which hands them out, where there are several."""


def python() -> str:
    """The executable's path: the same in all processes of `pytest -n`. Whoever first runs it starts
    its server, which ends after the tests."""
    folder = _folder()
    path = folder / "python"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        clean = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        mine = folder / f"python.{os.getpid()}"
        (folder / "environ.json").write_text(json.dumps(clean))
        ask = f"{sys.executable} -IS {Path(__file__).resolve()} ask {folder} {EVERYBODYS}"
        mine.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
        mine.chmod(0o700)
        mine.rename(path)
    return str(path)


def clean_up() -> None:
    """Leave nothing of an executable that nobody ran. A server does that itself."""
    folder = _folder()
    if folder.exists() and not (folder / "server").exists():
        shutil.rmtree(folder)


def _folder() -> Path:
    # Not pytest's tmp_path: a socket's path may have 107 characters.
    return Path(tempfile.gettempdir()) / f"forking-{os.getuid()}-{EVERYBODYS}"


# --- the executable ---


def ask(folder: Path, everybodys: str, arguments: list[str]) -> int:
    """Stand for a Python: returns the fork's exit code, or ends by the signal that ended it."""
    given = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if not given or (given[0].startswith("-") and given[0] not in ("-m", "-c")):
        os.execv(sys.executable, [sys.executable, *arguments])  # options that no fork can have
    waiting: list[int] = []  # signals that come before there is a fork
    for signum in HANDED_ON:
        signal.signal(signum, lambda number, _: waiting.append(number))
    connection = _connected(folder, everybodys)
    umask = os.umask(0o77)
    os.umask(umask)
    request = {"cwd": os.getcwd(), "environ": dict(os.environ), "umask": umask, "arguments": given}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    answers = connection.makefile()
    child = int(answers.readline())

    def hand_on(number: int, _: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for signum in HANDED_ON:
        signal.signal(signum, hand_on)
    for number in waiting:
        hand_on(number)
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:  # whose effect nobody can change
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _connected(folder: Path, everybodys: str) -> socket.socket:
    """Starts the server where nobody has."""
    deadline = time.monotonic() + START_SECONDS
    with contextlib.suppress(FileExistsError):
        (folder / "server").mkdir()
        with (folder / "log").open("w") as log:
            subprocess.Popen(
                [sys.executable, __file__, "serve", str(folder), everybodys], stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env=json.loads((folder / "environ.json").read_text()),
            )  # fmt: skip
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / "socket"))
            return connection
        except OSError as error:
            connection.close()
            said = (folder / "log").read_text() if (folder / "log").exists() else ""
            if "Traceback" in said or time.monotonic() > deadline:
                raise RuntimeError(f"no server in {folder}: {said}") from error
        time.sleep(0.05)


# --- the server ---


def serve(folder: Path, everybodys: int) -> None:
    """Fork for whoever asks, until the tests' process is gone."""
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    path = sys.path[1:]
    gc.collect()
    gc.freeze()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.listen(64)
    children: dict[int, socket.socket] = {}
    while _is_there(everybodys):
        ready, _, _ = select.select([listening, heard, *children.values()], [], [], 1.0)
        if heard in ready:
            os.read(heard, 4096)
        for child, connection in children.items():
            if connection in ready:  # nothing is ever said: who stands for the fork is gone
                os.kill(child, signal.SIGKILL)
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            connection = children.pop(ended[0])
            _say(connection, os.waitstatus_to_exitcode(ended[1]))
            connection.close()
        if listening not in ready:
            continue
        connection, _ = listening.accept()
        if (request := _request(connection)) is None:
            continue
        asked, fds = request
        if not (child := os.fork()):
            signal.set_wakeup_fd(-1)
            for other in (listening, connection, *children.values()):
                other.close()
            os.close(heard)
            os.close(told)
            _be_a_python(asked, fds, str(folder / "python"), path)
        for fd in fds:
            os.close(fd)
        children[child] = connection
        _say(connection, child)
    for child in children:
        os.kill(child, signal.SIGKILL)
    (folder / "server").rmdir()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _say(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it is gone
        connection.sendall(f"{number}\n".encode())


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """What is asked for, with files for input, output and errors; None where who asked was killed
    before it had."""
    text, fds = b"", []
    while not text.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, 2**20, 3)
        text, fds = text + part, [*fds, *more]
        if not part:
            for fd in fds:
                os.close(fd)
            connection.close()
            return None
    return json.loads(text), fds


def _be_a_python(
    asked: dict[str, Any], fds: list[int], executable: str, path: list[str]
) -> NoReturn:
    """The rest of a fork's life."""
    code = 1
    try:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        for fd in fds:
            os.close(fd)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(asked["cwd"])
        os.umask(asked["umask"])
        os.environ.clear()
        os.environ.update(asked["environ"])
        sys.executable = executable
        # Files of their own: these were made for what the server writes to.
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
        code = _run(asked["arguments"], path)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str], path: list[str]) -> int:
    """As `python ARGUMENTS`, up to its end; returns the exit code."""
    how, *rest = arguments
    own = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    first = {"-m": os.getcwd(), "-c": ""}.get(how, str(Path(how).resolve().parent))
    sys.path[:] = [first, *own, *path]
    importlib.invalidate_caches()
    code = 0
    try:
        if how == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(how, run_name="__main__")
    except SystemExit as ended:
        code = _code_of(ended)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    return code


def _code_of(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return int(ended.code or 0) & 0xFF
    print(ended.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    what, where, whose, *rest = sys.argv[1:]
    if what == "ask":
        sys.exit(ask(Path(where), whose, rest))
    serve(Path(where), int(whose))
