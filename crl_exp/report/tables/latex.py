"""A sweep's tables as LaTeX, with booktabs' rules: `\\input{table.tex}` in a paper."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from crl_exp.report.comparison.rows import SweepComparison
from crl_exp.report.parts import SweepParts
from crl_exp.report.tables.cells import (
    COLUMNS,
    OVERVIEW_NOTE,
    FurtherTable,
    main_cells,
    matrix,
    overview_cells,
    overview_columns,
    set_cells,
    set_columns,
    set_title,
    title,
)
from crl_exp.report.tables.further import further_tables
from crl_exp.report.tables.notes import notes

HEAD = "% Needs \\usepackage{booktabs,graphicx}. Made by `python -m crl_exp report`.\n"
SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "|": r"\textbar{}", "Δ": r"$\Delta$", "→": r"$\to$", "–": "--",
    "…": r"\dots{}", "−": "$-$", "×": r"$\times$", "≥": r"$\ge$", "≤": r"$\le$",
    "◀": r"$\triangleleft$", "±": r"$\pm$", "γ": r"$\gamma$", "ε": r"$\varepsilon$",
}  # fmt: skip


def escape(text: str) -> str:
    """Text as LaTeX sets it. A minus before a number is one, not a hyphen."""
    found = []
    for i, char in enumerate(text):
        before = text[i - 1] if i else " "
        if char == "-" and before in " [" and text[i + 1 : i + 2].isdigit():
            found.append("$-$")
        else:
            found.append(SPECIAL.get(char, char))
    return "".join(found)


def latex(sweep: SweepComparison, label: str) -> str:
    """The table by method and layer, and that of the test sets where there are several.

    label: after `tab:`.
    """
    rows = [main_cells(sweep, row) for row in sweep.rows]
    found = [_table(COLUMNS, rows, [title(sweep) + ".", *notes(sweep)], label)] if rows else []
    if sweep.test_sets:
        cells = [set_cells(sweep, row) for row in sweep.rows]
        found.append(_table(set_columns(sweep), cells, [set_title(sweep) + "."], f"{label}-sets"))
    return HEAD + "\n".join([*found, *_further(further_tables(sweep), label)])


def latex_of_tables(tables: Sequence[FurtherTable], label: str) -> str:
    """label: after `tab:`."""
    return HEAD + "\n".join(_further(tables, label))


def _further(tables: Sequence[FurtherTable], label: str) -> list[str]:
    return [
        _table(more.columns, more.lines, [more.title + ".", *more.notes], f"{label}-{more.slug}",
               more.n_left)
        for more in tables
    ]  # fmt: skip


def latex_of_parts(parts: SweepParts) -> str:
    """Methods by part, and the same as one line each with seeds, n and layers."""
    head, lines = matrix(parts)
    what = "Accuracy in %, below it the difference to the unsteered model in points, with 95 % "
    caption = [f"{parts.name}. {what}intervals.", OVERVIEW_NOTE]
    return HEAD + "\n".join(
        [
            _table(head, lines, caption, f"{parts.name}-matrix", n_left=1),
            _table(
                overview_columns(parts), overview_cells(parts), caption[1:], f"{parts.name}-rows",
                n_left=len(parts.keys) + 2,
            ),
        ]
    )  # fmt: skip


def _table(
    columns: Sequence[str], rows: list[list[str]], caption: Sequence[str], label: str,
    n_left: int = 2,
) -> str:  # fmt: skip
    """A floating table over both columns, shrunk where it is wider than the page. Lines that begin
    alike are set as a group. n_left: columns of text, the others are of numbers."""
    layout = "l" * n_left + "r" * (len(columns) - n_left)
    body: list[str] = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        if body and not body[-1].startswith("\\addlinespace"):
            body.append("\\addlinespace")
        for i, row in enumerate(group):
            body += _lines(["" if i and column == 0 else c for column, c in enumerate(row)])
    head = " & ".join(escape(column) for column in columns)
    parts = [
        "\\begin{table*}", "\\centering",
        f"\\caption{{{' '.join(escape(text) for text in caption)}}}",
        f"\\label{{tab:{_label(label)}}}",
        "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{@{{}}{layout}@{{}}}}", "\\toprule", f"{head} \\\\", "\\midrule",
        *body, "\\bottomrule", "\\end{tabular}}", "\\end{table*}", "",
    ]  # fmt: skip
    return "\n".join(parts)


def _lines(row: Sequence[str]) -> list[str]:
    """A row; cells of two lines are set as two rows, the second one small."""
    split = [cell.split("\n") for cell in row]
    height = max(map(len, split))
    found = []
    for i in range(height):
        cells = [escape(cell[i]) if i < len(cell) else "" for cell in split]
        if i:
            cells = [f"{{\\scriptsize {cell}}}" if cell else "" for cell in cells]
        found.append(" & ".join(cells) + " \\\\")
    return found


def _label(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text)
