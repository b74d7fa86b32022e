"""What a sweep would do: every point composed and checked, what is done already left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.errors import UserError
from crl_exp.config.keys import key_of, plain_of, row_key, settle
from crl_exp.config.machine.garbage import fewer_collections
from crl_exp.config.sections import once
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Known
from crl_exp.experiments.inputs import inputs_of
from crl_exp.experiments.schema import Schema
from crl_exp.launcher.planning.compose import Composer
from crl_exp.launcher.planning.memory import with_gpus, with_memory
from crl_exp.launcher.planning.written import check_written
from crl_exp.launcher.settings import LocalSettings, Settings, SlurmSettings, changed
from crl_exp.runs.directory import NOT_IN_KEY, RunDirectory, content_key
from crl_exp.runs.inputs import Inputs
from crl_exp.runs.inputs import changed as changed_inputs
from crl_exp.steering.policy.config import COMBINE
from crl_exp.steering.stages.base import STAGES
from crl_exp.steering.stages.effects import Effect, Setting, cautions, effect

# Of the points that a fault is in, so many are named.
NAMED = 3
# Of a sweep with more points than this, so many are looked at before all are composed, which takes
# a while: a fault that all of them share is told at once.
SAMPLE = 64
READING = ("experiment", "task", "sae", "layers", "model", "method")
"""Sections that say which files a run reads."""
HERE = LocalSettings(
    gpus=0, pack=1, setup=[], python=None, wait=False, extend=False, assumed_change=0.2,
    assumed_seed_deviation=0.01, parallel=1,
)  # fmt: skip
"""Of runs that this process runs itself, one after another."""


@dataclass(eq=False)
class Point:
    """One run of a sweep. settings: those of the launcher, for this run.

    found: in words, what of its config was found in files. uses_seed: whether another seed may give
    another result; known once it was checked. plain: its config as plain values, resolved, which
    nobody changes.
    """

    overrides: tuple[str, ...]
    config: DictConfig
    run: RunDirectory
    settings: Settings
    found: str = ""
    uses_seed: bool = True
    plain: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.plain = self.plain or plain_of(self.config)

    @property
    def key(self) -> str:
        return self.run.key

    def __str__(self) -> str:
        return " ".join(self.overrides)


class Told:
    """What is said of many points, each thing once with the points that it is said of."""

    def __init__(self) -> None:
        self.points: dict[str, list[str]] = {}

    def say(self, line: str, point: str) -> None:
        self.points.setdefault(line, []).append(point)

    def lines(self) -> list[str]:
        told = []
        for line, points in self.points.items():
            named = "; ".join(point or "(no override)" for point in points[:NAMED])
            more = f"; and {len(points) - NAMED} more" if len(points) > NAMED else ""
            told += [f"- {line}", f"    in {named}{more}"]
        return told


class Faults(Told):
    """Faults of many points.

    n_points: that were looked at. of: of how many, where that isn't all.
    """

    def __init__(self, n_points: int, of: int | None = None):
        super().__init__()
        self.n_points, self.of = n_points, of

    def add(self, error: Exception, point: str) -> None:
        lines = [str(error).strip()]
        if isinstance(error, UserError):
            lines = lines[0].splitlines()
        elif isinstance(error.__cause__, (HydraException, OmegaConfBaseException)):
            lines.append(str(error.__cause__).strip().splitlines()[0])
            lines = ["\n  ".join(lines)]
        for line in lines:
            self.say(line, point)

    def raise_any(self) -> None:
        """Raise `UserError` with all of them."""
        if not self.points:
            return
        bad = {point for points in self.points.values() for point in points}
        n = (
            f"{self.n_points} runs"
            if self.of is None
            else (f"{self.n_points} runs looked at, of {self.of} in all,")
        )
        told = [f"{len(bad)} of {n} can't be submitted; none was:"]
        raise UserError("\n".join(told + self.lines()))


@fewer_collections()
def compose_points(
    loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]], settings: Settings
) -> list[Point]:
    """The point of every job, with its config and run directory.

    Raises `UserError` with every fault of the overrides and of the launcher's settings; of a large
    sweep, with those of its points that are found in a sample of it.
    """
    composer = Composer(loader, master)
    looked_at: dict[tuple[str, ...], Point] = {}
    if len(jobs) > SAMPLE:
        some = [jobs[n * len(jobs) // SAMPLE] for n in range(SAMPLE)]
        here = not isinstance(settings, SlurmSettings)
        sample = _compose(composer, some, settings, len(jobs))
        check_written(master.hydra, [point.plain for point in sample], some)
        check([point for point in sample if is_open(point)], of=len(jobs), here=here)
        looked_at = {point.overrides: point for point in sample}
    points = _compose(composer, jobs, settings, None, looked_at)
    check_written(master.hydra, [point.plain for point in points], jobs)
    look_at_inputs(points)
    if len(folders := {str(point.run.path.parent) for point in points}) > 1:
        raise UserError(
            f"sweep_name and output_dir must be the same for all runs of a sweep, not {folders}"
        )
    return points


def _compose(
    composer: Composer, jobs: Sequence[Sequence[str]], settings: Settings, of: int | None,
    made: dict[tuple[str, ...], Point] | None = None,
) -> list[Point]:  # fmt: skip
    """of: see `Faults`. made: points that were composed already, by their overrides."""
    faults = Faults(len(jobs), of)
    points: dict[str, Point] = {}
    all_points: list[Point] = []
    for job in jobs:
        try:
            point = made.pop(tuple(job), None) if made else None
            point = point or _point(composer, job, settings)
            if differing := _only_outside(points.setdefault(point.key, point), point):
                raise UserError(
                    f"{', '.join(differing)} can't differ within a sweep: it doesn't change what a "
                    "run computes, so these are one run"
                )
            all_points.append(point)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            faults.add(error, " ".join(job))
    faults.raise_any()
    return all_points


def _point(composer: Composer, job: Sequence[str], settings: Settings) -> Point:
    config, resources = composer.config(job)
    found = settled_text(settle(config))
    plain = plain_of(config)
    run = RunDirectory(config, key_of(plain))
    run.path = run.path.absolute()
    own = changed(settings, resources) if resources else settings
    own = with_memory(with_gpus(own, config), config)
    return Point(tuple(job), config, run, own, found, plain=plain)


def settled_text(found: dict[str, Any]) -> str:
    """In words, what of a config was found in files (`settle`); "" where nothing was."""
    said = " ".join(
        f"task.{key}.digest={value['digest']}" if isinstance(value, dict) else f"task.{key}={value}"
        for key, value in found.items()
    )
    return f"found in the task's files: {said}" if said else ""


def look_at_inputs(points: Sequence[Point]) -> None:
    """Note in each run what lies in the files that it reads.

    Raises `UserError` with every run that was begun, or is finished, with something else.
    """
    known, faults = Known(), Faults(len(points))

    def look(point: Point) -> tuple[configs.Experiment, Inputs] | None:
        try:
            exp = configs.experiment(point.config, known, point.plain)
            return exp, inputs_of(exp, configs.validate(exp, known))
        except (UserError, OmegaConfBaseException):
            return None  # told by `check`, or by the job of one that was frozen by another version

    for point in points:
        parts = {name: point.plain[name] for name in READING if name in point.plain}
        found = once(known, ["inputs", parts], lambda of=point: look(of))
        if found is None:
            continue
        exp, inputs = found
        point.run.inputs = inputs
        if point.config.resume != "force" and point.run.path.exists():
            drawn = partial(once, known, ["items", parts["task"]], lambda e=exp: e.task.drawn())
            if fault := changed_inputs(point.run.path, inputs, drawn):
                faults.add(UserError(fault), str(point))
    faults.raise_any()


def _only_outside(one: Point, other: Point) -> list[str]:
    """Sections that are not in the run key and that differ between two points of one key."""
    if one is other:
        return []
    outside = [name for name in NOT_IN_KEY if name in one.config and name in other.config]
    return [name for name in outside if one.config[name] != other.config[name]]


def is_open(point: Point) -> bool:
    """Whether a run has no result, or is to get a new one."""
    return point.config.resume == "force" or not point.run.result_path.exists()


def check_all(
    loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]
) -> list[Point]:
    """Compose the points of a sweep that this process runs, and check those that it will run.

    Raises `UserError` with every fault of every point.
    """
    points = compose_points(loader, master, jobs, HERE)
    if cautions := check([point for point in points if is_open(point)], here=True):
        print(cautions_text(cautions))
    return points


@fewer_collections()
def check(
    points: Sequence[Point],
    known: Known | None = None,
    of: int | None = None,
    here: bool = False,
) -> list[str]:
    """Build and validate every point, and draw data that lies on this machine.

    Returns lines on what is no fault but does nothing (`effects.cautions`), and on points that do
    the same. Raises `UserError` with every fault of every point.
    known: what was found out; at its end how many things had to be. of: see `Faults`.
    here: they are run on this machine, so that what it lacks is a fault.
    """
    known = {} if known is None else known
    faults, told = Faults(len(points), of), Told()
    alike: dict[str, list[tuple[Setting, Point]]] = {}
    both_ways = _combined_both_ways(points)
    for point in points:
        try:
            exp = configs.experiment(point.config, known, point.plain)
            configs.validate(exp, known)
            point.uses_seed = exp.uses_seed
            if here and (found := exp.model.machine_faults()):
                raise UserError("\n".join(found))
            if exp.task.is_local:  # that of the hub is loaded by the run
                once(known, ["data", asdict(exp.task)], exp.task.drawn)
            for one in unread(exp, point.overrides):
                told.say(one, str(point))
            if not exp.experiment.steers:
                continue
            setting = Setting.of(exp)
            compared = (COMBINE,) if point.key in both_ways else ()
            read = (exp.decay, exp.policy, exp.warmup, exp.algorithm.uses_critic, compared)
            read = (*read, exp.sae.dictionary, exp.method)
            key = ["cautions", setting.key, repr(read)]
            for caution in once(known, key, lambda e=exp, c=compared: cautions(e, compared=c)):
                told.say(caution, str(point))
            if exp.method.has_policy:
                alike.setdefault(_beside_stages(point.plain), []).append((setting, point))
        except (UserError, OmegaConfBaseException) as error:
            faults.add(error, str(point))
    faults.raise_any()
    for group in alike.values():
        _tell_same(group, told)
    for row in _but_for_seed([point for point in points if not point.uses_seed]).values():
        for point in row[1:]:
            method = point.config.method.name
            told.say(f"method={method} has no chance in it: one seed is enough", str(point))
    return told.lines()


def _but_for_seed(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by all of their config but the seed."""
    rows: dict[str, list[Point]] = {}
    for point in points:
        rows.setdefault(row_key(point.plain), []).append(point)
    return rows


def unread(exp: configs.Experiment, overrides: Sequence[str]) -> list[str]:
    """A line for each override of a section that the kind of experiment doesn't read."""
    found = []
    for one in overrides:
        key = one.lstrip("+~").partition("=")[0]
        section = key.partition(".")[0].partition("@")[0]
        if section in Schema.__annotations__ and not exp.reads(section):
            found.append(
                f"{one} changes nothing: experiment={exp.experiment.name} doesn't read {section}"
            )
    return found


def cautions_text(cautions: Sequence[str]) -> str:
    return "\n".join(["no fault, but worth knowing:", *cautions])


def _combined_both_ways(points: Sequence[Point]) -> set[str]:
    """Run keys of those with several features at once that the sweep has under each
    `policy.combine`: a larger dose is then what is asked about, and isn't overlooked."""
    found: dict[str, list[Point]] = {}
    for point in points:
        policy = point.plain.get("policy") or {}
        if policy.get("k") in (None, 1):
            continue
        beside = {k: v for k, v in policy.items() if k != "combine"}
        key = content_key({**point.plain, "policy": beside, "resume": None})
        found.setdefault(key, []).append(point)
    return {point.key for group in found.values() if len(group) > 1 for point in group}


def _beside_stages(plain: dict[str, Any]) -> str:
    """All of a config but the stages and their order."""
    beside = (*STAGES, "order", "resume")
    return content_key({k: v for k, v in plain.items() if k not in beside})


def _tell_same(group: Sequence[tuple[Setting, Point]], told: Told) -> None:
    """Say which points, equal but for their stages, have the same effect."""
    if len(group) < 2:
        return
    found: list[tuple[Effect, Point]] = []
    for setting, point in group:
        made = effect(setting)
        first = next((other for one, other in found if one == made), None)
        if first is not None:
            told.say(f"the same acts as {first}", str(point))
        elif made is not None:
            found.append((made, point))


def folder_of(points: Sequence[Point]) -> Path:
    """The sweep's folder."""
    return points[0].run.path.parent
