"""The folder that a report is written into. A report made again leaves nothing of the last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crl_exp.config.display import plain
from crl_exp.config.files import write_atomic
from crl_exp.report.drawn import Drawn

# What a report may write; nothing else in its folder is ever removed.
TEXTS = (
    "table.md", "table.csv", "table.tex", "overview.csv", "features.csv", "items.csv",
    "by_layer.csv", "pairs.csv", "ladder.csv", "groups.csv", "analyses.csv", "report.html",
)  # fmt: skip
FIGURE_NAMES = (
    "ladder", "by_layer", "by_option", "by_labels", "heat_map", "training", "overlap", "diversity",
    "correlation", "analyses", "overview", "sweeps",
)  # fmt: skip
SUFFIXES = (".png", ".pdf")  # for the screen and for a paper


class Files:
    """Writes into a folder and the folders in it, and knows what it wrote."""

    def __init__(self, folder: Path, drawn: Drawn, written: list[Path] | None = None):
        self.folder, self.drawn = folder, drawn
        self.written: list[Path] = [] if written is None else written
        folder.mkdir(parents=True, exist_ok=True)

    def inside(self, name: str) -> Files:
        return Files(self.folder / name, self.drawn, self.written)

    def text(self, name: str, text: str) -> None:
        assert name in TEXTS
        write_atomic(self.folder / name, plain(text))
        self.written.append(self.folder / name)

    def figure(
        self, name: str, draw: Callable[[Any, tuple[Path, ...]], bool], of: Any, made_of: str
    ) -> Path | None:
        """`draw` saves a figure of something into all paths, or returns False where there is
        nothing to show. One of the same `made_of` (a digest) that is there isn't drawn again.
        Returns the PNG."""
        assert name in FIGURE_NAMES
        paths = tuple(self.folder / f"{name}{suffix}" for suffix in SUFFIXES)
        shown = self.drawn.is_there(paths, made_of)
        if shown is None:
            shown = draw(of, paths)
            self.drawn.note(paths, made_of, shown)
        if not shown:
            return None
        self.written += paths
        return paths[0]

    def remove_others(self) -> None:
        """Remove what an earlier report wrote here and this one didn't."""
        known = {*TEXTS, *(name + suffix for name in FIGURE_NAMES for suffix in SUFFIXES)}
        for path in self.folder.rglob("*"):
            if path.name in known and path.is_file() and path not in self.written:
                path.unlink()
        for path in self.folder.iterdir():
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
