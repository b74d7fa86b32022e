"""What a person sees while a run goes on: one progress bar at a time, on standard error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# In a notebook rich would draw bars by ipywidgets, and where there are none leave an empty output
# for each and a warning: what a log gets is good there too.
console = Console(stderr=True, force_jupyter=False)


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
    columns = (
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
