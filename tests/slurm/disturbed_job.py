"""`python -m crl_exp run DIRECTORY` with every call of the engine slowed and written down, in
DISTURBED_EVENTS; what the jobs of `test_requeue.py` run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from crl_exp.runs.preemption import guard

if __name__ == "__main__":
    with guard():  # as `python -m crl_exp run` does, before anything heavy is imported
        from crl_exp.__main__ import main
        from crl_exp.runs import slurm
        from tests.helpers.disturbed import watch_generation, write_freely

        slurm.claim()  # it stands for a job that the launcher submitted
        write_freely()
        watch_generation(Path(os.environ["DISTURBED_EVENTS"]))
        code = main(["run", *sys.argv[1:]])
    sys.exit(code)
