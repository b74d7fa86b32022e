"""The config: types here, values in `conf/`. Nothing in this file knows Hydra's command line.

Sections with one shape are typed nodes. Sections with a choice of parts (task, method, stages, …)
name a class of this package in `_target_`; its dataclass fields are the section's keys and types.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.algorithms import Algorithm
from crl_exp.architecture import check_architecture
from crl_exp.coefficients import Coefficient, Decay
from crl_exp.engine import EngineConfig
from crl_exp.errors import UserError, did_you_mean
from crl_exp.layers import LayerSet
from crl_exp.methods import CRL, Method
from crl_exp.model_config import ModelConfig
from crl_exp.networks import PolicyConfig
from crl_exp.runs import RESUME
from crl_exp.sae_config import SAEConfig
from crl_exp.stages.base import STAGES, Stage
from crl_exp.tasks.base import Task
from crl_exp.tracking import TrackingConfig
from crl_exp.trainer import CheckpointConfig
from crl_exp.warmup import WarmupConfig

PACKAGE = "crl_exp."
# Groups that set keys of other sections and leave none of their own.
PRESETS = ("experiment", "sweep", "debug")


@dataclass
class Schema:
    """Shape of a composed config, as Hydra sees it. `Any` sections are built from `_target_`."""

    sweep_name: str = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    resume: str = MISSING
    order: list[str] = MISSING
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
TYPED: dict[str, type] = {
    "model": ModelConfig,
    "sae": SAEConfig,
    "engine": EngineConfig,
    "warmup": WarmupConfig,
    "policy": PolicyConfig,
    "checkpoint": CheckpointConfig,
    "tracking": TrackingConfig,
}


@dataclass
class Experiment:
    """A config whose every section is an object of its class; see `Schema` for the keys."""

    sweep_name: str
    seed: int
    output_dir: str
    resume: str
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


def build(node: DictConfig, where: str, base: type) -> Any:
    """Make the object that a section's `_target_` names, its values checked against its fields.

    Raises `UserError` for a class outside this package or of the wrong kind, an unknown or missing
    key (with the nearest right names), and a value of the wrong type.
    """
    target = str(node.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if not target.startswith(PACKAGE):
        raise UserError(
            f"{where}._target_={target or 'missing'}: must name a class of crl_exp; "
            f"choose an option of the group instead ({where}=NAME)"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}._target_={target}: no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{where}._target_={target}: is not a {base.__name__}")
    return fill(node, where, cls)


def fill(node: DictConfig, where: str, cls: type) -> Any:
    """Make a dataclass from a section, checked. Raises `UserError` as `build` does."""
    known = [f.name for f in fields(cls)]
    given = [str(key) for key in node if key != "_target_"]
    faults = [
        f"{where}.{key}: {cls.__name__} has no such key{did_you_mean(key, known)}"
        for key in given
        if key not in known
    ]
    faults += [
        f"{where}.{key} is missing; set {where}.{key}=…"
        for key in known
        if key not in given or OmegaConf.is_missing(node, key)
    ]
    if faults:
        raise UserError("\n".join(faults))
    values = {key: node[key] for key in known}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise UserError(f"{key}: {error.msg or error}".splitlines()[0]) from error


def experiment(config: DictConfig) -> Experiment:
    """Build every section. Raises `UserError` with all faults of the config at once."""
    faults = _unknown_sections(config)
    made: dict[str, Any] = {}
    for name, cls in {**PARTS, **TYPED}.items():
        if OmegaConf.is_missing(config, name) or config[name] is None:
            faults.append(f"{name}: no option is chosen; set {name}=NAME")
            continue
        make = build if name in PARTS else fill
        try:
            made[name] = make(config[name], name, cls)
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
    faults += _order_faults(list(config.order))
    if faults:
        raise UserError("\n".join(faults))
    top = {key: config[key] for key in ("sweep_name", "seed", "output_dir", "resume")}
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


def validate(exp: Experiment) -> list[int]:
    """Check what can be checked before anything heavy is loaded; returns the steered layers.

    Reads the model's config.json and the SAEs' cfg.json only. Raises `UserError` with every fault.
    """
    config = check_architecture(exp.model)
    layers: list[int] = []
    faults: list[str] = []
    try:
        layers = exp.layers.resolve(exp.sae.available, config.num_hidden_layers)
    except UserError as error:
        faults.append(str(error))
    k = exp.policy.k if isinstance(exp.method, CRL) else 1
    for layer in layers:
        faults += exp.sae.metadata_faults(layer, config.hidden_size, exp.model.name, k)
    faults += [fault for fault in exp.method.conflicts(exp) if fault]
    if faults:
        raise UserError("\n".join(faults))
    return layers
