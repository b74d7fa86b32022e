"""`python -m crl_exp rm RUN_OR_SWEEP`: run directories removed, and their runs in MLflow.

A directory is first noted for MLflow, then moved out of the way as a whole, then removed: cut off
anywhere, the same line goes on, and the next `sync` tells MLflow what it wasn't told. wandb isn't
told, which is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.launcher.jobs.states import in_work, states_of
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.runs.directory import SWEEP_CONFIG
from crl_exp.runs.records import RUN_KEY, Record, find_records
from crl_exp.runs.status import RunStatus
from crl_exp.tracking.sending.removal import send_removals, take_away
from crl_exp.tracking.sending.sent import WANDB_SENT

TRASH = ".removed"
"""In the output folder: what is being removed; no sweep's name begins with a dot."""


@dataclass(frozen=True)
class Chosen:
    """What is to go. sweep: its folder. records: its runs, or the one run. whole: all of it."""

    sweep: Path
    records: list[Record]
    whole: bool

    @property
    def folder(self) -> Path:
        return self.sweep if self.whole else self.records[0].path


def main(argv: list[str]) -> int:
    """Returns 1 where the answer is no."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp rm",
        description="Remove a run directory or a sweep's folder for good, and delete its runs in "
        "MLflow. Runs that are queued or running have to be cancelled first.",
    )
    parser.add_argument("name", help="a sweep, its folder, a run's folder, SWEEP/KEY or its key")
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    clear_up(arguments.output_dir)
    chosen = choose(arguments.name, arguments.output_dir)
    refuse_at_work(chosen.sweep, chosen.records, "removed")
    if not arguments.yes and not agreed(chosen):
        print("nothing was removed")
        return 1
    n_in_wandb = sum((record.path / WANDB_SENT).exists() for record in chosen.records)
    remove(chosen)
    print(f"removed {chosen.folder}")
    n_deleted, faults = send_removals(chosen.sweep.parent)
    if n_deleted:
        print(f"{n_deleted} runs deleted in MLflow (there they can be restored until `mlflow gc`)")
    if n_in_wandb:
        print(
            f"{n_in_wandb} runs were sent to wandb, which isn't told: what was uploaded there is "
            "deleted on its own pages"
        )
    for fault in faults:
        print(fault)
    return 0


def choose(name: str, output_dir: Path) -> Chosen:
    """What a name means. A run's key is taken whole: what goes for good isn't guessed.

    Raises `UserError` where it is no run and no sweep.
    """
    if not name.strip():
        raise UserError("the name is empty: give a sweep, or a run's folder or key")
    for given in (Path(name), output_dir / name):
        folder = Path(os.path.abspath(given))
        if not folder.is_dir():
            continue
        if folder.is_symlink():
            raise UserError(f"{folder} is a link: remove what it leads to, and the link by hand")
        if _is_run(folder):
            return Chosen(folder.parent, [Record(folder)], whole=False)
        if is_sweep(folder):
            runs = find_records(folder) if any(folder.glob("*/config.yaml")) else []
            return Chosen(folder, runs, whole=True)
    every = [path.parent for path in sorted(output_dir.absolute().glob("*/*/config.yaml"))]
    found = [path for path in every if path.name == name]
    if len(found) == 1 and _is_run(found[0]):
        return Chosen(found[0].parent, [Record(found[0])], whole=False)
    if found:
        several = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise UserError(f"{name} is a run of several sweeps: give one of {several}")
    names = {path.parent.name for path in every} | {path.name for path in every}
    raise UserError(
        f"{name!r} is no sweep in {output_dir}, no run's folder and no run's whole key"
        f"{did_you_mean(name, names)}; nothing was removed"
    )


def _is_run(folder: Path) -> bool:
    return RUN_KEY.fullmatch(folder.name) is not None and (folder / "config.yaml").is_file()


def is_sweep(folder: Path) -> bool:
    """Whether a folder is one sweep's: it has runs, or what a launch writes beside them."""
    if any(_is_run(path.parent) for path in folder.glob("*/config.yaml")):
        return True
    # One whose runs were removed one by one; not a folder of sweeps.
    marks = (folder / "submission.json", folder / SWEEP_CONFIG)
    return any(map(Path.is_file, marks)) and not any(folder.glob("*/*/config.yaml"))


def refuse_at_work(sweep: Path, records: Sequence[Record], what: str) -> None:
    """Raise `UserError` where runs are queued or running. what: would be done with them."""
    states = states_of(records, SweepFile.read(sweep))
    at_work = {r.key: states[r.key][0] for r in records if in_work(states[r.key][0], r)}
    if at_work:
        listed = ", ".join(f"{key} is {state}" for key, state in list(at_work.items())[:5])
        more = f" and {len(at_work) - 5} more" if len(at_work) > 5 else ""
        of = sweep if len(records) != 1 else records[0].path
        raise UserError(
            f"nothing was {what}: {listed}{more}. Cancel first: `python -m crl_exp cancel {of}`"
        )


def agreed(chosen: Chosen) -> bool:
    """What a person answers. Raises `UserError` where there is none."""
    try:
        return input(f"{summary(chosen)}\nremove it for good? [y/N] ").strip().lower() in (
            "y",
            "yes",
        )
    except EOFError as error:
        raise UserError("nobody answers here: add --yes to remove without being asked") from error


def summary(chosen: Chosen) -> str:
    """What would go, in a few lines."""
    states = states_of(chosen.records, SweepFile.read(chosen.sweep))
    counted = Counter(state for state, _ in states.values())
    runs = ", ".join(f"{n} {state}" for state, n in sorted(counted.items())) or "no run"
    n_bytes = sum(p.stat().st_size for p in chosen.folder.rglob("*") if p.is_file())
    lines = [f"{chosen.folder}: {runs}, {n_bytes / 1e6:.1f} MB"]
    if chosen.whole:
        runs_of = {record.key for record in chosen.records}
        beside = sorted(p.name for p in chosen.sweep.iterdir() if p.name not in runs_of)
        lines.append(
            f"  beside the runs: {', '.join(n for n in beside if n[0] != '.') or 'nothing'}"
        )
    return "\n".join(lines)


def remove(chosen: Chosen) -> None:
    """Raises `UserError` where a run has been started meanwhile."""
    output_dir = chosen.sweep.parent
    everything = output_dir / TRASH
    trash = everything / uuid.uuid4().hex
    with FileLock(f"{everything}.lock"):  # one at a time, as each clears up all that was left
        trash.mkdir(parents=True)
        with locked(chosen.sweep):
            refuse_at_work(chosen.sweep, chosen.records, "removed")
            sweep = SweepFile.read(chosen.sweep)
            for record in chosen.records:
                with RunStatus(record.path, from_scratch=True).held("it to end, or cancel it"):
                    take_away(record.path, output_dir, trash)
            if chosen.whole:
                take_away(chosen.sweep, output_dir, trash)
            elif any(sweep.points.pop(record.key, None) is not None for record in chosen.records):
                sweep.write()
        _empty(everything)


def clear_up(output_dir: Path) -> None:
    """Remove what one that was cut off had moved away."""
    everything = output_dir / TRASH
    if everything.is_dir():
        with FileLock(f"{everything}.lock"):
            _empty(everything)


def _empty(folder: Path) -> None:
    """Raises `UserError` where files can't be removed."""
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"removed, but for files that are left in {folder} ({error}): remove that folder once "
            "nothing uses them"
        ) from error
