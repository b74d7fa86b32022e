"""One run of wandb's, from its beginning to its end: the one module that calls wandb.

wandb records nothing here by itself: no console, code, git state or load of the machine (the run
directory has these), it reports no errors of its own, and offline nothing leaves the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_exp.runs.records import Record
from crl_exp.tracking.sending.content import Point
from crl_exp.tracking.sending.samples import samples
from crl_exp.tracking.to_wandb.rows import (
    LAYER,
    READING,
    UPDATE,
    Seen,
    axis_of,
    described,
    final,
    rows,
)
from crl_exp.tracking.to_wandb.target import WandbTarget, require

if TYPE_CHECKING:
    import wandb

# Read by wandb when it is imported; what the user has set goes before it.
ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
SAMPLES = "samples"


def import_wandb() -> None:
    """Raises `UserError` where wandb isn't installed."""
    require()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import wandb  # noqa: F401


def outside_faults() -> tuple[type[Exception], ...]:
    """What wandb raises when something is amiss out there, or in its settings."""
    from wandb.errors import Error

    # Timeouts and broken pipes are OSErrors, a setting that wandb refuses is a ValueError.
    return (Error, OSError, ValueError)


def why_no_login() -> str | None:
    """What a person is told where wandb has no login here; None: it has. Never asks for one."""
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return None
    except outside_faults() as error:
        return str(error).strip()
    return "wandb has no login here"


class Session:
    """A wandb run of a run directory, in the directory's folder `wandb`.

    run_id: wandb's; another run of that id is replaced by this one when it comes to the server.
    mode: as it turned out. Raises one of `outside_faults`.
    """

    def __init__(
        self, record: Record, place: WandbTarget, run_id: str, mode: str, finish_seconds: float
    ):
        self._seen = Seen()
        self._defined: set[str] = set()
        self._run = _begun(record, place, run_id, mode, finish_seconds)
        for axis in (UPDATE, LAYER, READING):
            self._run.define_metric(axis, hidden=True, summary=_summary(axis))

    @property
    def folder(self) -> Path:
        """What `wandb sync` takes."""
        return Path(self._run.dir).parent

    def log(self, found: Iterable[Point]) -> None:
        """Points that weren't logged yet."""
        for row in rows(self._seen.new(found)):
            for name in row.values:
                self._define(name)
            self._run.log(row.logged)

    def _define(self, name: str) -> None:
        """Named one by one: of several patterns that fit, wandb takes any."""
        if name in self._defined:
            return
        self._defined.add(name)
        axis = axis_of(name)
        self._run.define_metric(_escaped(name), step_metric=axis, summary=_summary(axis))

    def finish(self, record: Record) -> None:
        """Log what a run has at its end, and end wandb's. record: read since the run ended."""
        import wandb

        figures, series = final(record)
        self.log(series)
        table = samples(record) if record.result is not None else None
        if table is not None:
            shown = wandb.Table(table["columns"], table["data"], allow_mixed_types=True)
            self._run.log({SAMPLES: shown})
        summary: dict[str, Any] = {**figures, "state": record.state}
        if error := record.status.get("error"):
            summary["error"] = str(error)[:1000]
        self._run.summary.update(summary)
        self._run.finish(exit_code=0 if record.state == "done" else 1)


def _summary(axis: str) -> str | None:
    """Of metrics on an axis, what wandb's list of runs has: None: the last. The last layer's figure
    would pass for the run's."""
    return None if axis == UPDATE else "none"


def _escaped(name: str) -> str:
    """wandb takes a dot for a key inside a value."""
    return name.replace(".", "\\.")


def _begun(
    record: Record, place: WandbTarget, run_id: str, mode: str, finish_seconds: float
) -> wandb.Run:
    import wandb

    told = described(record)
    settings = wandb.Settings(
        console="off", silent=True, save_code=False, disable_code=True, disable_git=True,
        disable_job_creation=True, label_disable=True, symlink=False, use_dot_wandb=False,
        x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
        x_save_requirements=False, finish_timeout=finish_seconds, finish_timeout_raises=True,
        # wandb's pages stop a run by interrupting its program; `cancel` is how ours are.
        stop_fn=_not_stopped, resume=None, resume_from=None, fork_from=None, run_notes=None,
    )  # fmt: skip
    return wandb.init(
        entity=place.entity, project=place.project, dir=str(record.path), id=run_id,
        name=told.name, group=told.group, job_type=told.job_type, tags=told.tags,
        config=told.config, mode=mode, reinit="create_new", settings=settings,  # type: ignore[arg-type]
    )  # fmt: skip


def _not_stopped() -> None:
    """wandb's pages end no run of ours."""
