"""How far a run is: told by a thread of its own every few seconds in `heartbeat.json`, and to who
looks on by one progress bar at a time, on standard error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crl_exp.config.files import read_json, write_json

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 10.0
PHASES = ("load", "warmup", "train", "evaluate")


class Progress:
    """What the heartbeat tells: written by the run, read by the thread.

    seconds: spent in each phase so far, that of earlier attempts counted in.
    packed: most runs that shared one of the attempts' time, 1: none was in a pack.
    """

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.what, self.done, self.total = "", 0, 0
        self.metrics: dict[str, float | None] = {}  # null: undefined
        self.seconds: dict[str, float] = {}
        self.packed = 1
        self._since = self._phase_since = time.perf_counter()
        self._first = 0
        self._bars = 0  # that are open

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """A phase of the run; its seconds are added to those of earlier attempts."""
        before = self.seconds.get(phase, 0.0)
        self.phase, self._phase_since = phase, time.perf_counter()
        self.what, self.done, self.total = "", 0, 0
        yield
        now = time.perf_counter()
        self.seconds[phase] = round(before + now - self._phase_since, 3)
        self._phase_since = now

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[None]:
        """A bar of `total` steps; within another one (prompts are read in the middle of training)
        it takes that one's place only while the block lasts."""
        outer = self.what, self.done, self.total, self._since, self._first
        self.what, self.done, self.total = what, 0, total
        self._since, self._first = time.perf_counter(), 0
        self._bars += 1
        try:
            yield
        finally:
            self._bars -= 1
            if self._bars:
                self.what, self.done, self.total, self._since, self._first = outer

    def advance(self, n: int) -> None:
        """n more steps are done."""
        self.done += n

    def known(self, n: int) -> None:
        """n of the steps done were an earlier attempt's: they took no time in this one."""
        self._first += n

    def left_seconds(self) -> float | None:
        """Seconds to the end of the bar at the speed so far; None where nothing is known."""
        here = self.done - self._first
        if not here:
            return None
        return (self.total - self.done) * (time.perf_counter() - self._since) / here

    def told(self) -> dict[str, Any]:
        now = dict(self.seconds)
        now[self.phase] = now.get(self.phase, 0.0) + time.perf_counter() - self._phase_since
        return {
            "time": time.time(), "phase": self.phase, "what": self.what, "done": self.done,
            "total": self.total, "left_seconds": self.left_seconds(),
            "metrics": dict(self.metrics), "seconds": now, "packed": self.packed,
        }  # fmt: skip


@contextmanager
def beating(path: Path, progress: Progress) -> Iterator[None]:
    """Write the heartbeat at once, then every `HEARTBEAT_SECONDS`, and once more at the end."""
    ended = threading.Event()

    def beat() -> None:
        try:
            write_json(path, progress.told())
        except (OSError, ValueError) as error:
            # The run itself meets a full disk at its next checkpoint, and says so there.
            log.warning("no heartbeat: %s", error)

    def go_on() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            beat()

    beat()
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        beat()


def read_heartbeat(path: Path) -> dict[str, Any]:
    """The last heartbeat; {} where there is none (yet). Raises `UserError` for a damaged one."""
    return read_json(path, "set resume=force to start this run anew") or {}


_shown = threading.Lock()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; the yielded function moves it on by n.

    Nothing is shown while another bar is: of runs packed together the first is seen.
    """
    if not _shown.acquire(blocking=False):
        yield lambda _: None
        return
    try:
        with _bar(what, total) as advance:
            yield advance
    finally:
        _shown.release()


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console  # whoever only reads heartbeats doesn't wait for it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True, force_jupyter=False)
    with Bar(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
