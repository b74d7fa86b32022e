"""Logits that a model gave to answers, kept on disk by content.

A folder for each model under `$CRL_EXP_CACHE/preference_model`, named by the digest of its files; a
file in it for each batch that was scored, written whole and never changed, so that processes and
machines that share the folder need no lock. At worst two of them score the same answer once each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from crl_exp.config.files import read_json, write_json, writing
from crl_exp.config.machine.assets import cache_dir

READ_AS = 1
"""Raise it with each change of how a question and an answer are fed to a model."""


class KeptLogits:
    """model: digest of its files."""

    def __init__(self, model: str):
        self.folder: Path = cache_dir() / "preference_model" / model
        self._known: dict[str, float] = {}
        self._read: set[str] = set()  # names of files

    def find(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """What is known of these prompts and answers. Raises `UserError` for a damaged file."""
        keys = {pair: _key(*pair) for pair in pairs}
        if not self._known.keys() >= set(keys.values()):
            self._look()
        return {pair: self._known[key] for pair, key in keys.items() if key in self._known}

    def add(self, found: Mapping[tuple[str, str], float]) -> None:
        """Keep logits, by prompt and answer."""
        new = {_key(*pair): logit for pair, logit in found.items()}
        name = hashlib.sha256(json.dumps(sorted(new)).encode()).hexdigest()[:32] + ".json"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / name, new)
        self._known |= new
        self._read.add(name)

    def _look(self) -> None:
        """Read what others have written since."""
        for path in self.folder.glob("[0-9a-f]*.json") if self.folder.is_dir() else ():
            if path.name not in self._read:
                self._known |= read_json(path, "remove it; its answers are scored anew")
                self._read.add(path.name)


def _key(prompt: str, answer: str) -> str:
    of = json.dumps([READ_AS, prompt, answer])
    return hashlib.sha256(of.encode()).hexdigest()[:32]
