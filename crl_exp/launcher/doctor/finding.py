"""What checks are given, and what they answer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from crl_exp.config.files import home
from crl_exp.launcher.settings import Settings, SlurmSettings
from crl_exp.models.config import ASSET_PREFIX, TINY_PREFIX

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
ASKING_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """state: one of the four above. told: what was found. advice: what to do about it."""

    state: str
    told: str
    advice: str = ""


def ok(told: str) -> Finding:
    return Finding(OK, told)


def warning(told: str, advice: str) -> Finding:
    return Finding(WARNING, told, advice)


def failed(told: str, advice: str) -> Finding:
    return Finding(FAILED, told, advice)


def skipped(told: str, advice: str = "") -> Finding:
    return Finding(SKIPPED, told, advice)


@dataclass(frozen=True)
class Subject:
    """What would be launched. configs: of the points, or of some of very many. settings: of the
    launcher; None where this process would run it."""

    configs: Sequence[DictConfig]
    settings: Settings | None

    @property
    def slurm(self) -> SlurmSettings | None:
        return self.settings if isinstance(self.settings, SlurmSettings) else None

    def distinct(self, *keys: str) -> list[DictConfig]:
        """Configs that differ in these sections or keys."""
        found: dict[str, DictConfig] = {}
        for config in self.configs:
            found.setdefault(str([config.get(key) for key in keys]), config)
        return list(found.values())

    def values(self, section: str, key: str) -> list[str]:
        """Each value of a key once, as text; without null and where there is no such key."""
        found = [config.get(section, {}).get(key) for config in self.configs]
        return list(dict.fromkeys(str(value) for value in found if value is not None))

    @cached_property
    def output_dir(self) -> Path:
        return home(str(self.configs[0].output_dir), "output_dir").absolute()

    @property
    def cuda(self) -> bool:
        return any(str(config.model.device).startswith("cuda") for config in self.configs)

    @cached_property
    def hub_models(self) -> list[tuple[str, str | None]]:
        """Hub ids of the models with their revisions."""
        found = {}
        for config in self.distinct("model"):
            path = str(config.model.path)
            if path.startswith((ASSET_PREFIX, TINY_PREFIX)) or home(path, "model.path").is_dir():
                continue
            found[path, config.model.revision] = None
        return list(found)


Check = Callable[[Subject], Iterable[Finding]]


def asked(command: Sequence[str]) -> tuple[int, str]:
    """A program's exit code and what it printed; −1 where it isn't there or doesn't answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ASKING_SECONDS
        )
    except FileNotFoundError:
        return -1, f"there is no {command[0]} here"
    except subprocess.TimeoutExpired:
        return -1, f"{command[0]} doesn't answer within {ASKING_SECONDS:g} s"
    except OSError as error:
        return -1, f"{command[0]}: {error}"
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout)
