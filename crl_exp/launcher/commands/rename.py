"""`python -m crl_exp rename SWEEP NEW`: a sweep's folder renamed, and its runs in MLflow.

The folder's name is the sweep's: nothing inside has to be changed for its runs to be found, and
`sync` tells MLflow whatever name it finds. wandb isn't told, which is said.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.paths import check_sweep
from crl_exp.launcher.commands.rm import is_sweep, refuse_at_work
from crl_exp.launcher.sweep_file import SweepFile, locked
from crl_exp.runs.records import Record, find_sweep
from crl_exp.tracking.sending.sent import SENT, WANDB_SENT
from crl_exp.tracking.sync import send_all
from crl_exp.tracking.to_wandb.target import wandb_target


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp rename",
        description="Give a sweep another name, here and in MLflow. Runs that are queued or "
        "running have to end, or be cancelled, first.",
    )
    parser.add_argument("sweep", help="name of a sweep in the output folder, or its folder")
    parser.add_argument("new", help="its new name")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = Path(os.path.abspath(find_sweep(arguments.sweep, arguments.output_dir)))
    target = rename(folder, arguments.new)
    print(f"{folder} is {target} now")
    if (target / "report").exists():
        print(f"its report still has the old name: `python -m crl_exp report {target}`")
    if n_in_wandb := len(list(target.glob(f"*/{WANDB_SENT}"))):
        print(
            f"{n_in_wandb} runs were sent to wandb in the group {folder.name}: "
            f"`python -m crl_exp sync {target}` sends them again, in the new one"
        )
    told = [Record(path.parent) for path in sorted(target.glob(f"*/{SENT}"))]
    told = [one for one in told if wandb_target(one.config["tracking"]) is None]
    try:
        for line in send_all(told):
            print(line)
    except UserError as error:  # the folder is renamed all the same
        print(error)
    return 0


def rename(folder: Path, new: str) -> Path:
    """Returns the folder as it is called now. Raises `UserError` where it can't be renamed so."""
    check_sweep(new)
    if not is_sweep(folder) or folder.is_symlink():
        raise UserError(f"{folder} is no sweep's folder; nothing was renamed")
    target = folder.parent / new
    if os.path.lexists(target):
        raise UserError(f"there is a {target} already; nothing was renamed. Take another name")
    with locked(folder):
        runs = [Record(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
        refuse_at_work(folder, runs, "renamed")
        os.rename(folder, target)
    sweep = SweepFile.read(target)
    if sweep.points or sweep.submissions:
        sweep.write()  # which says the sweep's name
    return target
