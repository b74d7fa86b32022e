"""What a launcher is told: `conf/hydra/launcher/`. Values are there; types and checks are here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.errors import UserError, did_you_mean

# Written into the batch script by the launcher itself.
OURS = ("array", "output", "error", "hold", "requeue", "signal", "open-mode", "chdir", "job-name")
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
AUTO = "auto"
MEMORY = re.compile(r"\d+(\.\d+)?[KMGT]?B?", re.IGNORECASE)


@dataclass
class LaunchSettings:
    """What both launchers are told.

    gpus: of each job; null: one where model.device is a CUDA device, else none; with
        model.device_map as many as it names, or as the model needs (`planning.memory`).
    gpu_gib: memory of one GPU of the jobs' nodes, GiB: what that need is held against.
    pack: runs that one job holds at most; it runs them together (`experiments.packing`). Only runs
        of the same model, SAEs, task, engine and launcher settings share one.
    setup: shell lines that are run before Python, such as `module load cuda`.
    python: the interpreter of the jobs, as a shell command; null: the one that launches.
    wait: stay until all runs have ended, with a live table, and hand their results to the sweeper.
    extend: allow a sweep into a folder that holds runs of which this sweep has none.
    assumed_change, assumed_seed_deviation: what the plan takes for granted when it says what a
        sweep can show (`analysis.power`): the share of the test items that come right or go wrong,
        and the standard deviation of the seeds' differences, as a share.
    """

    gpus: int | None
    pack: int
    setup: list[str]
    python: str | None
    wait: bool
    extend: bool
    assumed_change: float
    assumed_seed_deviation: float
    gpu_gib: float | None = field(default=None, kw_only=True)

    def faults(self) -> list[str]:
        found = []
        if self.gpus is not None and self.gpus < 0:
            found.append(f"hydra.launcher.gpus={self.gpus}: must be 0 or more, or null")
        if self.gpu_gib is not None and not self.gpu_gib > 0:
            found.append(f"hydra.launcher.gpu_gib={self.gpu_gib}: must be above 0, or null")
        if self.pack < 1:
            found.append(f"hydra.launcher.pack={self.pack}: must be at least 1, one run a job")
        if not 0 < self.assumed_change <= 1:
            found.append(
                f"hydra.launcher.assumed_change={self.assumed_change}: must be a share of "
                "the items above 0, up to 1"
            )
        if not 0 <= self.assumed_seed_deviation <= 1:
            found.append(
                f"hydra.launcher.assumed_seed_deviation={self.assumed_seed_deviation}: must be a "
                "share, 0.01 for one point"
            )
        return found

    def for_device(self, device: str) -> Any:
        """These settings with the number of GPUs made plain."""
        return self if self.gpus is not None else replace(self, gpus=int(device[:4] == "cuda"))


MINUTES_MEANT = 1440
"""Of a time limit typed as a bare number: more may be seconds."""


@dataclass
class SlurmSettings(LaunchSettings):
    """`hydra/launcher=slurm`: each job is a task of a job array. null: the cluster's own default.

    partition, account, qos, constraint: as sbatch has them.
    gres: instead of `gpus`, e.g. gpu:a100:1.
    cpus: of each job. mem: of each job, e.g. 16GB; auto: an estimate from the model and the SAEs
        (`planning.memory`), told in the plan. time: limit of each start, in minutes or as
        [DAYS-]HH:MM:SS; a job that reaches it is queued again and goes on from its checkpoints.
    signal_seconds: the job is told to save so long before the limit.
    requeue: after the loss of a node or a preemption SLURM starts the job again.
    array_parallelism: jobs of one array at a time.
    max_array_size: longest array; null: what `scontrol show config` says.
    sbatch: more of sbatch's options by their long names, {reservation: mine, exclusive: true}.
    """

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    cpus: int
    mem: str | None
    time: str
    signal_seconds: int
    requeue: bool
    array_parallelism: int
    max_array_size: int | None
    sbatch: dict[str, Any]

    def faults(self) -> list[str]:
        found = super().faults()
        at_least_1 = ("cpus", "signal_seconds", "array_parallelism", "max_array_size")
        found += [
            f"hydra.launcher.{name}={getattr(self, name)}: must be at least 1"
            for name in at_least_1
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not TIME.fullmatch(self.time):
            found.append(
                f"hydra.launcher.time={self.time}: must be minutes or [DAYS-]HH:MM:SS, "
                "such as hydra.launcher.time=08:00:00"
            )
        elif self.time.isdecimal() and int(self.time) > MINUTES_MEANT:
            days, minutes = divmod(int(self.time), 1440)
            found.append(
                f"hydra.launcher.time={self.time}: a bare number is minutes, which makes "
                f"{days} days (YAML also reads 4:00:00 as 14400): write it as DAYS-HH:MM:SS, "
                f"such as hydra.launcher.time={days}-{minutes // 60:02}:{minutes % 60:02}:00"
            )
        elif (seconds := seconds_of(self.time)) <= self.signal_seconds:
            found.append(
                f"hydra.launcher.time={self.time}: is {seconds} s (SLURM takes 0 for no limit); it "
                f"must be more than hydra.launcher.signal_seconds={self.signal_seconds}, or each "
                "start would be asked to end before it has begun"
            )
        if self.mem not in (None, AUTO) and not MEMORY.fullmatch(self.mem):
            found.append(f"hydra.launcher.mem={self.mem}: must look like 16GB or 500MB, or be auto")
        if self.gres is not None and self.gpus:
            found.append("hydra.launcher: give gpus=… or gres=…, not both")
        for name in self.sbatch:
            if name.replace("_", "-") in OURS:
                found.append(f"hydra.launcher.sbatch.{name}: the launcher sets it itself")
        return found

    def for_device(self, device: str) -> SlurmSettings:
        return self if self.gres is not None else super().for_device(device)

    @property
    def gpus_asked(self) -> int:
        """GPUs of one job, those of `gres` counted."""
        counted = re.findall(r"gpu(?::[^:,]+)??(?::(\d+))?(?=,|$)", self.gres or "")
        return (self.gpus or 0) + sum(int(n or 1) for n in counted)


@dataclass
class LocalSettings(LaunchSettings):
    """`hydra/launcher=local_processes`: this machine, some jobs at a time.

    parallel: jobs at a time.
    """

    parallel: int

    def faults(self) -> list[str]:
        found = super().faults()
        if self.parallel < 1:
            found.append(f"hydra.launcher.parallel={self.parallel}: must be at least 1")
        return found

    @property
    def gpus_asked(self) -> int:
        return self.gpus or 0


Settings = SlurmSettings | LocalSettings


def seconds_of(time: str) -> int:
    """A time limit as SLURM reads it: M, M:S, H:M:S, or D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return (hours * 60 + minutes) * 60 + seconds


KINDS: dict[str, type[SlurmSettings] | type[LocalSettings]] = {
    "slurm": SlurmSettings,
    "local_processes": LocalSettings,
}


def kind_of(settings: LaunchSettings) -> str:
    return next(name for name, cls in KINDS.items() if type(settings) is cls)


def make_settings(kind: str, values: dict[str, Any]) -> SlurmSettings | LocalSettings:
    """Settings from plain values or parts of a config. Raises `UserError` with every fault."""
    cls = KINDS[kind]
    known = [f.name for f in fields(cls)]
    faults = [
        f"hydra.launcher.{key}: {kind} has no such key{did_you_mean(key, known)}"
        for key in values
        if key not in known
    ]
    if faults:
        raise UserError("\n".join(faults))
    plain = {
        key: OmegaConf.to_container(value, resolve=True)
        if isinstance(value, (DictConfig, ListConfig)) else value
        for key, value in values.items()
    }  # fmt: skip
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))
    except OmegaConfBaseException as error:
        raise UserError(
            f"hydra.launcher.{error.full_key}: {str(error.msg).splitlines()[0]}"
        ) from error
    assert isinstance(made, cls)
    if faults := made.faults():
        raise UserError("\n".join(faults))
    return made


def changed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings with `KEY=VALUE` overrides, `hydra.launcher.` before the key or not.

    Raises `UserError` for what isn't one.
    """
    values = asdict(settings)
    texts = [f.name for f in fields(settings) if str(f.type).startswith("str")]
    for override in overrides:
        key, equals, text = override.removeprefix("hydra.launcher.").partition("=")
        if not equals:
            raise UserError(f"{override}: must be KEY=VALUE, such as mem=32GB")
        # As text where text is meant: YAML reads 12:00:00 as a number.
        value = text if key in texts and text != "null" else _as_yaml(text)
        if key.startswith("sbatch."):
            if not isinstance(value, (bool, type(None))) and str(value) != text:
                value = text
            values["sbatch"] = {**values["sbatch"], key.removeprefix("sbatch."): value}
        else:
            values[key] = value
    return make_settings(kind_of(settings), values)


def _as_yaml(text: str) -> Any:
    node = OmegaConf.create(f"value: {text}")
    assert isinstance(node, DictConfig)
    return node.value
