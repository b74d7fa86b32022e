"""Draws token_by_layer.png of docs/method.md: which token and layer is read, and where is added.

`python docs/figures/token_by_layer.py [FILE]`
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from crl_exp.report.figures.style import COLOURS, PAGE_INCHES, style

READS, ADDS, KEPT = COLOURS[0], COLOURS[1], "0.93"
TOKENS = ("<user>", "Is", "17", "odd?", "<model>", "Yes", ",", "it")
LAST_PROMPT = 4  # place of t = 0
LAYERS = ("embedding", "layer 0", "…", "layer ℓ − 1", "layer ℓ", "…", "layer m", "…", "logits")
STEERED = {4: "ℓ", 6: "m"}
STEP = 1.35  # of a token, in units of a layer


def draw(axes: Axes) -> None:
    width, height = (len(TOKENS) - 1) * STEP, len(LAYERS) - 1
    steered = LAST_PROMPT * STEP
    # What is the same whatever is steered: all of the prompt before its last token, and at that
    # one everything below the first steered layer's output.
    kept = {"color": KEPT, "zorder": 0, "linewidth": 0}
    first = min(STEERED)
    axes.add_patch(Rectangle((-0.62, -0.75), steered - 0.05, height + 1.1, **kept))
    axes.add_patch(Rectangle((steered - 0.67, -0.75), 1.34, first + 0.4, **kept))
    for i, token in enumerate(TOKENS):
        x = i * STEP
        axes.annotate(
            "", (x, height - 0.1), (x, -0.1),
            arrowprops={"arrowstyle": "-|>", "color": "0.45", "linewidth": 1.1}, zorder=1,
        )  # fmt: skip
        axes.text(x, -0.5, token, ha="center", va="center")
        if i >= LAST_PROMPT:
            axes.text(x, -1.2, f"t = {i - LAST_PROMPT}", ha="center", va="center")
            for layer in STEERED:
                _steer(axes, x, layer)
            if i + 1 < len(TOKENS):
                axes.annotate(
                    "", ((i + 1) * STEP - 0.1, -0.15), (x + 0.1, height + 0.05),
                    arrowprops={"arrowstyle": "-|>", "color": "0.75", "linestyle": (0, (3, 2)),
                                "connectionstyle": "arc3,rad=-0.12"}, zorder=0.5,
                )  # fmt: skip
    for y, layer in enumerate(LAYERS):
        bold = "bold" if y in STEERED else "normal"
        axes.text(-0.85, y, layer, ha="right", va="center", fontweight=bold)
    axes.text(
        (steered - 0.67) / 2 - 0.31, height + 0.75, "read once, kept for all policies", ha="center"
    )
    axes.text((steered + width) / 2, height + 0.75, "steered, reward at the end", ha="center")
    axes.set(xlim=(-3.1, width + 0.9), ylim=(-2.8, height + 1.2))
    axes.axis("off")
    _legend(axes)


def _steer(axes: Axes, x: float, y: float) -> None:
    """What reads stands just below what adds: at the layer's output, before the next layer."""
    axes.plot(x, y - 0.2, "o", color=READS, markersize=5.5, zorder=3)
    axes.plot(x, y + 0.2, "P", color=ADDS, markersize=7.5, zorder=3)
    box = FancyBboxPatch(
        (x + 0.22, y - 0.24), 0.46, 0.48, boxstyle="round,pad=0.02", facecolor="white",
        edgecolor="0.4", linewidth=0.7, zorder=2,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(x + 0.45, y, "π", ha="center", va="center", zorder=4)
    for begin, end, colour in (
        ((x + 0.05, y - 0.2), (x + 0.24, y - 0.12), READS),
        ((x + 0.24, y + 0.12), (x + 0.05, y + 0.2), ADDS),
    ):
        arrow = {"arrowstyle": "-|>", "color": colour, "mutation_scale": 6, "shrinkA": 0}
        axes.annotate("", end, begin, arrowprops=arrow, zorder=3)


def _legend(axes: Axes) -> None:
    lines = (
        (READS, "o", "reads the residual x: the SAE's encoder (stage 1), policy and critic (CRL)"),
        (
            ADDS,
            "P",
            "adds a decoder row: the same at every token (CorrSteer), or the policy's (CRL)",
        ),
    )
    for i, (colour, marker, text) in enumerate(lines):
        y = -1.85 - 0.6 * i
        axes.plot(-2.2, y, marker, color=colour, markersize=7)
        axes.text(-1.9, y, text, va="center")


def main(target: Path) -> None:
    with style():
        figure, axes = plt.subplots(figsize=(PAGE_INCHES, 5.2))
        draw(axes)
        figure.savefig(target, dpi=200)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png")))
