"""Folders and servers: where runs are written, what they read, where they are sent."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.config.machine.assets import COPY_HINT, FETCH, asset_path, cache_dir
from crl_exp.config.paths import REPO, here_or_shipped
from crl_exp.launcher.doctor.finding import (
    Finding,
    Subject,
    failed,
    ok,
    skipped,
    warning,
)
from crl_exp.launcher.doctor.mounts import MEMORY, existing, free_bytes, is_network, kind_of
from crl_exp.models.config import ASSET_PREFIX
from crl_exp.models.sizes import BYTES, CARDS, cached_model, hub_cache
from crl_exp.saes.config import TINY_PREFIX
from crl_exp.tracking.config import uri_fault, wandb_missing
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.to_wandb.target import wandb_target

GIB = 2**30
LEAST_BYTES = GIB // 2
SERVER_SECONDS = 3.0
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TASK_ASSETS = {
    "Sentiment": ("data/hutto_icwsm_2014",),
    "OneSentence": ("data/hutto_icwsm_2014",),
    "Refusal": ("data/donotanswer", "data/harmbench"),
}
"""What the tasks of these classes read of `make assets`."""


def output_dir(subject: Subject) -> Iterator[Finding]:
    """Writable, lockable, room, and seen by the nodes."""
    folder = subject.output_dir
    kind, free = kind_of(folder), free_bytes(folder)
    told = f"{folder} on {kind or 'a file system of unknown type'}, {free / GIB:.0f} GiB free"
    if fault := _unwritable(existing(folder)):
        yield failed(f"{told}: {fault}", "set output_dir=/a/folder/you/can/write")
        return
    if free < LEAST_BYTES:
        yield failed(told, "make room, or set output_dir=/another/disk")
        return
    if kind in MEMORY:
        yield warning(told, "it is gone after a restart: set output_dir to a folder on a disk")
        return
    yield _shared(subject, kind, told, "set output_dir=/a/shared/folder if they don't")


def _unwritable(folder: Path) -> str | None:
    """Why no run can be kept in a folder; None where nothing is known against it."""
    if not folder.is_dir():
        return f"{folder} is a file"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried by doctor")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"a file can't be written and locked there ({error.strerror or error})"
    return None


def _shared(subject: Subject, kind: str | None, told: str, advice: str) -> Finding:
    """Whether compute nodes may see a folder; no one else needs to."""
    if subject.slurm is None or is_network(kind):
        return ok(told)
    return warning(f"{told}: as a rule that is one machine's own", f"do the nodes see it? {advice}")


def code(subject: Subject) -> Iterator[Finding]:
    """What jobs start from."""
    given = subject.settings.python if subject.settings else None
    # Another interpreter may be a whole shell command.
    folder = Path(given) if given and Path(given).is_absolute() else Path(sys.prefix)
    places = {f"{path} on {kind_of(path)}": path for path in (REPO, folder)}
    told = ", ".join(places)
    if subject.slurm is None:
        yield skipped(f"{told}; no other machine runs it")
        return
    local = next((kind_of(path) for path in places.values() if not is_network(kind_of(path))), None)
    advice = "install on a shared disk, or at the same path on each node (hydra.launcher.python)"
    yield _shared(subject, local or "nfs", told, advice)


def hub(subject: Subject) -> Iterator[Finding]:
    """The cache of the hub, and whether it has what the config names."""
    cache = hub_cache()
    offline = [name for name in OFFLINE_FLAGS if _is_set(name)]
    kind, free = kind_of(cache), free_bytes(cache)
    said = f", offline by {', '.join(offline)}" if offline else ""
    told = f"{cache} on {kind or 'unknown'}, {free / GIB:.0f} GiB free{said}"
    wanted = [*subject.hub_models]
    releases, tasks = subject.values("sae", "release"), _hub_tasks(subject)
    if not (wanted or releases or tasks):
        yield skipped(f"{told}; the config names nothing of the hub")
        return
    advice = "export HF_HOME=/shared/hub, here and in hydra.launcher.setup, if they don't"
    yield _shared(subject, kind, told, advice)
    for repo_id, revision in wanted:
        yield _model(subject, repo_id, revision, bool(offline), free)
    for name in [*releases, *tasks]:
        yield _repository(subject, name, bool(offline))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_tasks(subject: Subject) -> list[str]:
    tasks = [config.task for config in subject.distinct("task")]
    ids = [str(task.hub_id) for task in tasks if task.get("hub_id") and not task.get("data_files")]
    return list(dict.fromkeys(ids))


PREFETCH = "type it on a machine with a network: python -m crl_exp prefetch OVERRIDES"


def _model(
    subject: Subject, repo_id: str, revision: str | None, offline: bool, free: int
) -> Finding:
    if cached_model(repo_id, revision) is not None:
        return ok(f"{repo_id} is there")
    card = CARDS.get(repo_id)
    told = f"{repo_id} isn't there yet"
    if card is not None:
        size = int(card.parameters * BYTES["bfloat16"])
        told += f" ({size / GIB:.1f} GiB)"
        if size > free:
            return failed(f"{told}, and there is no room for it", "export HF_HOME=/a/larger/disk")
    return _missing(subject, told, offline)


def _missing(subject: Subject, told: str, offline: bool) -> Finding:
    if offline:
        return failed(told, PREFETCH)
    if subject.slurm is not None:
        return warning(f"{told}; are the nodes online?", PREFETCH)
    return ok(f"{told}; the first run fetches it")


def _repository(subject: Subject, name: str, offline: bool) -> Finding:
    """A release of SAEs or a data set: the cache is kept by repository, of which only data sets
    have the id in the config."""
    folders = [hub_cache() / f"datasets--{name.replace('/', '--')}"]
    if any(folder.is_dir() for folder in folders):
        return ok(f"{name} is there")
    if "/" in name:
        return _missing(subject, f"{name} isn't there yet", offline)
    return skipped(
        f"SAEs of {name}: which repository has them isn't looked up here",
        "`python -m crl_exp prefetch OVERRIDES` says whether they are there, or fetches them",
    )


def files(subject: Subject) -> Iterator[Finding]:
    """Folders and assets that the config names."""
    wanted = {
        name: None
        for config in subject.configs
        for name in TASK_ASSETS.get(str(config.task.get("_target_")).rpartition(".")[2], ())
    }
    paths = subject.values("model", "path")
    wanted |= {p.removeprefix(ASSET_PREFIX): None for p in paths if p.startswith(ASSET_PREFIX)}
    missing = [name for name in wanted if not _has_asset(name)]
    if missing:
        yield failed(f"{', '.join(missing)} not in {cache_dir()}", f"{FETCH}. {COPY_HINT}")
    elif wanted:
        told = f"{', '.join(wanted)} in {cache_dir()}"
        advice = (
            "set CRL_EXP_CACHE=/shared/crl_exp, here and in hydra.launcher.setup, if they don't"
        )
        yield _shared(subject, kind_of(cache_dir()), told, advice)
    folders = [f for f in subject.values("sae", "folder") if not f.startswith(TINY_PREFIX)]
    for folder in folders:
        path = here_or_shipped(home(folder, "sae.folder"))
        if not any(path.glob("*/*.safetensors")):
            yield failed(f"sae.folder={folder}: no SAE in {path}", "set sae.folder=/where/they/lie")
        else:
            yield ok(f"sae.folder={folder}")
    if not wanted and not folders:
        yield skipped("the config names no asset and no folder")


def _has_asset(name: str) -> bool:
    try:
        asset_path(name)
    except UserError:  # missing, damaged or of another source: all are mended by fetching it
        return False
    return True


def mlflow(subject: Subject) -> Iterator[Finding]:
    """Whether the tracking server answers, or its file lies well."""
    for config in subject.distinct("tracking"):
        if not config.tracking.enabled:
            yield skipped("tracking.enabled=false; `python -m crl_exp sync` can send runs later")
            continue
        if config.tracking.target != "mlflow":
            yield skipped(f"runs go to {config.tracking.target}")
            continue
        given = None if config.tracking.uri is None else str(config.tracking.uri)
        if given is not None and (fault := uri_fault(given)):
            yield failed(fault, "see docs/mlflow.md")
            continue
        uri = resolved_uri(given, subject.output_dir)
        yield _server(uri) if uri.startswith("http") else _database(uri, subject)


def wandb(subject: Subject) -> Iterator[Finding]:
    """Whether it is installed, and logged in where it is to upload. The server isn't asked."""
    places = [wandb_target(config.tracking) for config in subject.distinct("tracking")]
    wanted = [place for place in places if place is not None]
    if not wanted:
        yield skipped("tracking isn't wandb")
        return
    if fault := wandb_missing():
        yield failed(fault, "")
        return
    for place in wanted:
        if place.mode == "offline":
            yield ok(f"{version('wandb')}, {place.resolved}: `wandb sync` uploads what was written")
        elif why := _why_no_login():
            advice = "`wandb login`, or set WANDB_API_KEY; runs are written offline without it"
            yield warning(f"{place.resolved}: {why}", advice)
        else:
            yield ok(f"{version('wandb')}, {place.resolved}: there is a login")


def _why_no_login() -> str | None:
    from crl_exp.tracking.to_wandb.session import import_wandb, why_no_login  # pyarrow

    import_wandb()
    return why_no_login()


def _database(uri: str, subject: Subject) -> Finding:
    path = Path(uri.removeprefix("sqlite:///"))
    kind = kind_of(path)
    told = f"{path} on {kind or 'unknown'}"
    if fault := _unwritable(existing(path.parent)):
        return warning(f"{told}: {fault}", "runs go on without MLflow; set tracking.uri")
    if is_network(kind):
        return warning(
            f"{told}: SQLite's locks can't be relied on there",
            "one server for all (make mlflow, tracking.uri=http://NODE:5000), or tracking=none and "
            "`python -m crl_exp sync SWEEP` afterwards",
        )
    return ok(told)


def _server(uri: str) -> Finding:
    """MLflow's own sign of life. A run goes on without it, so that no answer is no failure."""
    advice = "runs go on without it, and `python -m crl_exp sync SWEEP` sends them later"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS) as answer:
            said = answer.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        login = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        needs = login if error.code in (401, 403) else ""
        return warning(f"{uri} answers with HTTP error {error.code}", f"{advice}{needs}")
    except (OSError, ValueError) as error:
        return warning(f"{uri} doesn't answer ({error})", advice)
    if said != "OK":
        return warning(f"{uri}: something answers there, but it is no MLflow server", advice)
    return ok(f"{uri} answers")
