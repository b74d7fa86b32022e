"""Files that are written whole or not at all, and a disk that doesn't take them.

A writer puts a partial file beside the one it means, has it on disk, and renames it: who reads, or
starts again after a death, finds the old file or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import numbers
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from crl_exp.config.errors import UserError

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


def read_json(path: Path, advice: str, kind: type = dict) -> Any:
    """What a file of ours holds; None where there is none.

    kind: of the whole of it. Raises `UserError` with the advice for one that was cut off, is not
    text, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, not even UTF-8
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged (it holds a {type(value).__name__}); {advice}")
    return value


def content_key(value: Any) -> str:
    """Short stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def home(path: str | Path, key: str) -> Path:
    """A path with `~` and `~user` put in. Raises `UserError` naming the key for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise UserError(
            f"{key}={path}: there is no home folder of {user!r} here; give the whole path"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; a number that isn't finite is null."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any, undefined: dict[str, str] | None = None, at: str = "") -> Any:
    """A JSON-like value in which numbers that aren't finite are null, and NumPy's are Python's.

    undefined: is given, by their keys joined by dots, what those numbers were. at: keys so far.
    """
    if isinstance(value, dict):
        return {k: finite(v, undefined, f"{at}.{k}" if at else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v, undefined, f"{at}.{i}" if at else str(i)) for i, v in enumerate(value)]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        if math.isfinite(number):
            return number
        if undefined is not None:
            undefined[at] = "not a number" if math.isnan(number) else "infinite"
        return None
    return value


def defined(figures: dict[str, Any]) -> dict[str, Any]:
    """A result in which every undefined figure is null and `undefined` says of each what it was.

    A result whose figures are all finite is as it was.
    """
    reasons: dict[str, str] = {}
    made = finite(figures, reasons)
    return {**made, "undefined": reasons} if reasons else figures


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
