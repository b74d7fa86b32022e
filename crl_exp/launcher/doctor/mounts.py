"""Which file system a folder lies on: whether other machines may see it, and what is left of it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs|ceph|cifs|smb3?|afs|9p|panfs|wekafs|orangefs|glusterfs|virtiofs"
    r"|fuse\.(?!ext|ntfs|overlay|squash|snap|lxcfs|portal|gvfs).*"
)
"""Types that are shared as a rule."""
MEMORY = ("tmpfs", "ramfs")


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that there is."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def kind_of(path: Path, table: Path = Path("/proc/mounts")) -> str | None:
    """Type of the file system that a path lies on, or would; None where this system doesn't tell.

    table: one mount a line, `DEVICE FOLDER TYPE …`, blanks as in `\\040`.
    """
    if not table.exists():
        return None
    real = os.path.realpath(existing(path))
    best, kind = "", None
    for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        folder = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[1])
        inside = real == folder or real.startswith(folder.rstrip("/") + "/")
        # The last mount on a folder hides the ones before.
        if inside and len(folder) >= len(best):
            best, kind = folder, words[2]
    return kind


def is_network(kind: str | None) -> bool:
    return kind is not None and NETWORK.fullmatch(kind) is not None


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(existing(path)).free
