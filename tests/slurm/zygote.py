"""A process that has imported everything, and forks a job's process where a job asks it to.

A job starts with ten seconds of imports; with twenty interruptions that is most of a test. So the
job only hands its environment, output and signals on to the fork, and ends as it does.
`python -m tests.slurm.zygote serve SOCKET`, and in a job `… ask SOCKET RUN_DIRECTORY`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path


def ask(path: str, arguments: list[str]) -> int:
    """The job's part. Returns the fork's exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = json.dumps({"environ": dict(os.environ), "arguments": arguments}).encode()
    socket.send_fds(connection, [request + b"\n"], [1, 2])
    answers = connection.makefile()
    child = int(answers.readline())
    for signum in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, lambda number, _: os.kill(child, number))
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(path: str) -> None:
    """Fork for one job after another."""
    import torch

    from tests.helpers.disturbed import watch_generation, write_freely

    torch.set_num_threads(1)
    write_freely()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    while True:
        connection, _ = listening.accept()
        request, fds = b"", []
        while not request.endswith(b"\n"):
            part, more, _, _ = socket.recv_fds(connection, 2**20, 2)
            if not part:
                break  # the job was killed before it asked
            request, fds = request + part, [*fds, *more]
        if not request.endswith(b"\n"):
            continue
        asked = json.loads(request)
        child = os.fork()
        if child == 0:
            for number, fd in enumerate(fds, start=1):
                os.dup2(fd, number)
            # Files of their own: these were made for what the parent writes to.
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
            os.environ.clear()
            os.environ.update(asked["environ"])
            watch_generation(Path(os.environ["DISTURBED_EVENTS"]))
            _run(asked["arguments"])
        for fd in fds:
            os.close(fd)
        connection.sendall(f"{child}\n".encode())
        _tell_the_end(child, connection)


def _run(arguments: list[str]) -> None:
    """What a job that the launcher submitted does, in the fork."""
    from crl_exp.__main__ import main
    from crl_exp.runs import slurm

    slurm.claim()

    code = 1
    try:
        code = main(["run", *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()  # the fork ends here, and with it who would print it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_the_end(child: int, connection: socket.socket) -> None:
    """Wait for the fork; where the job's process is killed, kill it too."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if select.select([connection], [], [], 0.01)[0]:  # nothing is ever said: it is gone
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    connection.close()


if __name__ == "__main__":
    how, where, *rest = sys.argv[1:]
    sys.exit(ask(where, rest) if how == "ask" else serve(where))
