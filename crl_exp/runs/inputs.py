"""What lies in the files that a run reads: a file edited under the same path is another one.

A run key is of the config, which names files and doesn't hold them. So what lay there is noted as a
digest when a run is frozen or begun (`inputs.json`), and whoever would go on with the run, or take
its result for this config's, compares. Keys need no file to be read and stay what they were; a run
of before there were digests is compared by those of its items (`data.json`). A folder so never
holds two results of one config that differ in data alone, which a report couldn't put side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

from crl_exp.config.errors import UserError
from crl_exp.config.files import read_json

INPUTS, DATA = "inputs.json", "data.json"
Inputs = dict[str, str]
"""Digest of what lies there, by the key of the config that names it."""
DIGEST_CHARS = 16
_known: dict[tuple[str, str, int, int, int], str] = {}


class Drawn(Protocol):
    """Of a task's splits, what tells them apart."""

    def facts(self) -> dict[str, Any]: ...


def sae_digest(sae: Any, layer: int) -> str | None:
    """Of an SAE's config and weights; None where they are not in a folder."""
    if sae.folder is None:
        return None
    folder = sae.path(layer)
    weights = [p for p in folder.glob("*.safetensors") if p.name != "sparsity.safetensors"]
    files = [folder / "cfg.json", *sorted(weights)]
    return digest(files, f"sae.folder={sae.folder}, layer {layer}")


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


def changed(run: Path, now: Inputs, drawn: Callable[[], Drawn]) -> str | None:
    """In words, what isn't now what this run was frozen or begun with; None: nothing.

    A run that ended before it had drawn its items has read nothing that it would go on with.
    drawn: gives the items that the task draws now.
    """
    then: Inputs | None = read_json(
        run / INPUTS, "remove it; the run is then compared by data.json"
    )
    facts = read_json(run / DATA, "remove it") or {}
    known_by = "asked" if "asked" in facts else "digest"  # of before it was noted
    items = facts.get(known_by)
    status = read_json(run / "status.json", "set resume=force to start this run anew") or {}
    if items is None and status.get("state") != "queued":
        return None
    found = [key for key in now if then and key in then and then[key] != now[key]]
    told = {key: f"{key} (digest {(then or {})[key]} then, {now[key]} now)" for key in found}
    of_task = [key for key in now if key.startswith(("task.path=", "task.data_files="))]
    if items is not None and (set(of_task) & set(found) or (then is None and of_task)):
        # What matters is the items: a blank line more changes nothing.
        facts_now = drawn().facts()
        same_groups = facts.get("groups") in (None, facts_now.get("groups"))
        if (items_now := facts_now[known_by]) == items and same_groups:
            told = {key: text for key, text in told.items() if key not in of_task}
        elif then is None:
            told = {
                of_task[0]: f"{', '.join(of_task)} (items' digest {items} then, {items_now} now)"
            }
    if not told:
        return None
    return (
        f"{run} was begun with something else in {'; '.join(told.values())}. Put it back as it "
        "was, take another sweep_name, or set resume=force to run it anew"
    )
