"""`python -m crl_exp options`: writes docs/options.md, and a page a group, from `conf/` and the
classes' docstrings (`option_pages`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crl_exp.config.paths import REPO
from crl_exp.launcher.commands.option_pages import INDEX, PAGES, pages

DOCS = REPO / "docs"


def stale(written: dict[str, str], docs: Path = DOCS) -> list[Path]:
    """The pages that aren't as they should be, and those that no group has any more."""
    there = {path.relative_to(docs).as_posix() for path in (docs / PAGES).glob("*.md")}
    changed = [
        name
        for name, text in written.items()
        if not (docs / name).exists() or (docs / name).read_text(encoding="utf-8") != text
    ]
    return [docs / name for name in [*changed, *sorted(there - set(written))]]


def write(written: dict[str, str], docs: Path = DOCS) -> list[Path]:
    """Writes what has changed, removes what no group has any more; returns these paths."""
    changed = stale(written, docs)
    for path in changed:
        name = path.relative_to(docs).as_posix()
        if name in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written[name], encoding="utf-8")
        else:
            path.unlink()
    return changed


def main(argv: Sequence[str]) -> int:
    """Writes the pages; with --check says whether they are as they should be."""
    parser = argparse.ArgumentParser(prog="python -m crl_exp options", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if one is stale"
    )
    asked = parser.parse_args(argv)
    if asked.check:
        found = stale(pages())
        for path in found:
            print(f"{path} is stale: run `python -m crl_exp options`")
        if not found:
            print(f"{DOCS / INDEX} and its pages are up to date")
        return 1 if found else 0
    changed = write(pages())
    print("\n".join(f"written: {path}" for path in changed) or "all pages were up to date")
    return 0
