"""A run's own thread that keeps MLflow up to date while the run is going on, or its process beside
it that does so for wandb.

The journal in the run directory is the queue: it is written first, and the thread sends what is new
of it. A server that is away, slow or wrong costs the run nothing but a warning.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from types import TracebackType

from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from crl_exp.tracking.config import LONGEST_PAUSE_SECONDS, SHARE, TrackingConfig
from crl_exp.tracking.sending.client import import_mlflow, outside_faults, plain
from crl_exp.tracking.sending.sent import Reading
from crl_exp.tracking.sending.target import MlflowTarget
from crl_exp.tracking.sending.upload import Uploader
from crl_exp.tracking.system_metrics import SystemMonitor
from crl_exp.tracking.to_wandb.follower import Follower
from crl_exp.tracking.to_wandb.target import WandbTarget

log = logging.getLogger(__name__)
# A finished run waits no longer than this for MLflow, and less where it didn't answer before.
PATIENCE_SECONDS, SHORT_PATIENCE_SECONDS = 30.0, 5.0
POINTS_AT_ONCE = 5000


class Tracker:
    """Entered around a run, started once its directory is held. Leaving it sends the run's end.

    Does nothing where tracking is off or the run was never started.
    """

    def __init__(self, run: RunDirectory, config: TrackingConfig):
        self.path, self.config = run.path.absolute(), config
        self.place = MlflowTarget(config.uri, config.experiment, self.path.parent.parent)
        self._follower: Follower | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._monitor: SystemMonitor | None = None
        self._uploader: Uploader | None = None
        self._reading = Reading()
        self._faults = 0
        self._warned = False
        self._deadline: float | None = None
        self._random = random.Random(str(self.path))  # not the one that experiments draw from

    def __enter__(self) -> Tracker:
        return self

    def start(self) -> None:
        if not self.config.enabled:
            return
        if self.config.system_seconds is not None:
            self._monitor = SystemMonitor(self.path / "system.jsonl", self.config.system_seconds)
            self._monitor.start()
        if self.config.target == "wandb":
            self._follow()
            return
        try:
            import_mlflow()
        except ImportError as error:
            self._warn(error)
            return
        self._thread = threading.Thread(target=self._loop, name="MLflow", daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        # A run that was told to end (a SystemExit) has no more than its warning's seconds.
        hurried = self._faults or (kind is not None and issubclass(kind, SystemExit))
        patience = SHORT_PATIENCE_SECONDS if hurried else PATIENCE_SECONDS
        if self._follower is not None and (why := self._follower.end(patience)):
            log.warning("%s", self._wandb.refused(self.path, why))
        if self._thread is None:
            return
        self._deadline = time.monotonic() + patience
        if self._uploader is not None:
            self._uploader.client.deadline = self._deadline
        self._closing.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"it took longer than {patience:g} s at the run's end"))

    @property
    def _wandb(self) -> WandbTarget:
        return WandbTarget(self.config.project, self.config.entity, self.config.mode)

    def _follow(self) -> None:
        try:
            self._follower = Follower(self.path, lambda line: log.warning("%s", line))
        except OSError as error:
            log.warning("%s", self._wandb.refused(self.path, plain(error)))

    def _loop(self) -> None:
        ending, pause = False, 0.0
        while not ending:
            ending = self._closing.wait(pause)
            busy = time.thread_time()
            whole = self._send(float("inf") if ending else POINTS_AT_ONCE)
            pause = max(self._pause(whole), (time.thread_time() - busy) / SHARE)

    def _pause(self, whole: bool) -> float:
        if not whole and not self._faults:
            return 0.0  # there is more; the processor's share is kept to
        longest = max(self.config.sync_seconds, LONGEST_PAUSE_SECONDS)
        wait = min(self.config.sync_seconds * 2**self._faults, longest)
        return wait * self._random.uniform(0.8, 1.2)

    def _send(self, at_most: float) -> bool:
        """Whether all there is was sent."""
        try:
            whole = self._send_now(at_most)
        except outside_faults() as error:
            self._failed(error)
        except Exception as error:  # whatever it is, it must not end tracking, let alone the run
            log.warning("an unforeseen fault in MLflow's client", exc_info=error)
            self._failed(error)
        else:
            if self._faults and not self._closing.is_set():
                log.info("MLflow takes %s again", self.path)
            self._faults = 0
            return whole
        return False

    def _send_now(self, at_most: float) -> bool:
        first = self._uploader is None
        if self._uploader is None:
            self._uploader = self.place.uploader(self._deadline)
        record = Record(self.path)
        whole = self._uploader.send(record, self._reading, at_most)
        if first or self._closing.is_set():
            self._uploader.send_sweep(self.path.parent)
        return whole

    def _failed(self, error: Exception) -> None:
        self._faults += 1
        if self._uploader is not None:
            self._uploader.runs.forget()
        log.debug("not sent: %s", plain(error))
        self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Once a run."""
        if not self._warned:
            self._warned = True
            log.warning("%s", self.place.refused(self.path, error))
