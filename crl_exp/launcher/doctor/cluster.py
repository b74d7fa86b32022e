"""SLURM as it is seen from here: its programs, its partitions, and what is asked of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from crl_exp.config.errors import did_you_mean
from crl_exp.launcher.doctor.finding import (
    Finding,
    Subject,
    asked,
    failed,
    ok,
    skipped,
    warning,
)
from crl_exp.launcher.settings import SlurmSettings, seconds_of

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
ELSEWHERE = "type it on a node of the cluster that submits jobs, or take local_processes"


@dataclass(frozen=True)
class Partition:
    """A line of sinfo. time: its limit, or infinite. gres: GPUs and the like of its nodes."""

    name: str
    default: bool
    up: bool
    time: str
    gres: str


def partitions() -> list[Partition] | str:
    """The cluster's partitions, or in words why they can't be told."""
    code, said = asked(["sinfo", "--noheader", "-o", "%P|%a|%l|%G"])
    if code != 0:
        return (said.strip().splitlines() or ["sinfo fails"])[-1]
    found: dict[str, Partition] = {}
    for line in said.splitlines():
        name, state, time, gres = (*line.split("|"), "", "", "", "")[:4]
        plain = name.rstrip("*")
        before = found[plain].gres + "," if plain in found else ""
        # One line for each kind of node.
        found[plain] = Partition(plain, name.endswith("*"), state == "up", time, before + gres)
    return list(found.values()) or "sinfo lists no partition"


def slurm(subject: Subject) -> Iterator[Finding]:
    """Whether SLURM answers, and has what is asked for."""
    settings = subject.slurm
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if settings is None and missing:
        yield skipped("hydra/launcher=slurm isn't chosen, and no SLURM is here")
        return
    if missing:
        yield failed(f"hydra/launcher=slurm: there is no {', '.join(missing)} here", ELSEWHERE)
        return
    known = partitions()
    if isinstance(known, str):
        told = f"SLURM doesn't answer: {known}"
        yield (
            skipped(f"{told}; hydra/launcher=slurm isn't chosen")
            if settings is None
            else failed(told, ELSEWHERE)
        )
        return
    _, version = asked(["sinfo", "--version"])
    names = ", ".join(one.name + ("*" if one.default else "") for one in known)
    yield ok(f"{version.strip()}, partitions {names}")
    if settings is not None:
        yield from asked_of(settings, known, subject.cuda)


def asked_of(settings: SlurmSettings, known: list[Partition], cuda: bool) -> Iterator[Finding]:
    """What the launcher would ask, against the partition that it would ask."""
    wanted = settings.partition
    names = [one.name for one in known]
    chosen = [one for one in known if one.name == wanted or (wanted is None and one.default)]
    if wanted is not None and "," in wanted:
        yield skipped(f"hydra.launcher.partition={wanted}: SLURM takes one of these")
        return
    if not chosen:
        if wanted is None:
            told = "no partition is the default"
            yield warning(told, f"set hydra.launcher.partition={names[0]} or another of them")
        else:
            near = did_you_mean(wanted, names)
            told = f"hydra.launcher.partition={wanted}: there is no such"
            yield failed(told, f"it is one of {', '.join(names)}{near}")
        return
    (one,) = chosen[:1]
    if not one.up:
        yield warning(f"partition {one.name} is down", "jobs wait until it is up again")
    if _seconds(one.time) is not None and seconds_of(settings.time) > (_seconds(one.time) or 0):
        yield failed(
            f"hydra.launcher.time={settings.time} is over the limit of {one.name}, {one.time}",
            f"set hydra.launcher.time={one.time}; a run that needs longer goes on in a new start",
        )
    gpus = settings.for_device("cuda" if cuda else "cpu").gpus_asked
    if gpus and "gpu" not in one.gres:
        yield failed(
            f"{gpus} GPUs are asked of each job, and {one.name} lists none ({one.gres})",
            "set hydra.launcher.partition=ONE_WITH_GPUS; where the site counts them otherwise, "
            "hydra.launcher.gpus=0 and hydra.launcher.sbatch",
        )
    elif one.up:
        yield ok(f"partition {one.name}: limit {one.time}, {one.gres}")


def _seconds(limit: str) -> int | None:
    """None: there is no limit, or it isn't told."""
    return seconds_of(limit) if limit[:1].isdigit() else None
