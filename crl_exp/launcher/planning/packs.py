"""Which runs share a job (`hydra.launcher.pack`), and what there is to say of it beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol, TypeVar

from crl_exp.config.errors import UserError
from crl_exp.config.keys import content_key
from crl_exp.config.sections import Known
from crl_exp.experiments import config as configs
from crl_exp.experiments.packing import section_keys
from crl_exp.launcher.settings import LocalSettings, SlurmSettings
from crl_exp.runs.directory import RunDirectory

# Of the runs that are alone in their job, so many are named.
NAMED = 3
LAUNCHER = "launcher settings"


class Startable(Protocol):
    """A run that is to be started, and how."""

    @property
    def run(self) -> RunDirectory: ...

    @property
    def settings(self) -> SlurmSettings | LocalSettings: ...


T = TypeVar("T", bound=Startable)


def packs_of(starts: Sequence[T]) -> list[list[T]]:
    """The runs of each job: at most `pack` of those that can share one, all in the given order."""
    groups: dict[str, list[T]] = {}
    for start in starts:
        key = start.run.key if start.settings.pack == 1 else content_key(_common(start))
        groups.setdefault(key, []).append(start)
    packs = []
    for group in groups.values():
        size = group[0].settings.pack
        packs += [group[at : at + size] for at in range(0, len(group), size)]
    place = {start.run.key: n for n, start in enumerate(starts)}
    return sorted(packs, key=lambda pack: place[pack[0].run.key])


def _common(start: Startable) -> dict[str, str]:
    """What runs of one job have in common, each as a key."""
    return {**section_keys(start.run.config), LAUNCHER: content_key(asdict(start.settings))}


def pack_lines(packs: Sequence[Sequence[Startable]]) -> list[str]:
    """The plan of the jobs: how many runs they hold, which are alone, and why."""
    asked = [pack for pack in packs if pack[0].settings.pack > 1]
    if not asked:
        return []
    n, most = sum(map(len, asked)), max(map(len, asked))
    jobs = "1 job" if len(asked) == 1 else f"{len(asked)} jobs"
    lines = [f"  packed: {n} runs in {jobs}, {most} at most in one"]
    common = [_common(pack[0]) for pack in asked]
    if apart := _different(common):
        groups = len({content_key(one) for one in common})
        lines.append(f"  of {groups} kinds that can't share a job: they differ in {apart}")
    alone = [(pack[0], one) for pack, one in zip(asked, common, strict=True) if len(pack) == 1]
    lines += [f"  alone: {start} ({_why_alone(one, common)})" for start, one in alone[:NAMED]]
    lines += [f"  alone: {len(alone) - NAMED} more"] if len(alone) > NAMED else []
    return lines + _too_small(asked)


def _different(common: Sequence[dict[str, str]]) -> str:
    return ", ".join(name for name in common[0] if len({one[name] for one in common}) > 1)


def _why_alone(own: dict[str, str], common: Sequence[dict[str, str]]) -> str:
    if sum(one == own for one in common) > 1:
        return "the others of its kind fill their jobs"
    others = [one for one in common if one != own]
    if not others:
        return "there is no other run to start"
    # By what it differs from those that are most like it.
    nearest = min(([k for k in own if one[k] != own[k]] for one in others), key=len)
    return f"no other run to start has its {', '.join(nearest)}"


def _too_small(packs: Sequence[Sequence[Startable]]) -> list[str]:
    """A warning where a pack's rollouts don't go through the model together."""
    known, worst = Known(), (0, 0, 0)  # rows of the pack, of the engine, rollouts
    for pack in packs:
        size = pack[0].run.config.engine.batch_size
        rows = [n for start in pack if (n := _rollout_rows(start, known))]
        if isinstance(size, int) and len(rows) > 1 and sum(rows) > size:
            worst = max(worst, (sum(rows), size, len(rows)))
    total, size, n = worst
    if not total:
        return []
    return [
        f"  warning: engine.batch_size={size} counts the rows of all runs of a job, and {n} "
        f"rollouts together have {total}: they are played in {-(-total // size)} parts, which "
        f"takes longer. Set engine.batch_size={total} or engine.batch_size=auto"
    ]


def _rollout_rows(start: Startable, known: Known) -> int:
    """Answers that the run asks for at each update of its policy; 0 where it trains none."""
    try:
        exp = configs.experiment(start.run.config, known)
    except UserError:
        return 0  # retried, but frozen by another version: its job says what is wrong with it
    if not (exp.experiment.steers and exp.method.trains_policy):
        return 0
    return len(exp.algorithm.answered(list(range(exp.algorithm.prompts_per_update))))
