"""What a wheel carries besides modules, and which commit it was made from; the rest is pyproject's.

`conf/`, the sweeps, the recipe of the SAEs and the shipped assets go to `crl_exp/config/shipped/`,
laid out as in the checkout. Some folders are links to others there, which builders zip as a copy,
drop or leave dangling: in a wheel and in an sdist they are folders.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

FOLDERS = ("conf", "sweeps", "sae_training", "assets")
LINKS = {
    Path("conf/sweep"): Path("sweeps"),
    Path("sae_training/model"): Path("conf/model"),
    Path("sae_training/task"): Path("conf/task"),
}
SHIPPED = Path("crl_exp", "config", "shipped")
BUILT_FROM = "built_from.json"  # read by crl_exp/runs/code_state.py


def files() -> dict[Path, Path]:
    """Every file that is shipped, by where it belongs."""
    every = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*"))]
    there = [path for path in every if path.is_file() and not path.name.startswith(".")]
    own = [path for path in there if not any(link in (path, *path.parents) for link in LINKS)]
    found = {path: path for path in own}
    for link, folder in LINKS.items():
        found |= {link / p.relative_to(folder): p for p in own if folder in p.parents}
    return found


def commit() -> str:
    """What code.json says of the code, as JSON: asked of git, or as an sdist has kept it."""
    kept = Path(BUILT_FROM)
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    head = git("rev-parse", "HEAD")
    said = {"git_commit": head, "git_dirty": None if head is None else bool(git("status", "-s"))}
    return json.dumps(said) + "\n"


def git(*words: str) -> str | None:
    """What git says of this folder itself, not of one around it; None where it knows nothing."""
    if not Path(".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)


class Modules(build_py):
    """Modules, and beside them what is shipped. An editable install finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib) / SHIPPED
        shutil.rmtree(shipped, ignore_errors=True)  # of an earlier build
        for target, source in files().items():
            copy(source, shipped / target)
        (shipped / BUILT_FROM).write_text(commit(), encoding="utf-8")


class Sources(sdist):
    """Sources that can be run where they are unpacked, and made a wheel of."""

    def make_release_tree(self, base_dir: str, files_: list[str]) -> None:
        super().make_release_tree(base_dir, files_)
        for target, source in files().items():
            copy(source, Path(base_dir) / target)
        copy(Path("launch.py"), Path(base_dir) / "launch.py")
        (Path(base_dir) / BUILT_FROM).write_text(commit(), encoding="utf-8")


setup(cmdclass={"build_py": Modules, "sdist": Sources})
