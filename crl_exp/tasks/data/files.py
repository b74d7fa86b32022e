"""Reading the files of a task, with faults that say what mends them."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.machine.assets import FETCH

MARKED = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""What a file in another encoding begins with, the longer marks first."""
SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`, line ends kept. Raises `UserError` where that can't be had."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); run `{FETCH}`") from error
    except UnicodeDecodeError as error:
        raise damaged(str(path), f"not UTF-8: {error.reason} at byte {error.start}") from error


def damaged(where: str, fault: str) -> UserError:
    return UserError(f"{where} is damaged ({fault}); remove its folder and run `{FETCH}`")


def users_text(path: Path, where: str) -> str:
    """The text of a user's UTF-8 file, line ends kept, without the byte order mark that some
    programs write first.

    where: the option that names the file. Raises `UserError` where it can't be read, and for
    another encoding with the line, the byte and the encoding that it looks like.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: can't be read ({error})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path}{_not_utf8(data, error)}") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    marked = [name for mark, name in MARKED.items() if data.startswith(mark)]
    # With a mark to leave out, the decoder counts from behind it.
    at = error.start + 3 * data.startswith(codecs.BOM_UTF8)
    line, byte = data.count(b"\n", 0, at) + 1, at - (data.rfind(b"\n", 0, at) + 1) + 1
    looks = marked[0] if marked else _eight_bit(data, at)
    # Whoever reads it: iconv is on every Linux and macOS.
    return (
        f", line {line}, byte {byte} of the line: 0x{data[at]:02X} is not UTF-8, the file looks "
        f"like {looks}. Save it as UTF-8, e.g. `iconv -f {looks.split()[0]} -t utf-8 FILE > NEW`"
    )


def _eight_bit(data: bytes, at: int) -> str:
    """Of encodings with a byte for each character the one in which all bytes mean something."""
    for name in ("cp1252", "latin-1"):
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        return f"{name} ({data[at : at + 1].decode(name)!r} there)"
    raise AssertionError("latin-1 decodes anything")


def json_line(line: str, where: str) -> Any:
    """One line of JSON. where: its place. Raises `UserError` where it isn't JSON, or where a text
    holds half a character (a lone surrogate, \\ud83d say), which no tokenizer takes."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    if half := SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise UserError(
            f"{where}: holds \\u{ord(half[0]):04x} alone, half of a character (what cut the text "
            "cut through an emoji, say); take it out or complete it"
        )
    return found
