"""Small packages for the asset fetcher, served to real pip from a local folder."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from crl_exp.config.files import sha256_of
from crl_exp.config.machine.asset_sources import Archive, Asset

TEXT = b"one line of data\n" * 50
QUIET = Console(file=io.StringIO())


@pytest.fixture
def pip_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip looks into."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder: Path, package: str, members: dict[str, bytes]) -> Archive:
    """A wheel that pip accepts, with these members besides."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Archive(f"{package}==1.0", path.name, sha256_of(path), path.stat().st_size, "MIT")


def text_asset(folder: Path, package: str = "pkga", **changes: object) -> Asset:
    archive = wheel(folder, package, {f"{package}/text.txt": TEXT, f"{package}/code.py": b"1/0"})
    asset = Asset(name=f"data/{package}", archive=archive, members=(f"{package}/text.txt",))
    return replace(asset, **changes)  # pyright: ignore[reportArgumentType]


def tarball(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Archive:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return Archive("pkgs==1.0", path.name, sha256_of(path), path.stat().st_size, "MIT")


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
