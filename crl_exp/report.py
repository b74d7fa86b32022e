"""`python -m crl_exp report SWEEP`: what a sweep found, as a table, CSV and figures."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console

from crl_exp import curves, figures, table_csv, table_latex, tables
from crl_exp.comparison import SweepComparison
from crl_exp.errors import UserError, did_you_mean
from crl_exp.records import find_records
from crl_exp.report_files import Files
from crl_exp.report_parts import Part, SweepParts, compare_parts
from crl_exp.tracking import resolved_uri

# Table columns don't fit a narrow terminal; where there is none, this many characters.
WIDTH = 130
# Each draws into a file, or returns False where the sweep has nothing of the kind.
FIGURES = {"by_layer": figures.by_layer, "training": curves.training}


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


def write_report(parts: SweepParts, folder: Path) -> list[Path]:
    """Write tables and figures into `folder`; returns what was written.

    Where there are several parts, each has a folder of its own in it.
    """
    files = Files(folder)
    files.text("table.csv", table_csv.rows_csv(parts))
    if not parts.several:
        write_part(parts.parts[0], files)
    else:
        files.text("table.md", tables.markdown_of_parts(parts))
        files.text("table.tex", table_latex.latex_of_parts(parts))
        files.text("overview.csv", table_csv.overview_csv(parts))
        for part in parts.parts:
            write_part(part, files.inside(part.folder))
    files.remove_others()
    return files.written


def write_part(part: Part, files: Files) -> None:
    """The tables and figures of one part."""
    sweep = part.sweep
    label = f"{sweep.first.sweep}-{part.folder}".rstrip("-")
    files.text("table.md", tables.markdown(sweep))
    files.text("table.tex", table_latex.latex(sweep, label))
    for name, draw in FIGURES.items():
        files.figure(name, partial(draw, sweep))


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
    parser.add_argument(
        "--by", metavar="KEY", action="append", default=[],
        help="report runs that differ in this key of the config (model.dtype) apart; may be given "
        "several times. Tasks, models and SAE releases always are",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    folder = find_sweep(arguments.sweep, arguments.output_dir)
    parts = compare_parts(find_records(folder), tuple(arguments.by))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    tables.print_parts(parts, console)
    written = write_report(parts, folder / "report")
    console.print("\nwritten:")
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print("to type next:")
    for line in next_lines(parts.parts[0].sweep, folder):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return 0
