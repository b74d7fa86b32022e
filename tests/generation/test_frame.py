"""The frame: Makefile, packaging and the tree hold together."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TARGET = re.compile(r"^([a-z][a-z-]*):(?!=)", re.MULTILINE)
SKIPPED = {".git", ".venv", "outputs", "multirun", "__pycache__", ".pytest_cache", ".ruff_cache"}
SKIPPED |= {".hypothesis", "node_modules", "build", "dist"}
WANTED = (
    "setup assets demo demo-refusal report test test-fast check format format-check lint types "
    "bench mlflow clean retry cancel prefetch"
)


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(TARGET.findall((ROOT / "Makefile").read_text()))


def our_files() -> Iterator[Path]:
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if n not in SKIPPED and not n.endswith(".egg-info")]
        # In a second working tree .git is a file.
        yield from (Path(folder) / file for file in files if file not in SKIPPED)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_help_lists_every_target(targets: set[str]) -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"make ([a-z-]+)", re.sub(r"\x1b\[\d+m", "", said.stdout)))
    assert set(WANTED.split()) <= listed
    assert listed == targets


@pytest.mark.parametrize("target", WANTED.split())
def test_every_target_can_be_planned(target: str) -> None:
    plan = subprocess.run(
        ["make", "-n", target, "SWEEP=demo"], cwd=ROOT, capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stderr


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.name)
def test_pages_name_real_make_targets(page: Path, targets: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|\$ )make ((?:[a-z][a-z-]* ?)+)", text, re.MULTILINE)
    assert {word for words in named for word in words.split()} <= targets


def test_ci_uses_real_make_targets(targets: set[str]) -> None:
    script = ROOT / ".ci" / "run"
    named = re.findall(r"^step make (.+)$", script.read_text(), re.MULTILINE)
    assert {"setup", "assets", "test"} <= set(named) <= targets
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ranges_admit_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions: dict[str, str] = {}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==" and "+" not in exact.version, f"{pin}: not an exact version"
        versions[canonicalize_name(pin.name)] = exact.version
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for line in project["dependencies"] + extras:
        wanted = Requirement(line)
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not in constraints.txt"
        assert version in wanted.specifier, f"{line} does not admit {version}"


def test_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks["repos"][0]["hooks"])


def test_no_paths_of_one_machine() -> None:
    words = "|".join(("root", "home", "work", "Users", "tmp/dl"))
    machine = re.compile(rf"(?<![\w.~$}}/-])/(?:{words})/[\w.]".encode())
    found = [
        f"{path.relative_to(ROOT)}: {hit.group().decode()}…"
        for path in our_files()
        for hit in machine.finditer(path.read_bytes())
        if path.stat().st_size < 1_000_000
    ]
    assert not found
