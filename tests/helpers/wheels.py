"""The package built and installed as a user installs it, without a network and away from here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.tiny_run import ROOT

BUILD = "import sys; from setuptools import build_meta as b; print(b.{what}(sys.argv[1]))"
IGNORED = (".git", ".venv", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache",
           "tests", "docs")  # fmt: skip


def checkout(folder: Path) -> Path:
    """A copy of what the package is made of, links kept as links."""
    return Path(shutil.copytree(ROOT, folder, symlinks=True,
                                ignore=shutil.ignore_patterns(*IGNORED)))  # fmt: skip


def built(what: str, source: Path, out: Path) -> Path:
    """A wheel (`build_wheel`) or an sdist (`build_sdist`) of this folder."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(what=what), str(out)], cwd=source, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Installed:
    """An environment that has the package and sees this interpreter's dependencies."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def program(self) -> Path:
        return self.folder / "bin" / "crl-exp"

    def run(
        self, *words: str | Path, cwd: Path, cache: Path, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """cwd: where it is typed. cache: CRL_EXP_CACHE. code: what it has to end with."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=600,
            env={**environment, "CRL_EXP_CACHE": str(cache)},
        )  # fmt: skip
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done


def empty(folder: Path) -> Installed:
    """An environment that has nothing yet and sees this interpreter's dependencies.

    A path in a .pth file is looked in behind the environment itself, and the .pth files that lie
    there, an editable install's among them, are not read.
    """
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    theirs = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in theirs))
    return Installed(folder)


def installed(wheel: Path, folder: Path) -> Installed:
    """A wheel in an environment of its own."""
    made = empty(folder)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(made.python), "install", "--quiet",
         "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check",
         "--force-reinstall", str(wheel)], check=True, cwd=folder,
    )  # fmt: skip
    return made
