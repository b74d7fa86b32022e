"""Where a run is sent: a project of wandb's. Imports nothing of wandb."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.tracking.config import wandb_missing

OURS = "wandb"
"""The folder that wandb makes in a run directory: there lies what is uploaded."""


@dataclass(frozen=True)
class WandbTarget:
    """A project. entity: a user or team; None: as wandb's own login says. mode: `offline` or
    `online`."""

    project: str
    entity: str | None
    mode: str

    @property
    def resolved(self) -> str:
        name = self.project if self.entity is None else f"{self.entity}/{self.project}"
        return f"wandb, {name}, {self.mode}"

    def refused(self, folder: Path, why: str) -> str:
        """What a person is told."""
        return (
            f"wandb did not take {folder} ({self.resolved}): {why}. Nothing is lost: the run "
            f"directory has everything. Once wandb is right, `python -m crl_exp sync {folder}` "
            "catches up (tracking.mode=offline needs no network)"
        )


def wandb_target(section: Mapping[str, Any]) -> WandbTarget | None:
    """Where a config's section `tracking` says that runs are sent; None: not to wandb."""
    if not section.get("enabled") or section.get("target") != "wandb":
        return None
    return WandbTarget(section["project"], section["entity"], section["mode"])


def require() -> None:
    """Raise `UserError` where wandb isn't installed."""
    if fault := wandb_missing():
        raise UserError(fault)


def sync_line(sweeps: Iterable[Path]) -> str:
    """The command that uploads what was written offline in these sweeps' folders."""
    return " ".join(["wandb sync", *(f"{shlex.quote(str(one))}/*/{OURS}" for one in sweeps)])
