"""A run directory brought to wandb whole, noted in its `wandb.json`, at most once as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, write_json
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import plain
from crl_exp.tracking.sending.content import UNFINISHED, points
from crl_exp.tracking.sending.mlflow_runs import RemovedError, sending, status_of
from crl_exp.tracking.sending.sent import WANDB_LOCK, WANDB_SENT, Reading, life
from crl_exp.tracking.to_wandb.rows import signature
from crl_exp.tracking.to_wandb.session import Session, import_wandb, outside_faults, why_no_login
from crl_exp.tracking.to_wandb.target import OURS, WandbTarget, sync_line

FINISH_SECONDS = 600.0
"""`sync` waits so long for wandb to have taken a run."""
Tell = Callable[[str], None]
LOGIN = (
    "%s: nothing is uploaded, and what is sent is written offline. Log in by `wandb login` (or "
    "set WANDB_API_KEY), and `python -m crl_exp sync %s` uploads it; tracking.mode=offline leaves "
    "it so"
)


class Noted:
    """What was written for one project, noted beside what it was written from.

    Its `record` has the wandb run's `id`, the `life` it is of, its `folder` in `wandb`, the `mode`
    in which it was written, and once it is whole the `signature` of what it was made from.
    """

    def __init__(self, run: Path, place: WandbTarget):
        self.path = run / WANDB_SENT
        again = "remove it, and the run is sent to wandb again"
        self._all: list[dict[str, Any]] = read_json(self.path, again, list) or []
        where = {"project": place.project, "entity": place.entity}
        same = [one for one in self._all if where.items() <= one.items()]
        self.record: dict[str, Any] = same[0] if same else dict(where)
        if not same:
            self._all.append(self.record)

    def begin(self, run_id: str) -> None:
        for key in ("signature", "mode", "folder"):
            self.record.pop(key, None)
        self.record["id"] = run_id
        write_json(self.path, self._all)

    def end(self, now: str, mode: str, folder: str) -> None:
        self.record |= {"signature": now, "mode": mode, "folder": folder}
        write_json(self.path, self._all)


def possible_mode(place: WandbTarget, folder: Path, tell: Tell) -> str:
    """The mode that is asked for, or `offline` where there is no login, which is told."""
    if place.mode == "online" and (why := why_no_login()):
        tell(LOGIN % (why, folder))
        return "offline"
    return place.mode


class Sender:
    """Brings one run directory to wandb. Its lock must be held (`holding`).

    mode: `possible_mode`. finish_seconds: to wait for wandb at the end.
    """

    def __init__(
        self, run: Path, place: WandbTarget, mode: str, finish_seconds: float = FINISH_SECONDS
    ):
        self.path, self.place, self.mode = run, place, mode
        self.finish_seconds = finish_seconds
        self._session: Session | None = None
        self._reading = Reading()

    def up_to_date(self) -> bool:
        """Whether wandb was given the run as it is now, the way it is to be given."""
        sent = Noted(self.path, self.place).record
        # What was uploaded isn't needed offline as well.
        there = sent.get("mode") == "online" or (
            self.mode == "offline" and (self.path / OURS / sent.get("folder", "-")).is_dir()
        )
        same_run = sent.get("id") == self._run_id()
        return there and same_run and sent.get("signature") == signature(Record(self.path))

    def send_new(self) -> None:
        """Write what is new since this sender's last call; all there is, the first time."""
        if self._session is None:
            self._session = self._begun()
        for name, prefix in (("journal.jsonl", ""), ("system.jsonl", "system/")):
            for lines in self._reading.parts(self.path / name):
                self._session.log(points(lines, prefix))

    def finish(self) -> None:
        """Write the rest, and note that it is whole. The run is over."""
        now = signature(Record(self.path))  # first: what comes later is sent by the next sync
        self.send_new()
        assert self._session is not None
        folder = self._session.folder.name
        self._session.finish(Record(self.path))
        self._session = None
        Noted(self.path, self.place).end(now, self.mode, folder)

    def forget(self) -> None:
        """After a fault nobody knows what came through: the next call writes it all again."""
        self._session, self._reading = None, Reading()

    def _run_id(self) -> str:
        """wandb's: another one where the run was started from nothing since."""
        return f"{self.path.name}-{life(self.path)[:8]}"

    def _begun(self) -> Session:
        run_id = self._run_id()
        Noted(self.path, self.place).begin(run_id)
        # The run directory has all that they hold: `wandb sync` must not find two of one id.
        for folder in (self.path / OURS).glob("*run-*"):
            shutil.rmtree(folder)
        return Session(Record(self.path), self.place, run_id, self.mode, self.finish_seconds)


@contextmanager
def holding(run: Path) -> Iterator[None]:
    """Nobody else sends the run to wandb meanwhile, or removes it. Raises `RemovedError` where it
    is gone."""
    with sending(run, WANDB_LOCK):
        yield


def send_to_wandb(records: Sequence[Record], place: WandbTarget, tell: Tell) -> list[str]:
    """Bring run directories to wandb; those that go on do so by themselves. Returns what to tell.

    Raises `UserError` with what went wrong.
    """
    import_wandb()
    folder = records[0].path if len(records) == 1 else records[0].path.parent
    mode = possible_mode(place, folder, tell)
    sent: list[Record] = []
    damaged: list[str] = []
    for record in records:
        try:
            if status_of(record) in UNFINISHED:
                continue
            with holding(record.path):
                sender = Sender(record.path, place, mode)
                if not sender.up_to_date():
                    sender.finish()
        except RemovedError:
            continue  # what goes while others are sent is no fault
        except UserError as error:
            damaged.append(str(error))
        except outside_faults() as error:
            raise UserError(place.refused(record.path, plain(error))) from error
        else:
            sent.append(record)
    if damaged:
        raise UserError("\n".join(damaged))
    return _told(sent, len(records) - len(sent), place)


def _told(sent: list[Record], n_others: int, place: WandbTarget) -> list[str]:
    told = [f"{len(sent)} runs up to date in {place.resolved}"] if sent else []
    offline = [one for one in sent if Noted(one.path, place).record.get("mode") == "offline"]
    if offline:
        sweeps = dict.fromkeys(one.path.parent for one in offline)
        told.append(f"{len(offline)} of them are offline; `{sync_line(sweeps)}` uploads them")
    if n_others:
        told.append(f"{n_others} runs haven't ended: they are sent to wandb as they go on")
    return told
