"""The process beside a run: `python -m crl_exp.tracking.to_wandb.follow RUN_DIRECTORY`.

It follows the run's journal until its standard input ends, which the run closes at its end and
which closes when the run is killed. What a person should know is written to standard output, a line
each. wandb changes how a program ends, starts processes and threads and may hang: none of it is
the run's.
"""

from __future__ import annotations

import select
import signal
import sys
import time
from pathlib import Path

from crl_exp.runs.records import Record
from crl_exp.tracking.config import LONGEST_PAUSE_SECONDS, SHARE
from crl_exp.tracking.sending.client import plain
from crl_exp.tracking.sending.content import UNFINISHED
from crl_exp.tracking.sending.mlflow_runs import status_of
from crl_exp.tracking.to_wandb.sending import Sender, Tell, holding, possible_mode
from crl_exp.tracking.to_wandb.session import import_wandb
from crl_exp.tracking.to_wandb.target import wandb_target

FINISH_SECONDS = 25.0
"""A run's end waits no longer for wandb to have taken it."""


def follow(run: Path, tell: Tell) -> bool:
    """Whether the run was sent whole."""
    section = Record(run).config["tracking"]
    place = wandb_target(section)
    assert place is not None, f"{run} isn't sent to wandb"
    import_wandb()
    told: set[str] = set()
    with holding(run):
        sender = Sender(run, place, possible_mode(place, run, tell), FINISH_SECONDS)
        n_faults, pause = 0, 0.0
        while True:
            ending = _input_ended(pause)
            # Killed, a run can't say how it ended: sync writes it when that is known.
            if ending and (n_faults or status_of(Record(run)) in UNFINISHED):
                return False
            busy = time.process_time()
            try:
                if ending:
                    sender.finish()
                    return True
                sender.send_new()
                n_faults = 0
            except Exception as error:  # whatever it is: told once, tried again or left to sync
                if (line := place.refused(run, plain(error))) not in told:
                    told.add(line)
                    tell(line)
                sender.forget()
                n_faults += 1
                if ending:
                    return False
            longest = max(section["sync_seconds"], LONGEST_PAUSE_SECONDS)
            wait = min(section["sync_seconds"] * 2**n_faults, longest)
            pause = max(wait, (time.process_time() - busy) / SHARE)


def _input_ended(seconds: float) -> bool:
    """Whether the run is over; waits so long at most."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def main(argv: list[str]) -> int:
    # The run is told to end, and tells us; its last words are to be sent.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    try:
        return 0 if follow(Path(argv[0]), _tell) else 1
    except Exception as error:
        _tell(f"what sends {argv[0]} to wandb ended: {plain(error)}")
        raise


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
