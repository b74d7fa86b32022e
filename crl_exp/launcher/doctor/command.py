"""`python -m crl_exp doctor [OVERRIDE …]`: what of this machine fits, and what to do."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.display import plain
from crl_exp.config.errors import UserError
from crl_exp.launcher.command_line import explain, people_errors
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.doctor import cluster, machine, storage
from crl_exp.launcher.doctor.finding import (
    FAILED,
    SKIPPED,
    WARNING,
    Check,
    Finding,
    Subject,
    failed,
)
from crl_exp.launcher.planning.compose import Composer
from crl_exp.launcher.settings import KINDS, Settings, make_settings

CHECKS: dict[str, Check] = {
    "Python": machine.python,
    "torch": machine.torch_and_driver,
    "GPU memory": machine.gpu_memory,
    "extras": machine.extras,
    "SLURM": cluster.slurm,
    "output_dir": storage.output_dir,
    "program": storage.code,
    "files": storage.files,
    "hub": storage.hub,
    "MLflow": storage.mlflow,
    "wandb": storage.wandb,
}
"""Each by what it looks at, in the order in which they are told."""
MOST = 200
"""Points of a sweep that are composed: more differ in seeds and the like."""


def main(argv: list[str]) -> int:
    """Returns 1 where something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp doctor",
        description="Look at this machine, its cluster, folders and servers for what a run or a "
        "sweep needs. Nothing is downloaded, submitted or changed.",
        usage="python -m crl_exp doctor [OVERRIDE …]    as after `python launch.py -m`",
    )
    parser.add_argument("overrides", nargs="*")
    with people_errors():
        subject = composed(parser.parse_args(argv).overrides)
    counts = Counter[str]()
    for name, check in CHECKS.items():
        for finding in look(check, subject):
            counts[finding.state] += 1
            print(line(name, finding), flush=True)
    said = (f"{counts[state]} {state}" for state in ("ok", WARNING, FAILED, SKIPPED))
    print(", ".join(said))
    return 1 if counts[FAILED] else 0


def composed(overrides: Sequence[str]) -> Subject:
    """What these overrides would launch. Raises what Hydra raises, and `UserError`."""
    with typed_sweep(overrides) as (loader, master, jobs):
        composer, step = Composer(loader, master), -(-len(jobs) // MOST) or 1
        configs = [composer.config(job)[0] for job in jobs[::step]]
        return Subject(configs, _settings(master))


def _settings(master: DictConfig) -> Settings | None:
    """The launcher's; None where it is Hydra's own."""
    section = OmegaConf.to_container(master.hydra.launcher, resolve=True)
    assert isinstance(section, dict)
    target = str(section.pop("_target_", "")).rpartition(".")[2]
    names = {f"{kind.title().replace('_', '')}Launcher": kind for kind in KINDS}
    values = {str(key): value for key, value in section.items()}
    return make_settings(names[target], values) if target in names else None


def look(check: Check, subject: Subject) -> Iterator[Finding]:
    """What a check finds; what it can't bear is a failure that says so."""
    try:
        yield from check(subject)
    except (UserError, OmegaConfBaseException) as error:
        yield failed(explain(error).splitlines()[0], "")


def line(name: str, finding: Finding) -> str:
    told = f"{finding.state:8} {name:11} {finding.told}"
    advice = f"\n{'':21}→ {finding.advice}" if finding.advice else ""
    return plain(told + advice)
