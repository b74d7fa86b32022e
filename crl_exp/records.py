"""Run directories as they are read back: by the tracking that sends them, by the report."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from crl_exp.errors import UserError


@dataclass(frozen=True)
class Record:
    """One run directory `outputs/<sweep>/<run_key>/`. Reads nothing before it is asked for."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def sweep(self) -> str:
        return self.path.parent.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The frozen config."""
        plain = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    @cached_property
    def status(self) -> dict[str, Any]:
        return self._json("status.json") or {}

    @cached_property
    def result(self) -> dict[str, Any] | None:
        return self._json("result.json")

    @cached_property
    def features(self) -> dict[str, Any]:
        return self._json("features.json") or {}

    @property
    def state(self) -> str:
        """As in status.json; `killed` where it says running but that process is gone."""
        state = self.status.get("state", "unknown")
        if state == "running" and self.status.get("host") == socket.gethostname():
            return state if _alive(self.status["pid"]) else "killed"
        return state

    @cached_property
    def journal(self) -> list[dict[str, Any]]:
        """Lines written to their end: {"step", "time", "metrics"}."""
        path = self.path / "journal.jsonl"
        text = path.read_text() if path.exists() else ""
        return [self._parse(line, path) for line in text.split("\n")[:-1]]

    @cached_property
    def layers(self) -> list[int] | None:
        """The steered layers; None where the run hasn't got to naming them (`layers=all`)."""
        if self.result is not None:
            return list(self.result["layers"])
        section = self.config["layers"]
        return [section["layer"]] if "layer" in section else section.get("layers")

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        return self._parse(path.read_text(), path) if path.exists() else None

    @staticmethod
    def _parse(text: str, path: Path) -> dict[str, Any]:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is damaged ({error}); set resume=force to run this config again"
            ) from error


def find_records(folder: Path) -> list[Record]:
    """The run at `folder`, or those of the sweep or of all sweeps in it.

    Raises `UserError` where there is none.
    """
    for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
        found = sorted(folder.glob(pattern))
        if found:
            return [Record(path.parent.absolute()) for path in found]
    raise UserError(
        f"no run in {folder}; give outputs/SWEEP or outputs/SWEEP/RUN_KEY "
        "(`python launch.py` makes one)"
    )


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots. Lists stay values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
