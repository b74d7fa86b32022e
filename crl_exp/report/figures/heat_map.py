"""A heat map of what steering gains, where layers and options vary together, or two options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crl_exp.config.display import number, undefined
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.figures.style import COLUMN_INCHES, PAGE_INCHES, save, style, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FULL_ENOUGH = 0.75  # of the cells: options that weren't crossed make no map
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Grid:
    """One method's rows by two things that vary. cells: by (y, x)."""

    title: str
    x_name: str
    xs: tuple[str, ...]
    ys: tuple[str, ...]
    cells: dict[tuple[str, str], Row]


def grids(sweep: SweepComparison) -> list[Grid]:
    """A grid for each method that was crossed: layer × options, else option × option."""
    methods: dict[str, list[Row]] = {}
    for row in sweep.rows:
        if not row.unsteered and not row.alternatives:
            methods.setdefault(row.label.name, []).append(row)
    found = [_layers_by_option(name, rows) or _options(name, rows) for name, rows in
             methods.items()]  # fmt: skip
    return [grid for grid in found if grid is not None]


def _layers_by_option(name: str, rows: list[Row]) -> Grid | None:
    rows = [row for row in rows if row.single]
    layers = sorted({row.layers[0] for row in rows})
    options = set_apart(rows)
    ys = tuple(dict.fromkeys(options.values()))
    if len(layers) < 2 or len(ys) < 2:
        return None
    cells = {(options[row], str(row.layers[0])): row for row in rows}
    return Grid(name, "steered layer", tuple(map(str, layers)), ys, cells)


def _options(name: str, rows: list[Row]) -> Grid | None:
    """Two keys that all rows have; of several such pairs the first that was fully crossed."""
    if len({row.layers for row in rows}) > 1:
        return None
    settings = [dict(row.label.settings) for row in rows]
    shared = [key for key in settings[0] if all(key in other for other in settings)]
    for i, y_key in enumerate(shared):
        for x_key in shared[i + 1 :]:
            xs = tuple(dict.fromkeys(mine[x_key] for mine in settings))
            ys = tuple(dict.fromkeys(mine[y_key] for mine in settings))
            pairs = [(mine[y_key], mine[x_key]) for mine in settings]
            crossed = len(set(pairs)) == len(rows) >= FULL_ENOUGH * len(xs) * len(ys)
            if crossed and min(len(xs), len(ys)) > 1:
                named = tuple(f"{y_key}={y}" for y in ys)
                cells = {(f"{y_key}={y}", x): r for (y, x), r in zip(pairs, rows, strict=True)}
                return Grid(name, x_key, xs, named, cells)
    return None


def set_apart(rows: list[Row]) -> dict[Row, str]:
    """Each row's options, the usual ones too: `fusion=add` beside `fusion=multiply`."""
    said = {key for row in rows for key, _ in row.label.said}
    return {
        row: " ".join(f"{key}={value}" for key, value in row.label.settings if key in said)
        for row in rows
    }


def heat_map(sweep: SweepComparison, paths: tuple[Path, ...]) -> bool:
    """Difference in points, a panel for each method; bold where Holm's p is below 0.05."""
    found = grids(sweep)
    if not found:
        return False
    import matplotlib.pyplot as plt

    widest = max(len(grid.xs) for grid in found)
    width = COLUMN_INCHES if widest <= 3 else PAGE_INCHES
    lines = [sum(1 + wrapped(y).count("\n") for y in grid.ys) for grid in found]
    heights = [0.24 * max(n, len(grid.ys)) + 0.75 for n, grid in zip(lines, found, strict=True)]
    sizes = [abs(100 * r.mean("delta")) for grid in found for r in grid.cells.values()]
    largest = max((size for size in sizes if not undefined(size)), default=0.0)
    with style():
        figure, axes = plt.subplots(
            len(found), 1, figsize=(width, max(sum(heights) + 0.1, 1.5)), squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        for axis, grid in zip(axes[:, 0], found, strict=True):
            image = _panel(axis, sweep, grid, max(largest, 1.0))
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
        bar.set_label("Δ (points)")
        return save(figure, paths)


def _panel(axis: Axes, sweep: SweepComparison, grid: Grid, largest: float) -> AxesImage:
    values = np.full((len(grid.ys), len(grid.xs)), np.nan)
    for (y, x), row in grid.cells.items():
        values[grid.ys.index(y), grid.xs.index(x)] = 100 * row.mean("delta")
    axis.set_facecolor("#dddddd")
    image = axis.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for (y, x), row in grid.cells.items():
        i, j = grid.ys.index(y), grid.xs.index(x)
        strong = abs(values[i, j]) > 0.55 * largest
        axis.text(
            j, i, number(values[i, j], "+.1f").replace("-", "−"), ha="center", va="center",
            color="white" if strong else "black",
            fontweight="bold" if sweep.p_holm[row] < SIGNIFICANT else "normal",
        )  # fmt: skip
    axis.set_xticks(range(len(grid.xs)), grid.xs)
    axis.set_yticks(range(len(grid.ys)), [wrapped(y) for y in grid.ys])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(grid.x_name)
    axis.set_title(grid.title)
    return image
