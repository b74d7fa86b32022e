"""How all figures of a report look: type of 9 pt in print, colours that everyone tells apart."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_exp.report.comparison.estimates import split
from crl_exp.report.comparison.rows import Row, SweepComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_INCHES = 3.5  # a column of a two-column paper
PAGE_INCHES = 7.0
MANY = 9  # names in a legend; with more a figure by layer is as wide as the page
LEGEND_CHARACTERS = 42  # that fit it
LEAST_PANEL_INCHES = 1.2  # title and ticks included
# Okabe and Ito's palette, which colour-blind readers tell apart; black is kept for axes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ((0, (1, 1.5)), (0, (5, 2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
FIXED_COLOURS = {"crl": 0, "corrsteer_s": 1, "corrsteer_a": 2, "corrsteer_p": 3, "random": 6}
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "legend.fontsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "savefig.dpi": 300, "figure.dpi": 150, "legend.frameon": False,
    "axes.linewidth": 0.8, "lines.linewidth": 1.4, "figure.constrained_layout.use": True,
    "pdf.fonttype": 42, "text.parse_math": False,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def look(sweep: SweepComparison) -> dict[str, tuple[str, str]]:
    return look_of(sweep.rows)


def look_of(
    rows: Iterable[Row], called: Callable[[Row], str] = lambda row: row.family
) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family. A method's first family has the method's own, the others
    what is free; shuffled labels look like the method's first (and are drawn hollow).

    called: what rows are told apart by, where it isn't the family.
    """
    families: dict[str, Row] = {}
    for row in rows:
        families.setdefault(called(row), row)
    # Kept for the methods that are there, whichever comes first.
    kept = {row.method: FIXED_COLOURS[row.method] for row in families.values()
            if row.method in FIXED_COLOURS}  # fmt: skip
    free = _free_pairs(set(kept.values()))
    firsts: dict[str, tuple[str, str]] = {}
    looks: dict[str, tuple[str, str]] = {}
    for family, row in families.items():
        first = firsts.get(row.method)
        if first is None and row.method in kept:
            number = kept[row.method]
            looks[family] = COLOURS[number], MARKERS[number]
        elif first is not None and row.shuffled:
            looks[family] = first
        else:
            looks[family] = next(free)
        firsts.setdefault(row.method, looks[family])
    return looks


def _free_pairs(taken: set[int]) -> Iterator[tuple[str, str]]:
    """Pairs of colour and marker: each colour not taken with its own marker, then each colour with
    each other marker: no two of 49 are the same."""
    n = len(COLOURS)
    # Other methods' colours last, so that what isn't here yet is rarely mistaken for them.
    order = sorted(range(n), key=lambda number: number in FIXED_COLOURS.values())
    for shift in count():
        for number in order:
            if shift or number not in taken:
                yield COLOURS[number], MARKERS[(number + shift) % n]


def panel_title(sweep: SweepComparison, name: str | None) -> str:
    result = sweep.first.result
    assert result is not None
    n = split(sweep.first, name)["n"]
    what = f"{result['task']}, {result['model']}" if name is None else f"{name} prompts"
    return f"{what}, n = {n:,}"


def delta_name(sweep: SweepComparison) -> str:
    return f"Δ {'refused' if 'benign' in sweep.test_sets else 'accuracy'} (points)"


def sign_of(name: str | None) -> int:
    """A benign prompt is scored 1 where it was answered; refusals are shown."""
    return -1 if name == "benign" else 1


def mean_in_points(row: Row, name: str | None) -> float:
    return sign_of(name) * 100 * row.mean("delta", name)


def in_points(interval: tuple[float, float], name: str | None) -> tuple[float, float]:
    low, high = sorted(sign_of(name) * 100 * end for end in interval)
    return low, high


def wrapped(label: str, characters: int = LEGEND_CHARACTERS, indent: str = "  ") -> str:
    """A label over as many lines as it needs, broken at spaces and after commas."""
    mark = "\0 "  # a place to break that is no space of the label's own
    text = textwrap.fill(
        label.replace(",", f",{mark}"), characters, subsequent_indent=indent, break_long_words=False
    )
    return text.replace(mark, "").replace("\0", "")


def legend_below(figure: Figure, axes: np.ndarray, columns: int) -> None:
    """One legend for all panels; points before lines. A figure that it would leave too little of
    grows by what is missing."""
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    # Error bars are containers, all else is lines; sorting is stable.
    ordered = sorted(found.items(), key=lambda item: isinstance(item[1], Line2D))
    labels = [wrapped(label) for label, _ in ordered]
    handles = [handle for _, handle in ordered]
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    height = legend.get_window_extent().height / figure.dpi
    figure.set_figheight(
        max(figure.get_figheight(), height + LEAST_PANEL_INCHES * axes.shape[0] + 0.4)
    )


def save(figure: Figure, paths: tuple[Path, ...]) -> bool:
    """Save under each name and close. The same figure gives the same file."""
    import matplotlib.pyplot as plt

    for path in paths:
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return True
