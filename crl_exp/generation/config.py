"""How answers are generated: the config section, apart from the engine, which needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crl_exp.config.errors import did_you_mean

AUTO_ITEMS = 128
DECODE = ("eager", "compiled")
COMPILED_AND_SPREAD = (
    "engine.decode=compiled makes one graph of a model on one device, and model.device_map spreads "
    "it; set engine.decode=eager, or model.device_map=null"
)


@dataclass
class EngineConfig:
    """How prompts are read and answers generated.

    batch_size: rows that go through the model together; auto: as many as fit into memory.
    keep_gib: memory for kept prompts, GiB; a split that needs more is read again for each batch.
    decode: how the tokens after the first are made: eager, or compiled, as one graph with a static
        cache and the steering inside (CUDA graphs on a GPU; needs a C++ compiler on a CPU).
    """

    batch_size: Any  # int or "auto": OmegaConf can't merge a union into a section still missing
    keep_gib: float
    decode: str

    @property
    def items_together(self) -> int:
        """Items that a pass over a split takes at a time."""
        return self.batch_size if isinstance(self.batch_size, int) else AUTO_ITEMS

    def faults(self) -> list[str]:
        found, size = [], self.batch_size
        number = isinstance(size, int) and not isinstance(size, bool)
        if size != "auto" and not (number and size >= 1):
            found.append(f"engine.batch_size={size}: must be at least 1, or auto")
        if not self.keep_gib >= 0:
            found.append(f"engine.keep_gib={self.keep_gib}: must be 0 or more")
        if self.decode not in DECODE:
            near = did_you_mean(self.decode, DECODE)
            found.append(f"engine.decode={self.decode}: must be one of {', '.join(DECODE)}{near}")
        return found
