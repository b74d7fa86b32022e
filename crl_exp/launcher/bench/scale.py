"""Commands over a sweep of thousands of finished runs, most of them hard links to some: what
becomes slow first.

`python -m crl_exp.launcher.bench.scale FOLDER N` makes such a sweep in a new folder, and prints for
each command its CPU seconds and the most memory that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from crl_exp.config.errors import UserError
from crl_exp.config.keys import key_of
from crl_exp.config.paths import REPO
from crl_exp.launcher.bench.finished_runs import LAYERS, RATE, SEEDS, Dumper, Loader, make_sweep

DISTINCT = SEEDS * LAYERS
"""So many runs, each seed at each layer, have files of their own; the others, which have another
learning rate, link to those of one with the same seed and layer."""
SWEEP = "many"
NAMES = ("status", "launch", "report", "sync")
TYPED = ("+debug=tiny", "method=crl", "tracking=none")


@dataclass(frozen=True)
class Cost:
    """Of a process: user and system seconds, and the most memory, bytes."""

    seconds: float
    peak: int


def cost(arguments: Sequence[str]) -> Cost:
    """What a Python that is given these arguments takes. Raises `RuntimeError` where it fails."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        end = said.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {end}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def linked_sweep(template: Path, folder: Path, n: int, n_items: int = 500) -> list[Path]:
    """Write `n` finished runs into `folder`; returns their directories.

    As `make_sweep` does, but only `DISTINCT` of them have files of their own; another's config and
    result are its own, the rest are hard links.
    """
    made = make_sweep([template], folder, min(n, DISTINCT), n_items)
    for place in range(len(made), n):
        base = made[place % DISTINCT]
        config = yaml.load((base / "config.yaml").read_text(), Loader)
        section, key = RATE
        config[section][key] *= 1 + place // DISTINCT
        path = folder / key_of(config)
        path.mkdir()
        (path / "config.yaml").write_text(yaml.dump(config, Dumper=Dumper, sort_keys=False))
        result = {**json.loads((base / "result.json").read_text()), "run_key": path.name}
        (path / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        for file in base.iterdir():
            if file.name not in ("config.yaml", "result.json"):
                os.link(file, path / file.name)
        made.append(path)
    return made


def relaunch(folder: Path, config: dict, n: int) -> list[str]:
    """The line that launches the sweep of `linked_sweep` again. n: a multiple of `DISTINCT`.

    config: of a run with the first learning rate.
    """
    section, key = RATE
    rates = ",".join(repr(config[section][key] * (1 + i)) for i in range(n // DISTINCT))
    return [
        str(REPO / "launch.py"), "-m", *TYPED, f"output_dir={folder.parent}",
        f"sweep_name={folder.name}", f"seed=range({SEEDS})", f"layers.layer=range({LAYERS})",
        f"{section}.{key}={rates}", "hydra/launcher=local_processes",
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="time commands over N finished runs")
    parser.add_argument("folder", type=Path, help="a new one, for the runs")
    parser.add_argument("n", type=int, help=f"a multiple of {DISTINCT}")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="commands to time")
    asked = parser.parse_args(argv)
    if asked.n < DISTINCT or asked.n % DISTINCT:
        raise UserError(f"{asked.n}: must be a multiple of {DISTINCT}, such as {10 * DISTINCT}")
    folder, n = asked.folder.absolute(), asked.n
    if folder.exists():
        raise UserError(f"{folder} is there already; give a new folder")
    launch = str(REPO / "launch.py")
    cost([launch, *TYPED, "layers.layer=0", f"output_dir={folder}", "sweep_name=one"])
    (template,) = [path.parent for path in folder.glob("one/*/result.json")]
    runs = linked_sweep(template, folder / SWEEP, n)
    config = yaml.load((runs[0] / "config.yaml").read_text(), Loader)
    sweep, database = str(folder / SWEEP), folder / "mlflow.db"
    ours = ["-m", "crl_exp"]
    commands = {
        "status": [*ours, "status", sweep],
        "launch": relaunch(folder / SWEEP, config, n),
        "report": [*ours, "report", sweep],
        "sync": [*ours, "sync", sweep, "--uri", f"sqlite:///{database}"],
    }
    print(f"{n} runs: CPU seconds, most memory in GiB")
    for name in asked.only:
        for again in ("", " again"):
            found = cost(commands[name])
            print(f"{name}{again}: {found.seconds:.1f}, {found.peak / 2**30:.2f}", flush=True)
    if database.exists():
        print(f"MLflow's file: {database.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
