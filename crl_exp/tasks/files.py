"""Reading the files of a task, with faults that say what mends them."""

from __future__ import annotations

from pathlib import Path

from crl_exp.errors import UserError


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`, line ends kept. Raises `UserError` where that can't be had."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); run `make assets`") from error
    except UnicodeDecodeError as error:
        raise damaged(str(path), f"not UTF-8: {error.reason} at byte {error.start}") from error


def damaged(where: str, fault: str) -> UserError:
    return UserError(f"{where} is damaged ({fault}); remove its folder and run `make assets`")
