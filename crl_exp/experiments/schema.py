"""The config's shape: its sections and the types of their keys, as Hydra is told them.

Every command line begins with this, `--help` and a mistyped one too: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from crl_exp.generation.config import EngineConfig
from crl_exp.models.config import ModelConfig
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.saes.config import SAEConfig
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.tracking.config import TrackingConfig

# Groups that set keys of other sections and leave none of their own.
PRESETS = ("preset", "sweep", "debug")


@dataclass
class Schema:
    """Shape of a composed config, as Hydra sees it. `Any` sections are built from `_target_`."""

    sweep_name: str = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    resume: str = MISSING
    rung: int | None = None
    order: list[str] = MISSING
    own_code: list[str] = field(default_factory=list)
    experiment: Any = MISSING
    model: ModelConfig = MISSING
    sae: SAEConfig = MISSING
    engine: EngineConfig = MISSING
    warmup: WarmupConfig = MISSING
    policy: PolicyConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    task: Any = MISSING
    layers: Any = MISSING
    method: Any = MISSING
    fusion: Any = MISSING
    activation: Any = MISSING
    noise: Any = MISSING
    mask: Any = MISSING
    coefficient: Any = MISSING
    decay: Any = MISSING
    algorithm: Any = MISSING


TYPED: dict[str, type] = {
    "model": ModelConfig,
    "sae": SAEConfig,
    "engine": EngineConfig,
    "warmup": WarmupConfig,
    "policy": PolicyConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}
