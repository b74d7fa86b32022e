"""What a run holds of the process beside it that sends it to wandb (`follow`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from crl_exp.config.paths import BESIDE, SHIPPED


class Follower:
    """Started with a run, told of its end. warn: called with each line that it has to say.

    Raises OSError where no process can be started.
    """

    def __init__(self, run: Path, warn: Callable[[str], None]):
        # A checkout needn't be installed; what is installed must not come before Python's own.
        paths = [None if SHIPPED.is_dir() else str(BESIDE), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        # Of a session of its own: an interrupt at the terminal is the run's, which tells it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "crl_exp.tracking.to_wandb.follow", str(run)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        self._warn, self._n_lines = warn, 0
        self._reader = threading.Thread(target=self._read, name="wandb", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._n_lines += 1
            self._warn(line.rstrip("\n"))

    def end(self, patience: float) -> str | None:
        """The run is over. Returns what went wrong and wasn't said; waits for at most `patience`
        seconds."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its code says how
            self._process.stdin.close()
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"it took longer than {patience:g} s at the run's end"
        self._reader.join()
        if code == 0 or self._n_lines:
            return None
        return f"the process that sends it ended with exit code {code}"
