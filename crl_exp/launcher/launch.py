"""A sweep from its overrides to its jobs; launched again, it does only what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.jobs.states import is_started, states_of
from crl_exp.launcher.jobs.submit import Start, abandon_unreleased, submit
from crl_exp.launcher.planning.estimate import estimate
from crl_exp.launcher.planning.memory import gpu_lines, memory_lines
from crl_exp.launcher.planning.packs import pack_lines, packs_of
from crl_exp.launcher.planning.plan import (
    Point,
    cautions_text,
    check,
    compose_points,
    folder_of,
)
from crl_exp.launcher.planning.shows import shows_text
from crl_exp.launcher.settings import AUTO, LocalSettings, Settings, SlurmSettings
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.runs.directory import SWEEP_CONFIG, write_atomic
from crl_exp.runs.records import Record
from crl_exp.tracking.sync import announce


@dataclass(frozen=True)
class Launch:
    """What a launch did. points: of all jobs, in order. started: their keys."""

    points: list[Point]
    started: set[str]

    @property
    def folder(self) -> Path:
        return folder_of(self.points)


def launch(
    loader: ConfigLoader,
    master: DictConfig,
    jobs: Sequence[Sequence[str]],
    settings: Settings,
    grown: bool,
) -> Launch:
    """Compose and check all jobs, then submit those that are missing.

    grown: the sweeper draws its points as it goes, so that no point need be known already.
    Raises `UserError` with every fault of every job; nothing is then submitted.
    """
    if isinstance(settings, SlurmSettings):
        slurm_jobs.check_slurm()
    points = compose_points(loader, master, jobs, settings)
    unique = {point.key: point for point in points}
    folder = folder_of(points)
    if SweepFile.read(folder).unreleased:
        with locked(folder):  # another launch that is at it is waited for
            abandon_unreleased(SweepFile.read(folder))
    states = look(unique, SweepFile.read(folder))
    missing = [p for p in unique.values() if _is_started(p, states[p.key][0])]
    cautions = check(missing, here=isinstance(settings, LocalSettings))
    with locked(folder):
        sweep = SweepFile.read(folder)
        if not (settings.extend or grown):
            _refuse_another(sweep, unique, folder)
        abandon_unreleased(sweep)
        states = look(unique, sweep)
        starting = [p for p in missing if _is_started(p, states[p.key][0])]
        for point in unique.values():
            if states[point.key][0] == "done" and point not in starting:
                point.run.renumber()
        print(plan_text(list(unique.values()), starting, states, folder))
        print(*(f"  {line}\n" for line in gpu_lines(resources(starting))), sep="", end="")
        if getattr(settings, "mem", None) == AUTO:
            print(*(f"  {line}" for line in memory_lines(resources(starting))), sep="\n")
        if cautions:
            print(cautions_text(cautions))
        write_atomic(folder / SWEEP_CONFIG, OmegaConf.to_yaml(master))
        sweep.points |= {key: list(point.overrides) for key, point in unique.items()}
        if starting:
            submission = submit([Start(p.run, p.settings) for p in starting], sweep)
            print(submitted_text(submission, folder))
        else:
            sweep.write()
    if starting:
        tracking = configs.experiment(starting[0].config).tracking
        announce([Record(point.run.path) for point in starting], tracking)
    return Launch(points, {point.key for point in starting})


def resources(points: Sequence[Point]) -> list[tuple[DictConfig, Settings]]:
    return [(point.config, point.settings) for point in points]


def look(points: dict[str, Point], sweep: SweepFile) -> dict[str, tuple[str, str]]:
    """States of the runs now. Of one that is begun anew a damaged status.json is no fault."""
    records = {key: Record(point.run.path) for key, point in points.items()}
    states: dict[str, tuple[str, str]] = {}
    for key, point in points.items():
        if point.config.resume == "force" and _is_damaged(records[key]):
            states[key] = ("missing", "its status.json is damaged")
    return states | states_of([r for key, r in records.items() if key not in states], sweep)


def _is_damaged(record: Record) -> bool:
    try:
        _ = record.status
    except UserError:
        return True
    return False


def _is_started(point: Point, state: str) -> bool:
    return is_started(state, Record(point.run.path), point.config.resume)


def _refuse_another(sweep: SweepFile, points: dict[str, Point], folder: Path) -> None:
    """Raise `UserError` where the folder holds runs, but none of this sweep's."""
    there = set(sweep.points) | {path.parent.name for path in folder.glob("*/config.yaml")}
    if not there or there & set(points):
        return
    known = next((text for key in sorted(there) if (text := sweep.overrides(key))), "")
    shown = f" (one of them: {known})" if known else ""
    raise UserError(
        f"sweep_name={folder.name}: {folder} holds {len(there)} runs of another sweep{shown}, none "
        f"of which is among the {len(points)} of this one, and a report would mix them. Give this "
        "one a name of its own by sweep_name=…, or add it to them by hydra.launcher.extend=true"
    )


def plan_text(
    points: list[Point], starting: list[Point], states: dict[str, tuple[str, str]], folder: Path
) -> str:
    """What is done and what is left out, with what it will cost."""
    keys = {point.key for point in starting}
    left = Counter(states[point.key][0] for point in points if point.key not in keys)
    again = Counter(states[key][0] for key in keys) - Counter(missing=len(keys))
    lines = [f"sweep {folder.name}: {len(points)} runs, {len(starting)} to start"]
    lines += [f"  left alone: {n} {state}" for state, n in sorted(left.items())]
    lines += [f"  again: {n} {state}" for state, n in sorted(again.items())]
    if starting:
        packs = packs_of(starting)
        lines += pack_lines(packs)
        gpus = sum(pack[0].settings.gpus_asked for pack in packs)
        lines.append(f"  GPUs, if all ran at once: {gpus}")
        lines.append(f"  estimate: {estimate(packs, folder.parent)}")
    lines += [f"  {line}" for line in shows_text(points)]
    return "\n".join(lines)


def submitted_text(submission: dict, folder: Path) -> str:
    """Where the runs are now and how to follow them."""
    lines = []
    for part in submission["parts"]:
        n, n_jobs = len(part["runs"]), len(part["packs"])
        runs = f"{n} runs" if n == n_jobs else f"{n} runs in {n_jobs} jobs"
        if part["job"]:
            lines.append(f"  {runs} are queued as SLURM job {part['job']}_[0-{n_jobs - 1}]")
        else:
            lines.append(f"  {runs} are shared by {len(part['workers'])} processes in turn")
    name = folder.name if folder.parent == Path("outputs").absolute() else folder
    lines.append("to type next:")
    for command in ("status", "retry", "cancel", "report"):
        lines.append(f"  python -m crl_exp {command} {name}")
    return "\n".join(lines)
