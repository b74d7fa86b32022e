"""`python -m crl_exp report SWEEP`: what a sweep found, as a table, CSV and figures."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rich.console import Console

from crl_exp import curves, figures, tables
from crl_exp.comparison import SweepComparison, compare_runs
from crl_exp.errors import UserError, did_you_mean
from crl_exp.records import find_records
from crl_exp.runs import write_atomic
from crl_exp.tracking import resolved_uri

# Table columns don't fit a narrow terminal; where there is none, this many characters.
WIDTH = 130


def find_sweep(name: str, output_dir: Path) -> Path:
    """The folder of a sweep, given as a folder or by name.

    Raises `UserError` where there is none, with the nearest names.
    """
    for folder in (Path(name), output_dir / name):
        if folder.is_dir():
            return folder
    there = sorted({path.parent.parent.name for path in output_dir.glob("*/*/config.yaml")})
    listed = f"; {output_dir} has {', '.join(there)}" if there else ""
    raise UserError(f"no sweep {name!r} in {output_dir}{did_you_mean(name, there)}{listed}")


def write_report(sweep: SweepComparison, folder: Path) -> list[Path]:
    """Write tables and figures into `folder`; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("table.md", "table.csv", "by_layer.png", "training.png")
    table, lines, by_layer, training = (folder / name for name in names)
    write_atomic(table, tables.markdown(sweep))
    write_csv(sweep, lines)
    written = [table, lines]
    if any(row.method != "none" for row in sweep.rows):
        figures.by_layer(sweep, by_layer)
        written.append(by_layer)
    if curves.training(sweep, training):
        written.append(training)
    return written


def write_csv(sweep: SweepComparison, path: Path) -> None:
    """One line a row and test set (`test`, then further ones), figures as fractions."""
    columns = (
        "method", "layers", "seeds", "test_set", "chosen_on_validation", "validation", "n",
        "accuracy_baseline", "accuracy_steered", "delta", "delta_low", "delta_high", "p_value",
        "p_holm", "fixed", "broken", "invalid_baseline", "invalid_steered", "unique_features",
    )  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in sweep.rows:
            for name in (None, *sweep.test_sets):
                means = {key: row.mean(key, name) for key in columns[6:10]}
                low, high = row.interval(name)
                p = float(row.values("p_value", name).max())
                flips = [row.mean(k, name) for k in ("fixed", "broken", *columns[16:18])]
                writer.writerow(
                    [
                        row.family, " ".join(map(str, row.layers)),
                        " ".join(map(str, row.seeds)), name or "test", row in sweep.chosen,
                        row.validation, *means.values(), low, high, p,
                        sweep.p_holm[row] if name is None else "", *flips,
                        row.mean("unique_features"),
                    ]
                )  # fmt: skip


def next_lines(sweep: SweepComparison, folder: Path) -> list[str]:
    """What one would type next, made for this sweep."""
    config = sweep.first.config
    layers = sorted({layer for row in sweep.rows for layer in row.layers if len(row.layers) == 1})
    which = ",".join(map(str, layers)) or "8,18"
    launch = f"python launch.py -m sweep_name={sweep.first.sweep} task={config['task']['name']}"
    tracking = config["tracking"]
    uri = resolved_uri(tracking["uri"], folder.parent)
    see = f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    lines = {
        f"{launch} layers.layer={which} seed=3,4": "more seeds; finished runs are not run again",
        f"{launch} layers.layer={which} mask=active": "another option beside it",
        f"{launch} layers.layer={which} resume=force": "again from the start",
        see if tracking["enabled"] else f"python -m crl_exp sync {folder}": "all runs in MLflow",
    }
    width = max(map(len, list(lines)[:3]))
    return [f"{line:<{width}}  # {why}" for line, why in lines.items()]


def main(argv: list[str]) -> int:
    """`python -m crl_exp report SWEEP_OR_DIR [--output-dir DIR]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp report",
        description="Compare a sweep's runs: table, CSV and figures in outputs/SWEEP/report/.",
    )
    parser.add_argument("sweep", help="name of a sweep in the output folder, or its folder")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir)
    sweep = compare_runs(find_records(folder))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    tables.print_report(sweep, console)
    written = write_report(sweep, folder / "report")
    console.print("\nwritten:")
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print("to type next:")
    for line in next_lines(sweep, folder):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return 0
