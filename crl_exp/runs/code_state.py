"""Which code a run was made by: commit, whether it was changed since, and how."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_exp.config.paths import REPO, SHIPPED
from crl_exp.runs.directory import write_atomic, write_json

SOURCES = ("crl_exp", "hydra_plugins", "conf", "sweeps", "launch.py")
"""Where a file that git doesn't know yet changes what a run does."""
DIFF_CHARS = 5_000_000
BUILT_FROM = "built_from.json"
"""In a wheel: the commit that it was made from, and whether that was changed (setup.py)."""


@dataclass(frozen=True)
class CodeState:
    """commit, dirty: of the checkout, or what the wheel was made from; null where neither is known.
    diff: against the commit, new files included; a wheel has none."""

    commit: str | None
    dirty: bool | None
    diff: str

    @property
    def digest(self) -> str | None:
        """Of the diff; None where there is none."""
        return hashlib.sha256(self.diff.encode()).hexdigest()[:12] if self.diff else None

    @property
    def facts(self) -> dict[str, Any]:
        """As in code.json and result.json."""
        return {"git_commit": self.commit, "git_dirty": self.dirty, "git_diff": self.digest}

    def write_diff(self, sweep: Path) -> None:
        """Into the sweep's folder: once, as runs with the same changes share it."""
        if self.digest is None:
            return
        path = sweep / f"code-{self.digest}.diff"
        if not path.exists():
            write_atomic(path, self.diff)


@functools.cache
def code_state() -> CodeState:
    """Read once a process: what is edited later is not what was loaded."""
    # A wheel lies in an environment, often inside of a repository that is the user's own.
    return built_from(SHIPPED) if SHIPPED.is_dir() else read_code_state(REPO)


def built_from(shipped: Path) -> CodeState:
    """What a wheel says of the checkout that it was made from."""
    path = shipped / BUILT_FROM
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return CodeState(said.get("git_commit"), said.get("git_dirty"), "")


def read_code_state(repo: Path) -> CodeState:
    """Of the git checkout that this folder is the top of, or a part that git knows."""
    if not _git(repo, "ls-files", "--", "."):  # unpacked inside of a repository of the user's own
        return CodeState(None, None, "")
    commit = _git(repo, "rev-parse", "HEAD")
    if commit is None:
        return CodeState(None, None, "")
    diff = _git(repo, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    new = _git(repo, "ls-files", "--others", "--exclude-standard", "--", *SOURCES) or ""
    for name in new.splitlines():
        diff += _git(repo, "diff", "--no-color", "--no-index", "--", "/dev/null", name) or ""
    if len(diff) > DIFF_CHARS:
        diff = f"{diff[:DIFF_CHARS]}\n(cut off: the whole has {len(diff)} characters)\n"
    return CodeState(commit.strip(), diff != "", diff)


def note_code(run: Path) -> dict[str, Any]:
    """Write code.json into a run directory, at its start; returns what it holds."""
    state = code_state()
    state.write_diff(run.parent)
    write_json(run / "code.json", state.facts)
    return state.facts


def _git(repo: Path, *words: str) -> str | None:
    """What git prints; None where it fails or isn't there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repo), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        return None
    # 1 is how `git diff --no-index` says that there is a difference.
    return done.stdout if done.returncode in (0, 1) else None
