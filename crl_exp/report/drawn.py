"""Which figures are there already, drawn from the same files by the same code.

A figure is left as it is where nothing that it may be made of changed: the contents of every run
directory of its part, the code of this package and of what it is made with, `conf/` (which names
options) and a matplotlibrc, and where the file itself is the one that was drawn. Else it is drawn
again. Kept in a hidden folder beside the runs; without it, or where it is damaged, all are drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json, sha256_of, write_atomic
from crl_exp.config.paths import REPO
from crl_exp.report.figures.style import STYLE
from crl_exp.report.parts import ReportPart, SweepParts
from crl_exp.runs.records import Record

log = logging.getLogger(__name__)
KEPT = Path(".cache", "figures.json")
"""In a sweep's folder."""
MADE_OF = ("config.yaml", "result.json", "features.json", "items.parquet", "interventions.parquet",
           "journal.jsonl")  # fmt: skip
"""What of a run directory figures are made of."""
PACKAGES = ("analysis", "config", "report", "runs")
LIBRARIES = ("matplotlib", "numpy", "scipy", "pyarrow", "pillow")


class Drawn:
    """What an earlier report drew into `folder`. To be made before anything is drawn, and `save`d
    once all is."""

    def __init__(self, folder: Path, parts: SweepParts, home: Path | None = None):
        """home: where what was drawn is noted; by default the sweep's folder, which `folder` is
        in."""
        self.folder, self.path = folder, (home or folder.parent) / KEPT
        self.parts = parts
        self.known = self._read()
        self.now: dict[str, dict[str, Any]] = {}
        self.before = {run.path: _stats(run) for part in parts.parts for run in runs_of(part)}
        self.digests = {path: _digest_of(path) for path in self.before}

    def of(self, part: ReportPart) -> str:
        """A digest of all that a part's figures are made of."""
        runs = [self.digests[run.path] for run in runs_of(part)]
        labels = [row.label for row in part.sweep.rows]
        return _text_digest(
            [code_digest(), json.dumps(STYLE), repr(part.names), repr(labels), *runs]
        )

    @cached_property
    def of_all(self) -> str:
        return _text_digest([self.parts.name, *map(self.of, self.parts.parts)])

    def is_there(self, paths: Sequence[Path], made_of: str) -> bool | None:
        """Whether a figure was drawn (True) or there was nothing to show (False), of the same;
        None where it has to be drawn."""
        name = self._name(paths)
        entry = self.known.get(name)
        if not isinstance(entry, dict) or entry.get("made_of") != made_of:
            return None
        files = entry.get("files")
        if not isinstance(files, dict) or (files and files != _digests(paths)):
            return None
        self.now[name] = entry
        return bool(files)

    def note(self, paths: Sequence[Path], made_of: str, shown: bool) -> None:
        files = _digests(paths) if shown else {}
        self.now[self._name(paths)] = {"made_of": made_of, "files": files}

    def save(self) -> None:
        """Keep what is there now; nothing where a run was written to meanwhile."""
        if self.now == self.known or self.before != {
            run.path: _stats(run) for part in self.parts.parts for run in runs_of(part)
        }:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_atomic(self.path, json.dumps(self.now, indent=1) + "\n")
        except (OSError, UserError) as error:
            log.warning("%s can't be written (%s): figures are drawn anew each time", self.path,
                        error)  # fmt: skip

    def _name(self, paths: Sequence[Path]) -> str:
        return str(paths[0].relative_to(self.folder).with_suffix(""))

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path, "all figures are drawn anew") or {}
        except UserError as error:
            log.warning("%s", error)
            return {}


def runs_of(part: ReportPart) -> Iterable[Record]:
    yield from (run for row in part.sweep.rows for run in row.runs)
    yield from (one.run for one in part.sweep.analyses)


def _stats(run: Record) -> list[tuple[str, int, int]]:
    found = []
    for name in MADE_OF:
        try:
            stat = os.stat(run.path / name)
        except FileNotFoundError:
            continue
        found.append((name, stat.st_size, stat.st_mtime_ns))
    return found


def _digest_of(run: Path) -> str:
    """Of what figures may be made of, and of what the run is called."""
    parts = [run.parent.name, run.name]
    for name in MADE_OF:
        path = run / name
        parts.append(sha256_of(path) if path.exists() else "")
    return _text_digest(parts)


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    return {path.suffix: sha256_of(path) for path in paths if path.exists()}


def _text_digest(texts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Of all that decides how a figure looks and isn't in a run directory."""
    package = Path(__file__).parents[1]
    files = [path for name in PACKAGES for path in sorted((package / name).rglob("*.py"))]
    files += [*sorted((REPO / "conf").rglob("*.yaml")), *filter(Path.is_file, _style_files())]
    made_with = [sys.version, *map(version, LIBRARIES)]
    return _text_digest([*made_with, *(f"{path.name} {sha256_of(path)}" for path in files)])


def _style_files() -> list[Path]:
    """Where matplotlib looks for a user's matplotlibrc, which it would have to be imported for."""
    own = os.environ.get("MATPLOTLIBRC")
    folders = [Path(), *(Path(of) for of in (own, os.environ.get("MPLCONFIGDIR")) if of)]
    configs = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    folders.append(Path(configs).expanduser() / "matplotlib")
    return [*([Path(own)] if own else []), *(folder / "matplotlibrc" for folder in folders)]
