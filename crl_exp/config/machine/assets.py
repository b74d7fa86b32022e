"""The model and the data that the project fetches, in a cache folder outside the tree.

The folder is `$CRL_EXP_CACHE`, by default `~/.cache/crl_exp`. `manifest.json` in it lists every
finished asset with the size and SHA-256 of its files; nothing that isn't listed is used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home, sha256_of
from crl_exp.config.machine.asset_sources import ASSETS, Asset
from crl_exp.config.paths import SHIPPED

MANIFEST = "manifest.json"
FETCH = "crl-exp assets" if SHIPPED.is_dir() else "make assets"
COPY_HINT = (
    f"Without a network: run `{FETCH}` on a machine that has one, copy its cache folder here "
    "and set CRL_EXP_CACHE to the copy"
)


def cache_dir() -> Path:
    """`$CRL_EXP_CACHE`, or `~/.cache/crl_exp`; it need not exist."""
    folder = os.environ.get("CRL_EXP_CACHE")
    return home(folder or "~/.cache/crl_exp", "CRL_EXP_CACHE").absolute()


def asset_path(name: str) -> Path:
    """The folder of a fetched asset, e.g. `data/donotanswer`.

    Cheap: looks at the manifest and the sizes; `python -m crl_exp assets --check` hashes.

    Raises:
        UserError: no such asset, not fetched yet, fetched from another source, or damaged.
    """
    root = cache_dir()
    entry = read_manifest(root).get(name)
    known = {asset.name: asset for asset in ASSETS}
    if entry is None and name not in known:
        raise UserError(
            f"there is no asset {name!r}{did_you_mean(name, known)} "
            f"(known: {', '.join(known)})"
        )  # fmt: skip
    if entry is None:
        raise UserError(f"{name} is not in {root}: run `{FETCH}`. {COPY_HINT}")
    if name in known and entry["fingerprint"] != known[name].fingerprint:
        raise UserError(f"{root / name} was made from another source: run `{FETCH}`")
    if fault := size_fault(root / name, entry):
        raise UserError(f"{fault}: run `{FETCH}` to make it again. {COPY_HINT}")
    return root / name


def read_manifest(root: Path) -> dict[str, Any]:
    """Asset name → `{fingerprint, requirement, archive_sha256, licence, files}`; {} if none yet."""
    path = root / MANIFEST
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["assets"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `{FETCH}`") from error


def write_manifest(root: Path, entries: dict[str, Any]) -> None:
    """Replaces the manifest in one step."""
    temporary = root / (MANIFEST + ".new")
    temporary.write_text(
        json.dumps({"version": 1, "assets": entries}, indent=1, sort_keys=True), encoding="utf-8"
    )
    os.replace(temporary, root / MANIFEST)


def size_fault(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with the files of one asset, judged by presence and size; None if nothing."""
    for name, expected in entry["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes, not {expected['size']}"
    return None


def hash_faults(root: Path, names: Iterable[str]) -> list[str]:
    """Every missing or changed file of the named assets, by size and SHA-256."""
    manifest, faults = read_manifest(root), []
    for name in names:
        if name not in manifest:
            faults.append(f"{root / name} is not fetched")
        elif fault := size_fault(root / name, manifest[name]):
            faults.append(fault)
        else:
            for file, expected in manifest[name]["files"].items():
                if sha256_of(root / name / file) != expected["sha256"]:
                    faults.append(f"{root / name / file} has another SHA-256 than when it was made")
    return faults


def needs_fetch(root: Path, manifest: dict[str, Any], asset: Asset) -> bool:
    """True when the asset is absent, made from another source, or its files' sizes are off."""
    entry = manifest.get(asset.name)
    if entry is None or entry["fingerprint"] != asset.fingerprint:
        return True
    return size_fault(root / asset.name, entry) is not None


def install(asset: Asset, made: Path, root: Path, scratch: Path) -> dict[str, Any]:
    """Moves the finished folder `made` to its place in the cache; returns its manifest entry."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(made.iterdir())
    }
    final = root / asset.name
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        # Aside first: a process that reads the old files keeps them until it closes them.
        os.replace(final, scratch / "replaced")
    os.replace(made, final)
    shutil.rmtree(scratch / "replaced", ignore_errors=True)
    return {
        "fingerprint": asset.fingerprint,
        "requirement": asset.archive.requirement,
        "archive_sha256": asset.archive.sha256,
        "licence": asset.archive.licence,
        "files": files,
    }
