"""What lies in files, as a short digest, read once in each state of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path

from crl_exp.config.errors import UserError

DIGEST_CHARS = 16
_known: dict[tuple[str, str, int, int, int], str] = {}
SAMPLED = 2**16
"""Bytes that are read at the beginning, in the middle and at the end of a file of weights: reading
gigabytes for each plan would take longer than the plan, and training changes weights everywhere."""
TEXTS = (".json", ".jinja", ".model", ".txt")
"""Endings of what lies beside a model's weights and decides what is made of them."""


def folder_digest(folder: Path, key: str) -> str:
    """Of a model's folder: its config, tokenizer and template as they are, its weights sampled."""
    there = sorted(path for path in folder.iterdir() if path.is_file())
    each = [f"{p.name} {_file_digest(p, key)}" for p in there if p.suffix in TEXTS]
    each += [
        f"{p.name} {_file_digest(p, key, _sampled)}" for p in there if p.suffix == ".safetensors"
    ]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()[:DIGEST_CHARS]


def digest(paths: Sequence[Path], key: str) -> str:
    """Of the content of these files, in this order; whatever they are called.

    key: what of the config names them. Raises `UserError` where one can't be read.
    """
    each = [_file_digest(path, key) for path in paths]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()[:DIGEST_CHARS]


def _whole(file: BufferedReader, size: int) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(file: BufferedReader, size: int) -> str:
    found = hashlib.sha256(str(size).encode())
    for at in (0, size // 2, max(size - SAMPLED, 0)):
        file.seek(at)
        found.update(file.read(SAMPLED))
    return found.hexdigest()


def _file_digest(path: Path, key: str, of: Callable[[BufferedReader, int], str] = _whole) -> str:
    """Read once in each state of the file. of: what of it is looked at."""
    if path.exists() and not path.is_file():  # a device may go on for ever
        raise UserError(f"{key}: {path} is no file")
    try:
        stat = path.stat()
        state = (of.__name__, str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state not in _known:
            with path.open("rb") as file:
                _known[state] = of(file, stat.st_size)
    except OSError as error:
        raise UserError(f"{key}: can't be read ({error})") from error
    return _known[state]
