"""Runs that were removed here, to be removed in MLflow too: at once, or by the next sync.

What is to go is noted in the output folder before the directory goes, which has the ids. MLflow's
own way of deleting is used: such runs can be restored there until `mlflow gc`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json
from crl_exp.tracking.sending.client import (
    LOCK_SECONDS,
    PatientClient,
    connect,
    outside_faults,
    plain,
)
from crl_exp.tracking.sending.sent import LOCK, SENT, WANDB_LOCK
from crl_exp.tracking.sending.target import MlflowTarget

REMOVALS = ".mlflow_removals.json"
"""In the output folder; no sweep's name begins with a dot."""
ADVICE = "remove it, and delete in MLflow by hand what was removed here"


@contextmanager
def _removals(output_dir: Path) -> Iterator[list[dict[str, Any]]]:
    """What is still to be removed, to be changed by one process at a time; written at the end."""
    path = output_dir / REMOVALS
    lock = FileLock(f"{path}.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{output_dir}: another process tells MLflow of removals, for long; try again"
        ) from error
    try:
        found = read_json(path, ADVICE, list) or []
        try:
            yield found
        finally:
            if found:
                write_json(path, found)
            else:
                path.unlink(missing_ok=True)
    finally:
        lock.release()


def take_away(folder: Path, output_dir: Path, into: Path) -> None:
    """Move a run directory, or a sweep's folder, into another folder, noted for MLflow. Whoever
    sends from it is waited for, and finds nothing there afterwards."""
    locks = [FileLock(folder / name, timeout=LOCK_SECONDS) for name in (LOCK, WANDB_LOCK)]
    with locks[0], locks[1]:
        _note(folder, output_dir)
        os.rename(folder, into / folder.name)


def _note(folder: Path, output_dir: Path) -> None:
    sent = read_json(folder / SENT, ADVICE, list) or []
    wanted = ("uri", "experiment", "experiment_id", "run_id", "upload_id")
    noted = [{key: one.get(key) for key in wanted} for one in sent]
    noted = [one for one in noted if one["run_id"] or one["upload_id"]]
    if noted:
        with _removals(output_dir) as found:
            found.extend(one for one in noted if one not in found)


def is_due(output_dir: Path) -> bool:
    """Whether MLflow has yet to be told of a removal."""
    return (output_dir / REMOVALS).exists()


def send_removals(output_dir: Path) -> tuple[int, list[str]]:
    """Remove in MLflow what was removed here; returns how many runs, and what went wrong in plain
    words: of it all is tried again the next time."""
    if not is_due(output_dir):
        return 0, []
    n_deleted, faults, away = 0, [], set()
    with _removals(output_dir) as found:
        clients: dict[str, PatientClient] = {}
        for one in list(found):
            place = MlflowTarget(one["uri"], one["experiment"], output_dir)
            if place.resolved in away:
                continue
            try:
                n_deleted += _delete(place, one, clients)
            except outside_faults() as error:
                told = (
                    f"MLflow doesn't know yet of what was removed (tracking.uri={place.resolved}): "
                    f"{plain(error)}. `python -m crl_exp sync {output_dir}` tells it"
                )
                faults.append(told)
                away.add(place.resolved)
                continue
            found.remove(one)
    return n_deleted, faults


def _delete(place: MlflowTarget, one: dict[str, Any], clients: dict[str, PatientClient]) -> int:
    """A run with its children, and the runs that it came in place of."""
    uri = place.resolved
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return 0  # it went with its file
    if uri not in clients:
        clients[uri] = connect(uri)
    client = clients[uri]
    experiment = one["experiment_id"]
    if experiment is None:
        found = client.get_experiment_by_name(place.experiment)
        if found is None:
            return 0
        experiment = found.experiment_id
    wanted = [one["run_id"]] if one["run_id"] else []
    wanted = wanted or _tagged(client, experiment, "crl_exp.upload_id", one["upload_id"])
    known: list[str] = []
    while wanted:
        run_id = wanted.pop()
        if run_id in known:
            continue
        known.append(run_id)
        for tag in ("mlflow.parentRunId", "crl_exp.superseded_by"):
            wanted += _tagged(client, experiment, tag, run_id)
    # The run itself last: where it is cut off, the rest can still be found by it.
    return sum(_deleted(client, run_id) for run_id in reversed(known))


def _tagged(client: PatientClient, experiment: str, tag: str, value: str) -> list[str]:
    """Ids of the runs that have a tag."""
    found: list[str] = []
    token: str | None = None
    while token is None or token:
        page = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", page_token=token)
        found += [run.info.run_id for run in page]
        token = page.token or ""
    return found


def _deleted(client: PatientClient, run_id: str) -> bool:
    """Delete a run; whether it was still there."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
        client.delete_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
