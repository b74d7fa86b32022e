"""`python -m crl_exp COMMAND …`, installed also as `crl-exp COMMAND …`.

Experiments are run by the command `launch`; in a checkout that is `python launch.py`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from crl_exp.config.display import lossy_terminal, plain
from crl_exp.config.errors import UserError
from crl_exp.config.paths import working_directory_last
from crl_exp.runs import slurm
from crl_exp.runs.preemption import guard

# Each module has `main(argv) -> int` and is imported only when its command is called.
COMMANDS = {
    "launch": ("crl_exp.launcher.app", "run an experiment, with -m a sweep: launch.py"),
    "assets": ("crl_exp.launcher.assets.command", "fetch the model and the data into the cache"),
    "run": (
        "crl_exp.launcher.jobs.job",
        "run directories from their frozen configs, as a job does",
    ),
    "status": (
        "crl_exp.launcher.commands.status",
        "state, progress and time left of a sweep's runs",
    ),
    "logs": ("crl_exp.launcher.commands.logs", "what a run's job printed, and why it ended"),
    "retry": (
        "crl_exp.launcher.commands.retry",
        "start a sweep's failed, lost and cancelled runs again",
    ),
    "cancel": ("crl_exp.launcher.commands.cancel", "end a sweep's queued and running runs"),
    "rm": ("crl_exp.launcher.commands.rm", "remove a run or a sweep, also in MLflow"),
    "rename": ("crl_exp.launcher.commands.rename", "give a sweep another name, also in MLflow"),
    "prefetch": (
        "crl_exp.launcher.commands.prefetch",
        "download what a sweep loads, for offline nodes",
    ),
    "doctor": (
        "crl_exp.launcher.doctor.command",
        "whether this machine and its cluster can run what is typed",
    ),
    "sync": ("crl_exp.tracking.sync", "bring MLflow or wandb up to date with the runs"),
    "report": (
        "crl_exp.report.command",
        "tables and figures of a sweep; of several, against each other",
    ),
    "compare": (
        "crl_exp.report.console.compare",
        "two runs, or rows of a report, on the same items",
    ),
    "show": ("crl_exp.report.console.show", "a run's answers beside the unsteered ones"),
    "label": ("crl_exp.launcher.commands.label", "a judge's labels of features, with a test"),
    "train-sae": ("crl_exp.launcher.commands.train_sae", "train SAEs of a model, a layer each"),
    "bench": ("crl_exp.launcher.bench.command", "measure speed and memory, in ratios"),
    "options": (
        "crl_exp.launcher.commands.options",
        "write docs/options.md and its pages from conf/",
    ),
}


LONG = ("launch", "run")
"""Commands that may be asked to end while they still import; what is run then goes on later."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a `UserError` is printed, without traceback."""
    working_directory_last()
    listing = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
    installed = Path(sys.argv[0]).stem == "crl-exp"
    program = "crl-exp" if installed else "python -m crl_exp"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Steer language models through SAE features and compare what comes of it.",
        epilog=f"commands:\n{listing}\n\n`{program} COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the command takes")
    parsed = parser.parse_args(argv)
    lossy_terminal()
    guarded = guard() if parsed.command in LONG else nullcontext()
    if parsed.command == "run" and "--queued" in parsed.arguments:  # as our batch scripts type it
        slurm.claim()
    try:
        with guarded:
            module = importlib.import_module(COMMANDS[parsed.command][0])
            return module.main(parsed.arguments) or 0
    except UserError as error:
        print(plain(f"crl_exp {parsed.command}: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"crl_exp {parsed.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
