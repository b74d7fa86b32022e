"""Rows of the bench that are commands in processes of their own: CPU seconds, from the shell.

A command's start is held against a bare `import hydra`, one over many finished runs against one
over few, so that a row says whether time grows faster than the runs.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crl_exp.config.paths import REPO
from crl_exp.launcher.bench.finished_runs import make_sweep
from crl_exp.launcher.bench.subject import Subject

Calls = dict[str, Callable[[], float | None]]
FEW, MANY = 100, 500


def cpu_seconds(arguments: list[str], code: int = 0) -> float:
    """User and system seconds of a Python that is given these arguments.

    Raises `RuntimeError` with what it said where it doesn't end with `code`.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPO, capture_output=True, text=True, errors="replace"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def startup_calls(_subject: Subject) -> Iterator[Calls]:
    """What a person waits for before anything is done."""
    launch = str(REPO / "launch.py")
    yield {
        "hydra": lambda: cpu_seconds(["-c", "import hydra"]),
        "help": lambda: cpu_seconds([launch, "--help"]),
        "job": lambda: cpu_seconds([launch, "--cfg", "job"]),
        "typo": lambda: cpu_seconds([launch, "task.n_tst=3"], code=1),
    }


@contextmanager
def many_calls(_subject: Subject) -> Iterator[Calls]:
    """`status` and `report` of few and of many runs, copies of one; the warm-up draws the
    figures, so that what is timed is a report made again."""
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds([
            str(REPO / "launch.py"), "+debug=tiny", "method=crl", "layers.layer=1",
            "tracking=none", f"output_dir={folder}", "sweep_name=one",
        ])  # fmt: skip
        (template,) = [path.parent for path in Path(folder).glob("one/*/result.json")]
        calls: Calls = {}
        for name, n in (("few", FEW), ("many", MANY)):
            sweep = Path(folder) / name
            make_sweep([template], sweep, n)
            for command in ("status", "report"):
                asked = ["-m", "crl_exp", command, str(sweep)]
                calls[f"{command}_{name}"] = lambda asked=asked: cpu_seconds(asked)
        yield calls
