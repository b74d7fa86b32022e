"""The config made into objects and checked. Nothing in this file knows Hydra's command line.

Sections with one shape are typed nodes (`experiments.schema`). Sections with a choice of parts
(task, method, stages, …) name a class of this package in `_target_`; its dataclass fields are the
section's keys and types. Values are in `conf/`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from crl_exp.config import compatibility
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.paths import sweep_fault
from crl_exp.config.sections import Known, build, fill, number_faults, once
from crl_exp.experiments.layers import LayerSet
from crl_exp.experiments.schema import PRESETS, TYPED, Schema
from crl_exp.generation.config import EngineConfig
from crl_exp.models.architecture import check_architecture
from crl_exp.models.config import ModelConfig
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.runs.directory import RESUME
from crl_exp.saes.config import SAEConfig
from crl_exp.steering.coefficients import Coefficient, Decay
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.contrast import contrast_faults
from crl_exp.steering.methods.base import Method
from crl_exp.steering.methods.crl import CRL
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.base import STAGES, Stage
from crl_exp.tasks.base import Task
from crl_exp.tracking.sync import TrackingConfig

PARTS: dict[str, type] = {
    "task": Task,
    "layers": LayerSet,
    "method": Method,
    "fusion": Stage,
    "activation": Stage,
    "noise": Stage,
    "mask": Stage,
    "coefficient": Coefficient,
    "decay": Decay,
    "algorithm": Algorithm,
}


@dataclass
class Experiment:
    """A config whose every section is an object of its class; see `Schema` for the keys.

    rung: place on a ladder of runs that a report sets against each other (`comparison.ladder`).
    """

    sweep_name: str
    seed: int
    output_dir: str
    resume: str
    rung: int | None
    order: list[str]
    model: ModelConfig
    sae: SAEConfig
    engine: EngineConfig
    warmup: WarmupConfig
    policy: PolicyConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    task: Task
    layers: LayerSet
    method: Method
    fusion: Stage
    activation: Stage
    noise: Stage
    mask: Stage
    coefficient: Coefficient
    decay: Decay
    algorithm: Algorithm

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: getattr(self, name) for name in STAGES}


def experiment(config: DictConfig, known: Known | None = None) -> Experiment:
    """Build every section. Raises `UserError` with all faults of the config at once.

    known: of points that are only checked, not run: equal sections are then one object.
    """
    compatibility.fill_missing(config)
    faults = _unknown_sections(config)
    made: dict[str, Any] = {}
    for name, cls in {**PARTS, **TYPED}.items():
        if OmegaConf.is_missing(config, name) or config[name] is None:
            faults.append(f"{name}: no option is chosen; set {name}=NAME")
            continue
        make = build if name in PARTS else fill
        section = config[name]
        plain = None if known is None else OmegaConf.to_container(section, resolve=True)
        try:
            made[name] = once(
                known, [name, plain], lambda s=section, n=name, c=cls, m=make: m(s, n, c)
            )
        except UserError as error:
            faults.append(str(error))
    for section in made.values():
        if hasattr(section, "faults"):
            faults += [fault for fault in section.faults() if fault]
    if config.resume not in RESUME:
        faults.append(
            f"resume={config.resume}: must be one of {', '.join(RESUME)}"
            f"{did_you_mean(config.resume, RESUME)}"
        )
    faults += [fault for fault in [sweep_fault(config.sweep_name)] if fault]
    faults += _order_faults(list(config.order))
    faults += number_faults("seed", config.seed)
    if faults:
        raise UserError("\n".join(faults))
    top = {key: config.get(key) for key in ("sweep_name", "seed", "output_dir", "resume", "rung")}
    return Experiment(**top, order=list(config.order), **made)


def _unknown_sections(config: DictConfig) -> list[str]:
    """Hydra takes `+NAME=…` for any name: a misspelt group would change nothing, in silence."""
    known = [f.name for f in fields(Schema)]
    return [
        f"+{key}: no such key or group{did_you_mean(str(key), [*known, *PRESETS])}"
        for key in config
        if key not in known
    ]


def _order_faults(order: list[str]) -> list[str]:
    found = [
        f"order: unknown stage {name!r}{did_you_mean(name, STAGES)}"
        for name in order
        if name not in STAGES
    ]
    if not found and sorted(order) != sorted(STAGES):
        found.append(f"order={order}: must hold each of {', '.join(STAGES)} once")
    return found


def validate(exp: Experiment, known: Known | None = None) -> list[int]:
    """Check what can be checked before anything heavy is loaded; returns the steered layers.

    Reads the model's config.json and the SAEs' cfg.json only. Raises `UserError` with every fault.
    known: of a sweep; what points share is then read once.
    """
    model, sae = asdict(exp.model), asdict(exp.sae)
    config = once(known, ["architecture", model], lambda: check_architecture(exp.model))
    layers: list[int] = []
    faults: list[str] = []
    try:
        if exp.method.uses_layers:
            available = once(known, ["available", sae], lambda: exp.sae.available)
            layers = exp.layers.resolve(available, config.num_hidden_layers)
    except UserError as error:
        faults.append(str(error))
    k = exp.policy.k if isinstance(exp.method, CRL) else 1
    for layer in layers:
        faults += once(
            known,
            ["metadata", model, sae, layer, k],
            lambda at=layer: exp.sae.metadata_faults(at, config.hidden_size, exp.model.name, k),
        )
    faults += [fault for fault in exp.method.conflicts(exp) if fault] + contrast_faults(
        exp.warmup.contrast, exp.task
    )
    if faults:
        raise UserError("\n".join(faults))
    return layers
