"""What lies in the files that a run reads: a file edited under the same path is another one.

A run key is of the config, which names files and doesn't hold them. So what lay there is noted as a
digest when a run is frozen or begun (`inputs.json`), and whoever would go on with the run, or take
its result for this config's, compares. Keys need no file to be read and stay what they were; a run
of before there were digests is compared by those of its items (`data.json`). A folder so never
holds two results of one config that differ in data alone, which a report couldn't put side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from crl_exp.config.files import read_json
from crl_exp.config.machine.digests import digest, folder_digest

INPUTS, DATA = "inputs.json", "data.json"
__all__ = ["Inputs", "changed", "digest", "folder_digest", "sae_digest"]
Inputs = dict[str, str]
"""Digest of what lies there, by the key of the config that names it."""


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
