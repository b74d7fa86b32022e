"""Where things lie, and names that become a folder or a file: the same for every command."""

from __future__ import annotations

import sys
from pathlib import Path

from crl_exp.config.display import plain
from crl_exp.config.errors import UserError

BESIDE = Path(__file__).resolve().parents[2]
"""Where the package lies: the checkout, or an environment's site-packages."""
SHIPPED = Path(__file__).resolve().parent / "shipped"
"""What a wheel carries besides modules (setup.py); no checkout has it."""
REPO = SHIPPED if SHIPPED.is_dir() else BESIDE
"""The checkout (`conf/`, shipped assets), or the folder that has the same in a wheel."""
COMPARISONS = "comparisons"
IN_THE_OUTPUT_FOLDER = ("shared", COMPARISONS, "mlartifacts", "mlflow.db")
"""What lies beside the sweeps: stage 1's store, reports on several sweeps, MLflow's own file and
artifacts."""
LONGEST = 200  # bytes; file systems take 255, and lock files are a little longer


def here_or_shipped(path: Path) -> Path:
    """A relative path in the working directory, or where there is none in what is shipped."""
    return path if path.is_absolute() or path.exists() else REPO / path


def working_directory_last() -> None:
    """Have modules looked for in the working directory behind all others, however we were started.

    `python -m` puts it first, where a user's own datasets.py would hide the library of that name; a
    console script and `python launch.py` leave it out. A sweep is checked by the one and run by the
    other, so that all must find the same. A checkout that one is in stays where it is.
    """
    here = Path.cwd()
    if here == BESIDE:
        return
    if sys.path and (not sys.path[0] or Path(sys.path[0]) == here):
        del sys.path[0]
    if str(here) not in sys.path:
        sys.path.append(str(here))


def name_fault(key: str, name: object, taken: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a name that is to be one folder, such as sweep_name; None: nothing.

    key: as it is typed. taken: names that mean something else where it would lie.
    """
    shown = plain(str(name))
    if not isinstance(name, str) or not name.strip():
        why = "is empty"
    elif any(char in name for char in "/\\") or name in (".", ".."):
        why = "is a path; it names one folder, of no other (a path goes into output_dir=…)"
    elif name.startswith("."):
        why = "begins with a dot, which hides the folder"
    elif shown != name or "\n" in name or "\t" in name:
        why = "holds a character that can't be seen"
    elif name != name.strip():
        why = "begins or ends with a blank"
    elif len(name.encode()) > LONGEST:
        why, shown = f"is longer than {LONGEST} bytes", shown[:40] + "…"
    elif name in taken:
        why = f"lies in output_dir already and is no sweep ({', '.join(taken)} do)"
    else:
        return None
    shown = shown.replace("\n", "\\n").replace("\t", "\\t")
    return f"{key}={shown!r}: {why}; take a plain name, such as {key}=mine"


def sweep_fault(name: object) -> str | None:
    """What is wrong with a sweep's name; None: nothing."""
    return name_fault("sweep_name", name, IN_THE_OUTPUT_FOLDER)


def check_sweep(name: object) -> None:
    """Raise `UserError` where no sweep may be called so."""
    if fault := sweep_fault(name):
        raise UserError(fault)
