"""Runs that are asked to end early: SLURM's warning before a time limit or preemption, `kill`.

USR2 (what `sbatch --signal=USR2@90` and submitit send) and SIGTERM let the run finish its step (an
update, a batch of answers), save it, write the state `preempted` and end; under SLURM the job is
requeued and goes on from there. A second signal ends it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from crl_exp.runs import slurm
from crl_exp.runs.checkpoints import CheckpointConfig

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h, "try again later"; fits SLURM's RequeueExit
SAME_DELIVERY_SECONDS = 2.0
"""srun and scancel may each hand on one signal; what comes this soon is no second wish."""


class Preempted(SystemExit):
    """Raised once all is saved; it ends the process with `EXIT_CODE`. No `except Exception` or
    Hydra takes it for a failure.

    signal: name of the signal that was sent. cancelled: the run is not to go on by itself.
    """

    def __init__(self, signum: int):
        super().__init__(EXIT_CODE)
        self.signal = signal.Signals(signum).name
        self.cancelled = False


_asked: tuple[int, float] | None = None  # signal and time, of this process
_guarded = False
_thread = threading.local()  # wish: of the one run that this thread is


def asked() -> bool:
    """Whether this process, or this thread's run alone, has been asked to end."""
    return _asked is not None or _own_wish() is not None


def check() -> None:
    """Called where nothing is left to be saved. Raises `Preempted` if the run was asked to end,
    or what ends this thread's run alone (`alone`)."""
    if _asked is not None:
        raise Preempted(_asked[0])
    if (wish := _own_wish()) is not None:
        raise wish


Wish = Callable[[], BaseException | None]


@contextmanager
def alone(wish: Wish) -> Iterator[None]:
    """In this thread, `check` also raises what `wish` returns, if that isn't None."""
    _thread.wish = wish
    try:
        yield
    finally:
        del _thread.wish


def _own_wish() -> BaseException | None:
    wish: Wish | None = getattr(_thread, "wish", None)
    return None if wish is None else wish()


@contextmanager
def guard() -> Iterator[None]:
    """Around a run, in the process's main thread: the signals end it after its step.

    On `Preempted`, raised through this block, the SLURM job is put back into the queue. Whoever
    started the process (sbatch, submitit, a person) has its own handlers again afterwards. Inside
    of another guard it does nothing: a job sets one before its imports, too.
    """
    global _asked, _guarded
    if _guarded or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _note) for signum in SIGNALS}
    _guarded = True
    try:
        yield
    except Preempted as preempted:
        # SLURM ends what is left of a requeued job with a SIGTERM of its own.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        _put_back(preempted)
        raise
    finally:
        _asked, _guarded = None, False
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _note(signum: int, frame: FrameType | None) -> None:
    global _asked
    if _asked is None:
        _asked = signum, time.monotonic()
        name = signal.Signals(signum).name
        log.warning("%s: this run ends after its step; once more ends it at once", name)
    elif time.monotonic() - _asked[1] > SAME_DELIVERY_SECONDS:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _put_back(preempted: Preempted) -> None:
    name = slurm.job_id()
    if name is not None and not preempted.cancelled:
        slurm.requeue(name, terminated=preempted.signal == "SIGTERM")


class CheckpointTimer:
    """When to save: as `CheckpointConfig` says, and at once where the run was asked to end."""

    def __init__(self, config: CheckpointConfig):
        self.config = config
        self.unsaved = 0  # steps
        self._since = time.monotonic()

    def after_step(self, save: Callable[[], None]) -> None:
        """Count a step, and save if it is time to. Raises `Preempted` after the saving."""
        self.unsaved += 1
        late = time.monotonic() - self._since > self.config.seconds
        if asked() or late or self.unsaved >= self.config.updates:
            save()
            self.unsaved, self._since = 0, time.monotonic()
        check()
