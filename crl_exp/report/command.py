"""`python -m crl_exp report SWEEP`: what a sweep found, as a table, CSV and figures. Of several
sweeps: what they have in common, set against each other (`report.across`)."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from crl_exp.report.across.write import report_sweeps
from crl_exp.report.comparison.feature_credit import (
    ITEM_COLUMNS,
    FeatureCredit,
    credit_columns,
    credit_lines,
    credits_of,
    item_lines,
)
from crl_exp.report.comparison.feature_use import metric_lines
from crl_exp.report.comparison.pairs import chosen_pairs
from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.console import terminal as tables
from crl_exp.report.drawn import Drawn
from crl_exp.report.examples import read_row
from crl_exp.report.figures import analyses as analysis_figure
from crl_exp.report.figures import by_labels as label_figure
from crl_exp.report.figures import features as feature_figures
from crl_exp.report.figures import heat_map
from crl_exp.report.figures import ladder as ladder_figure
from crl_exp.report.figures import steering as figures
from crl_exp.report.figures import training as curves
from crl_exp.report.files import Files
from crl_exp.report.page import page
from crl_exp.report.parts import ReportPart, SweepParts, compare_parts
from crl_exp.report.tables import csv as table_csv
from crl_exp.report.tables import ladder as table_ladder
from crl_exp.report.tables import latex as table_latex
from crl_exp.report.tables.analyses import CSV as ANALYSES_CSV
from crl_exp.report.tables.analyses import layer_lines
from crl_exp.report.tables.groups import GROUP_CSV, group_lines
from crl_exp.report.tables.pairs import PAIR_CSV, pair_line
from crl_exp.runs.answers import has_answers
from crl_exp.runs.records import Record, find_records, find_sweep, typed_for
from crl_exp.tracking.report import attach_report
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.to_wandb.target import sync_line, wandb_target

log = logging.getLogger(__name__)
CHANGED = {
    "sweep",
    "sweep_name",
    "task",
    "method",
    "layers",
    "layers.layer",
    "seed",
    "resume",
    "mask",
    "experiment",
}
"""What a sweep asks for that isn't asked for again with the commands to type next."""
# Table columns don't fit a narrow terminal; where there is none, this many characters.
WIDTH = 130
# Each draws into a file, or returns False where the sweep has nothing of the kind.
FIGURES = {
    "ladder": ladder_figure.ladder,
    "by_layer": figures.by_layer,
    "analyses": analysis_figure.analyses,
    "by_option": figures.by_option,
    "by_labels": label_figure.by_labels,
    "heat_map": heat_map.heat_map,
    "training": curves.training,
    "overlap": feature_figures.overlap,
    "diversity": feature_figures.diversity,
    "correlation": feature_figures.correlation,
}


def write_report(parts: SweepParts, folder: Path) -> list[Path]:
    """Write tables, figures and the page into `folder`; returns what was written.

    Where there are several parts, each has a folder of its own in it.
    """
    drawn = Drawn(folder, parts)
    files = Files(folder, drawn)
    figures_of: dict[str, list[Path]] = {}
    credits: dict[str, list[FeatureCredit]] = {}
    for part in parts.parts:
        inside = files.inside(part.folder) if parts.several else files
        credits[part.folder] = write_texts(part, inside)
        figures_of[part.folder] = [
            png
            for name, draw in FIGURES.items()
            if (png := inside.figure(name, draw, part.sweep, drawn.of(part)))
        ]
    files.text("table.csv", table_csv.rows_csv(parts))
    if parts.several:
        files.text("table.md", tables.markdown_of_parts(parts))
        files.text("table.tex", table_latex.latex_of_parts(parts))
        files.text("overview.csv", table_csv.overview_csv(parts))
        overview = files.figure("overview", figures.overview, parts, drawn.of_all)
        figures_of[""] = [overview] if overview else []
    files.text("report.html", page(parts, figures_of, credits))
    files.remove_others()
    drawn.save()
    return files.written


def write_texts(part: ReportPart, files: Files) -> list[FeatureCredit]:
    """The tables of one part; returns what its features did."""
    sweep = part.sweep
    label = f"{sweep.first.sweep}-{part.folder}".rstrip("-")
    credits, items = [], []
    for row in sweep.rows:  # one after the other: both read the same files
        credits += credits_of(row)
        items += item_lines(row)
    credits.sort(key=lambda credit: credit.weight, reverse=True)
    files.text("table.md", tables.markdown(sweep) + tables.feature_section(credits))
    files.text("table.tex", table_latex.latex(sweep, label))
    if pairs := chosen_pairs(sweep):
        files.text("pairs.csv", table_csv.as_csv(PAIR_CSV, [pair_line(pair) for pair in pairs]))
    if steps := table_ladder.ladder_lines(sweep):
        files.text("ladder.csv", table_csv.as_csv(table_ladder.CSV, steps))
    if lines := layer_lines(sweep):
        files.text("analyses.csv", table_csv.as_csv(ANALYSES_CSV, lines))
    if lines := group_lines(sweep):
        files.text("groups.csv", table_csv.as_csv(GROUP_CSV, lines))
    if credits:
        files.text("features.csv", table_csv.as_csv(credit_columns(credits), credit_lines(credits)))
        files.text("by_layer.csv", table_csv.as_csv(*metric_lines(sweep)))
    if items:
        files.text("items.csv", table_csv.as_csv(ITEM_COLUMNS, items))
    return credits


def typed_for_all(folder: Path) -> list[str]:
    """Overrides of the sweep's command that held for all its runs, but for those of `CHANGED`."""
    kept = [
        one
        for one in typed_for(folder)
        if not _swept(one) and one.lstrip("+").split("=")[0] not in CHANGED
    ]
    if folder.parent != Path("outputs") and not any(one.startswith("output_dir=") for one in kept):
        kept.append(f"output_dir={folder.parent}")
    return kept


def _swept(override: str) -> bool:
    """Whether it lists several values; the commas of a list, a mapping or a quoted text don't."""
    inside = re.compile(r"""\[[^\[\]]*\]|\{[^{}]*\}|'[^']*'|"[^"]*\"""")
    while (left := inside.sub("", override)) != override:
        override = left
    return "," in override


def next_lines(sweep: SweepComparison, folder: Path) -> list[str]:
    """What one would type next, made for this sweep."""
    config = sweep.first.config
    layers = sorted({layer for row in sweep.rows for layer in row.layers if len(row.layers) == 1})
    which = ",".join(map(str, layers)) or "8,18"
    names = f"sweep_name={sweep.first.sweep} task={config['task']['name']}"
    launch = " ".join(["python launch.py -m", names, *map(shlex.quote, typed_for_all(folder))])
    see, where = where_all_are(config["tracking"], folder)
    if not sweep.rows:
        kind = config["experiment"]["name"]
        return [
            f"{launch} experiment={kind} seed=1,2  # again, with other draws",
            f"{launch} method=crl layers=single layers.layer={which}  # steer, beside the analysis",
        ]
    lines = {
        f"{launch} layers.layer={which} seed=3,4": "more seeds; finished runs are not run again",
        f"{launch} layers.layer={which} mask=active": "another option beside it",
        f"{launch} layers.layer={which} resume=force": "again from the start",
        see: f"all runs in {where}",
    }
    if (row := read_row(sweep)) is not None and has_answers(row.runs[0]):
        place = folder if folder.parent == Path("outputs") else row.runs[0].path.parent
        lines[f"python -m crl_exp show {shlex.quote(str(place / row.runs[0].key))} --fixed"] = (
            "answers that came right"
        )
    width = max(map(len, list(lines)[:3]))
    return [f"{line:<{width}}  # {why}" for line, why in lines.items()]


def where_all_are(tracking: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """What to type to see a sweep's runs side by side, and where that is."""
    if not tracking["enabled"]:
        return f"python -m crl_exp sync {folder}", "MLflow"
    if (place := wandb_target(tracking)) is not None:
        online = place.mode == "online"
        return f"python -m crl_exp sync {folder}" if online else sync_line([folder]), "wandb"
    uri = resolved_uri(tracking["uri"], folder.parent)
    see = f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    return see, "MLflow"


def attach(records: list[Record], folder: Path) -> None:
    """Log the report wherever the sweep's runs are logged; wandb isn't given it."""
    sections = [record.config["tracking"] for record in records]
    sections = [section for section in sections if wandb_target(section) is None]
    places = {(section["uri"], section["experiment"]): section for section in sections}
    for section in places.values():
        count = attach_report(folder, section)
        if count is not None:
            where = resolved_uri(section["uri"], folder.absolute().parent)
            log.info("%d new files of the report logged to the sweep's run in %s", count, where)


def main(argv: list[str]) -> int:
    """`python -m crl_exp report SWEEP_OR_DIR… [--output-dir DIR]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp report",
        description="Compare a sweep's runs: table, CSV and figures in outputs/SWEEP/report/. Of "
        "several sweeps: their rows against each other, in outputs/comparisons/A+B/.",
    )
    parser.add_argument(
        "sweep", nargs="+", help="name of a sweep in the output folder, or its folder; or several"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument(
        "--by", metavar="KEY", action="append", default=[],
        help="report runs that differ in this key of the config (model.dtype) apart; may be given "
        "several times. Tasks, models and SAE releases always are",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    log.setLevel(logging.INFO)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if len(arguments.sweep) > 1:
        return report_sweeps(arguments.sweep, arguments.output_dir, tuple(arguments.by), console)
    folder = find_sweep(arguments.sweep[0], arguments.output_dir)
    records = find_records(folder)
    parts = compare_parts(records, tuple(arguments.by))
    # The files first: whatever a terminal can't show, they are whole.
    written = write_report(parts, folder / "report")
    tables.print_parts(parts, console)
    console.print("\nwritten:")
    here = [path for path in written if path.parent == folder / "report"]
    for path in here:
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)
    if len(here) < len(written):
        console.print(f"  and {len(written) - len(here)} files in folders there, one for each part")
    attach(records, folder)
    console.print("to type next:")
    for line in next_lines(parts.parts[0].sweep, folder):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return 0
