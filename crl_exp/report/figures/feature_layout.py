"""Where in a figure of features each row's runs are drawn: by layer, or row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from crl_exp.report.comparison.feature_use import LayerUse, layer_uses, learned
from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.report.figures.style import look, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_CHARACTERS = 34


@dataclass(frozen=True)
class Mark:
    """Where one row's runs at one layer are drawn. at: along the axis of layers or rows."""

    at: float
    uses: tuple[LayerUse, ...]
    colour: str
    marker: str
    hollow: bool
    name: str


@dataclass(frozen=True)
class Axis:
    """What runs along a figure: layers to the right, or, where there is one layer, rows down."""

    places: tuple[Mark, ...]
    ticks: dict[float, str]
    down: bool

    def set_up(self, axis: Axes, value_name: str) -> None:
        at, names = list(self.ticks), list(self.ticks.values())
        if self.down:
            axis.set_yticks(at, names)
            axis.set_ylim(max(at) + 0.5, min(at) - 0.5)
            axis.set_xlabel(value_name)
        else:
            axis.set_xticks(at, names)
            axis.margins(x=0.06)
            axis.set_ylabel(value_name)

    def ordered(self, at: Any, value: Any) -> tuple[Any, Any]:
        return (value, at) if self.down else (at, value)


def laid_out(sweep: SweepComparison) -> Axis | None:
    """Places of all rows with a trained policy; None where there is none."""
    rows = learned(sweep)
    if not rows:
        return None
    looks = look(sweep)
    layers = sorted({layer for row in rows for layer in layer_uses(row)})
    families = list(dict.fromkeys(_name(row) for row in rows))
    if len(layers) < 2:
        places = [
            _place(float(i), uses, row, looks[row.family])
            for i, row in enumerate(rows)
            for uses in layer_uses(row).values()
        ]
        names = {float(i): wrapped(row.family, LABEL_CHARACTERS) for i, row in
                 enumerate(rows)}  # fmt: skip
        return Axis(tuple(places), names, down=True)
    gap = float(min(np.diff(layers)))
    step = min(0.3, 0.75 / len(families)) * gap
    places = []
    for row in rows:
        shift = step * (families.index(_name(row)) - (len(families) - 1) / 2)
        for layer, uses in layer_uses(row).items():
            places.append(_place(layer + shift, uses, row, looks[row.family]))
    return Axis(tuple(places), {float(layer): str(layer) for layer in layers}, down=False)


def _name(row: Row) -> str:
    together = len(row.layers) > 1 and not row.alternatives
    return f"{row.family}, {len(row.layers)} layers together" if together else row.family


def _place(at: float, uses: list[LayerUse], row: Row, look_of: tuple[str, str]) -> Mark:
    return Mark(at, tuple(uses), *look_of, row.shuffled, _name(row))
