"""Checkpoints: where a run that was cut off goes on.

Written whole or not at all, the last good one kept, with the state of every random generator, and
refused where they belong to another config.
torch is imported where states are read and written: settings, reports and `status` do without.
"""

from __future__ import annotations

import os
import pickle
import random
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import replacing


@dataclass
class CheckpointConfig:
    """How often a run is saved: after this many steps or seconds, whichever comes first.

    A step is an update of the policy in training, and a batch of answers in warmup, selection and
    evaluation. A run that is asked to end (SLURM's USR2, SIGTERM) is saved after its step.
    """

    updates: int
    seconds: float

    def faults(self) -> list[str]:
        ok = self.updates >= 1 and self.seconds > 0
        return [] if ok else ["checkpoint.updates and checkpoint.seconds must be positive"]


class Checkpoint:
    """One state on disk, replaced as a whole; the one before it is kept as `NAME.prev.pt`.

    key: of what the state belongs to; a state with another one is refused with `advice`.
    """

    def __init__(self, path: Path, key: str, advice: str):
        self.path, self.key, self.advice = path, key, advice
        self.previous = path.with_name(f"{path.stem}.prev{path.suffix}")

    def save(self, state: dict[str, Any]) -> None:
        """Raises `DiskError` where the disk is full or read-only; the last good one stays."""
        partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial")
        with replacing(self.path, partial) as file:
            _dump({**state, "run_key": self.key, "rng": rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
            # Only now: until the new one is whole, the last good one stays in its place.
            if self.path.exists():
                os.replace(self.path, self.previous)

    def load(self) -> dict[str, Any] | None:
        """The last good state, or None; sets the random generators as they were at its saving.

        Raises `UserError` where it belongs to another config.
        """
        for leftover in self.path.parent.glob(f".{self.path.stem}.*.partial"):
            leftover.unlink()
        for path in (self.path, self.previous):
            state = read_state(path, self.key, self.advice) if path.exists() else None
            if state is not None:
                set_rng_state(state["rng"])
                return state
        return None

    def clear(self) -> None:
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)


def write_state(path: Path, state: dict[str, Any], key: str) -> None:
    """Write a state that is never replaced. Raises `DiskError` as `Checkpoint.save` does."""
    with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.partial")) as file:
        _dump({**state, "run_key": key, "rng": rng_state()}, file)


def read_state(path: Path, key: str, advice: str) -> dict[str, Any] | None:
    """A state on the CPU; None, with a warning, where the file is damaged.

    Raises `UserError` where it was written under another key.
    """
    import torch

    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, zipfile.BadZipFile) as error:
        # Not torch's own words: they advise to load the file unsafely.
        why = type(error).__name__
        warnings.warn(f"{path} is damaged and is passed over ({why})", stacklevel=3)
        return None
    if state.get("run_key") != key:
        raise UserError(
            f"{path} was written by a run with another config ({state.get('run_key')}, this "
            f"one is {key}); {advice}"
        )
    return state


class _Sink:
    """A file for torch.save, which says "unexpected pos" where the disk said that it is full."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _dump(state: dict[str, Any], file: IO[bytes]) -> None:
    import torch

    sink = _Sink(file)
    try:
        torch.save(state, sink)  # type: ignore[arg-type]
    except Exception:
        if sink.error is not None:
            raise sink.error from None
        raise


def rng_state() -> dict[str, Any]:
    """The process's random generators: torch (with CUDA), numpy, Python."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss,
                  cached],
        "python": [version, torch.tensor(words), gauss],
    }  # fmt: skip


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the process's random generators as `rng_state` found them."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():  # perhaps on a node with fewer GPUs
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
