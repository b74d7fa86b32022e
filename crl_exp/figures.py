"""A sweep's figures: what each layer gains, and the training curves. Type is 9 pt in print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_exp.comparison import Row, SweepComparison, split
from crl_exp.records import Record
from crl_exp.tables import layers_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_INCHES = 3.5  # a column of a two-column paper
PAGE_INCHES = 7.0
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
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def look(sweep: SweepComparison) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family: the method's own, further families of it the next free."""
    taken: dict[str, int] = {}
    for family, rows in sweep.families.items():
        wanted = FIXED_COLOURS.get(rows[0].method, len(FIXED_COLOURS))
        if wanted in taken.values() and not rows[0].shuffled:
            free = [i for i in range(len(COLOURS)) if i not in taken.values()]
            wanted = free[0] if free else len(taken) % len(COLOURS)
        taken[family] = wanted
    return {family: (COLOURS[i], MARKERS[i]) for family, i in taken.items()}


def by_layer(sweep: SweepComparison, path: Path) -> None:
    """Difference to the unsteered model by steered layer, a panel for each test set."""
    sets: list[str | None] = [None, *sweep.test_sets]
    import matplotlib.pyplot as plt

    with style():
        entries = sum(row.method != "none" for row in sweep.rows if len(row.layers) > 1)
        entries += len({row.family for row in sweep.rows if len(row.layers) == 1})
        height = (2.5 if len(sets) == 1 else 2.0) * len(sets) + 0.6 + 0.2 * entries
        figure, axes = plt.subplots(
            len(sets), 1, figsize=(COLUMN_INCHES, height), sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis, name in zip(axes[:, 0], sets, strict=True):
            _layer_panel(axis, sweep, name)
            axis.set_title(_panel_title(sweep, name))
        axes[-1, 0].set_xlabel("steered layer")
        _legend_below(figure, axes, columns=1)
        figure.savefig(path)
        plt.close(figure)


def _panel_title(sweep: SweepComparison, name: str | None) -> str:
    result = sweep.first.result
    assert result is not None
    n = split(sweep.first, name)["n"]
    what = f"{result['task']}, {result['model']}" if name is None else f"{name} prompts"
    return f"{what}, n = {n:,}"


def _layer_panel(axis: Axes, sweep: SweepComparison, name: str | None) -> None:
    from matplotlib.ticker import MaxNLocator

    single = [r for r in sweep.rows if len(r.layers) == 1 and r.method != "none"]
    several = [r for r in sweep.rows if len(r.layers) > 1 and r.method != "none"]
    layers = sorted({layer for row in (*single, *several) for layer in row.layers})
    axis.axhline(0, color="black", linewidth=0.8)
    looks = look(sweep)
    for i, row in enumerate(several):
        low, high = _in_points(row.interval(name), name)
        colour = looks[row.family][0]
        together = list(row.layers) == layers
        which = f"all {len(layers)} layers" if together else f"layers {layers_text(row.layers)}"
        axis.axhline(
            _mean(row, name), color=colour, linestyle=DASHES[i % len(DASHES)],
            label=f"{row.family}, {which}",
        )  # fmt: skip
        axis.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
    families = list(dict.fromkeys(row.family for row in single))
    gap = min(np.diff(layers), default=1)
    for i, family in enumerate(families):
        shift = gap * 0.13 * (i - (len(families) - 1) / 2)
        rows = [r for r in single if r.family == family]
        _layer_points(axis, rows, name, shift, looks[family])
        for row in sweep.chosen.intersection(rows):
            axis.plot(
                row.layers[0] + shift, _mean(row, name), "o", color="black", markersize=9.5,
                markerfacecolor="none", markeredgewidth=0.9, label="chosen on validation",
            )  # fmt: skip
    axis.set_xticks(layers)
    axis.margins(x=0.06)
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    refusal = "benign" in sweep.test_sets
    axis.set_ylabel("Δ refused (points)" if refusal else "Δ accuracy (points)")


def _layer_points(
    axis: Axes, rows: list[Row], name: str | None, shift: float, look_of: tuple[str, str]
) -> None:
    """One family: means with intervals, and every seed as a small dot."""
    colour, marker = look_of
    x = np.array([row.layers[0] for row in rows]) + shift
    mean = np.array([_mean(row, name) for row in rows])
    ends = np.array([_in_points(row.interval(name), name) for row in rows])
    hollow = rows[0].shuffled
    axis.errorbar(
        x, mean, yerr=[np.maximum(mean - ends[:, 0], 0), np.maximum(ends[:, 1] - mean, 0)],
        color=colour, marker=marker, markersize=5, markerfacecolor="white" if hollow else colour,
        linestyle="none" if rows[0].control else "-", linewidth=0.8, elinewidth=1.2, capsize=2,
        label=rows[0].family, zorder=3,
    )  # fmt: skip
    for at, row in zip(x, rows, strict=True):
        if len(row.runs) > 1:
            seeds = _sign(name) * 100 * row.values("delta", name)
            beside = np.full(len(seeds), at + 0.02 * np.ptp(axis.get_xlim()))
            axis.plot(beside, seeds, "o", color=colour, markersize=2.2, markeredgewidth=0)


def _sign(name: str | None) -> int:
    """A benign prompt is scored 1 where it was answered; refusals are shown."""
    return -1 if name == "benign" else 1


def _mean(row: Row, name: str | None) -> float:
    return _sign(name) * 100 * row.mean("delta", name)


def _in_points(interval: tuple[float, float], name: str | None) -> tuple[float, float]:
    low, high = sorted(_sign(name) * 100 * end for end in interval)
    return low, high


def _legend_below(figure: Figure, axes: np.ndarray, columns: int) -> None:
    """One legend for all panels; points before lines."""
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    # Error bars are containers, all else is lines; sorting is stable.
    ordered = sorted(found.items(), key=lambda item: isinstance(item[1], Line2D))
    names, handles = zip(*ordered, strict=True)
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def training(sweep: SweepComparison, path: Path) -> bool:
    """Reward by update, a panel for each layer set. Returns whether there was any journal."""
    rows = [row for row in sweep.rows if any(run.journal for run in row.runs)]
    if not rows:
        return False
    import matplotlib.pyplot as plt

    panels = sorted({row.layers for row in rows}, key=lambda la: (len(la), la))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    width = PAGE_INCHES if columns == 3 else COLUMN_INCHES * columns
    looks = look(sweep)
    with style():
        figure, axes = plt.subplots(
            lines, columns, figsize=(width, 1.9 * lines + 0.9), sharex=True, sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, layers in zip(axes.flat, panels, strict=False):
            here = [row for row in rows if row.layers == layers]
            for row in here:
                _curves(axis, row, looks[row.family][0])
            floor = 100 * float(here[0].values("accuracy_baseline", "validation").mean())
            axis.axhline(
                floor, color="black", linewidth=0.8, linestyle=":", label="unsteered, validation"
            )
            axis.set_title(f"layer{'s' if len(layers) > 1 else ''} {layers_text(layers)}")
            axis.tick_params(labelbottom=True, labelleft=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("mean reward × 100")
        for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("update of the policy")
        _legend_below(figure, axes, columns=2)
        figure.savefig(path)
        plt.close(figure)
    return True


def _curves(axis: Axes, row: Row, colour: str) -> None:
    """Validation, mean and range over seeds; the rollouts' reward, mean over seeds, pale."""
    hollow, dash = ("white", "--") if row.shuffled else (colour, "-")
    step, reward = _series(row.runs, "reward")
    axis.plot(step, reward.mean(0), color=colour, alpha=0.35, linewidth=0.8, linestyle=dash,
              label=f"{row.family}, rollouts")  # fmt: skip
    step, reward = _series(row.runs, "validation_reward")
    if not len(step):
        return
    axis.fill_between(step, reward.min(0), reward.max(0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(step, reward.mean(0), color=colour, marker="o", markersize=3, markerfacecolor=hollow,
              linestyle=dash, label=f"{row.family}, validation")  # fmt: skip


def _series(runs: tuple[Record, ...], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric's steps [T] that all seeds have, and its values × 100 [S, T]."""
    found = [
        {line["step"]: line["metrics"][name] for line in run.journal if name in line["metrics"]}
        for run in runs
        if run.journal
    ]
    steps = sorted(set.intersection(*[set(values) for values in found]))
    return np.array(steps), 100 * np.array([[v[s] for s in steps] for v in found])
