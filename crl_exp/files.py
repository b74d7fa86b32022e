"""Files that are written whole or not at all, and a disk that doesn't take them.

A writer puts a partial file beside the one it means, has it on disk, and renames it: who reads, or
starts again after a death, finds the old file or the new one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from crl_exp.errors import UserError

SWEEP_CONFIG = "multirun.yaml"
"""In a sweep's folder: what was asked for, by the launch that was taken last."""
REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota of that disk is used up",
    errno.EROFS: "that file system is read-only",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
}


class DiskError(UserError):
    """A run's folder doesn't take what has to be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `DiskError` where the disk refuses to take `path`: full, over quota, read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise DiskError(
            f"can't write {path}: {REFUSALS[error.errno]}. What was saved before is whole: mend "
            "that and start the run again, and it goes on from its last checkpoint (or set "
            "output_dir=/another/folder, where it starts anew)"
        ) from error


@contextmanager
def replacing(path: Path, partial: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the place of `path` once it is whole and on disk.

    Where the block raises or the disk is full, the partial file is removed.
    """
    with writing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none of it, and have it on disk before going on."""
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.partial")) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
