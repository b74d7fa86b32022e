"""The config made into objects and checked. Nothing in this file knows Hydra's command line.

Sections with one shape are typed nodes (`experiments.schema`). Sections with a choice of parts
(task, method, stages, …) name a class of this package in `_target_`; its dataclass fields are the
section's keys and types. Values are in `conf/`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from crl_exp.config import compatibility, own_code
from crl_exp.config.compatibility import STEERING, is_steering
from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.keys import EVERY_KIND, plain_of, settle
from crl_exp.config.paths import sweep_fault
from crl_exp.config.sections import Known, build, fill, number_faults, once
from crl_exp.experiments.base import ExperimentKind, Unread
from crl_exp.experiments.layers import LayerSet
from crl_exp.experiments.schema import PRESETS, TYPED, Schema
from crl_exp.generation.config import COMPILED_AND_SPREAD, EngineConfig
from crl_exp.models.architecture import check_architecture
from crl_exp.models.config import ModelConfig
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.runs.directory import RESUME
from crl_exp.saes.config import SAEConfig
from crl_exp.steering.coefficients import Coefficient, Decay
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.methods.base import Method
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.base import STAGES, Stage
from crl_exp.tasks.base import Task
from crl_exp.tracking.config import TrackingConfig

PARTS: dict[str, type] = {
    "experiment": ExperimentKind,
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
    """A config whose every section is an object of its class; see `Schema` for the keys. Those that
    the kind of experiment doesn't read are `Unread`.

    rung: place on a ladder of runs that a report sets against each other (`comparison.ladder`).
    """

    sweep_name: str
    seed: int
    output_dir: str
    resume: str
    rung: int | None
    order: list[str]
    experiment: ExperimentKind
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

    def reads(self, section: str) -> bool:
        """Whether the kind of experiment reads a section."""
        return section in self.experiment.reads or section in EVERY_KIND

    @property
    def uses_seed(self) -> bool:
        """Whether another `seed` may give another result."""
        if not self.experiment.steers:
            return True
        drawn = self.method.uses_dictionary and self.sae.dictionary != "sae"
        return self.method.uses_seed or drawn or self.task.shuffle_labels

    @property
    def needs(self) -> frozenset[str]:
        """What a run needs; see `crl_exp.experiments.base.NEEDS`."""
        return self.experiment.needs(self)


def experiment(
    config: DictConfig, known: Known | None = None, plain: dict[str, Any] | None = None
) -> Experiment:
    """Build every section. Raises `UserError` with all faults of the config at once; one in a file
    that decides about the config (`settle`) comes first.

    known: of points that are only checked, not run: equal sections are then one object.
    plain: with `known`, the config as plain values, which takes milliseconds to find, where it is
        at hand: `plain_of` a config that is settled.
    """
    own_code.check(config)
    if known is None or plain is None or not compatibility.is_filled(plain):
        compatibility.fill_missing(config)
        settle(config)
        plain = plain_of(config) if known is not None else None
    faults = _unknown_sections(config)
    made: dict[str, Any] = {}
    kind = _kind(config, known)
    for name, cls in {**PARTS, **TYPED}.items():
        if name not in kind.reads and name not in EVERY_KIND:
            made[name] = Unread(name, kind.name)
            continue
        if _is_open(config, name, plain):
            faults.append(f"{name}: no option is chosen; set {name}=NAME")
            continue
        make = build if name in PARTS else fill
        content = None if plain is None else plain.get(name)
        try:
            made[name] = once(
                known, [name, content], lambda n=name, c=cls, m=make: m(config[n], n, c)
            )
        except UserError as error:
            faults.append(str(error))
    for section in made.values():
        if not isinstance(section, Unread) and hasattr(section, "faults"):
            faults += [fault for fault in section.faults() if fault]
    if config.resume not in RESUME:
        faults.append(
            f"resume={config.resume}: must be one of {', '.join(RESUME)}"
            f"{did_you_mean(config.resume, RESUME)}"
        )
    faults += [fault for fault in [sweep_fault(config.sweep_name)] if fault]
    if "order" in kind.reads:
        faults += _order_faults(list(config.order))
    faults += number_faults("seed", config.seed)
    if faults:
        raise UserError("\n".join(faults))
    top = {key: config.get(key) for key in ("sweep_name", "seed", "output_dir", "resume", "rung")}
    if "order" not in kind.reads:
        made["order"] = Unread("order", kind.name)
    else:
        made["order"] = list(config.order)
    if isinstance(made["task"], Task):
        made["task"] = made["task"].permuted_by(config.seed)
    return Experiment(**top, **made)


def _is_open(config: DictConfig, name: str, plain: dict[str, Any] | None) -> bool:
    """Whether no option of a section is chosen."""
    if plain is not None:  # many times as fast to ask
        return plain.get(name) in (None, "???")
    return OmegaConf.is_missing(config, name) or config[name] is None


def _kind(config: DictConfig, known: Known | None) -> ExperimentKind:
    """The kind of experiment, which says what else is read. Raises `UserError` as `build` does."""
    if OmegaConf.is_missing(config, "experiment") or not config.experiment:
        raise UserError("experiment: no kind is chosen; set experiment=steering")
    plain = OmegaConf.to_container(config.experiment, resolve=True)
    kind = once(
        known, ["experiment", plain], lambda: build(config.experiment, "experiment", ExperimentKind)
    )
    if (kind.name == STEERING["name"]) != is_steering(plain):
        raise UserError(
            f"experiment.name={kind.name}: results of steering, and of it alone, are filed under "
            f"{STEERING['name']}; leave the name as it comes"
        )
    return kind


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
    model = asdict(exp.model)
    config = once(known, ["architecture", model], lambda: check_architecture(exp.model))
    layers: list[int] = []
    faults: list[str] = []
    try:
        if "layers" in exp.needs:
            layers = _layers(exp, config.num_hidden_layers, known)
    except UserError as error:
        faults.append(str(error))
    k = exp.experiment.features_at_once(exp)
    for layer in with_sae(exp, layers, known):
        faults += once(
            known,
            ["metadata", model, asdict(exp.sae), layer, k],
            lambda at=layer: exp.sae.metadata_faults(at, config.hidden_size, exp.model.name, k),
        )
    if exp.model.device_map is not None and exp.reads("engine"):
        faults += [COMPILED_AND_SPREAD] if exp.engine.decode == "compiled" else []
    faults += [fault for fault in exp.experiment.conflicts(exp) if fault]
    if faults:
        raise UserError("\n".join(faults))
    return layers


def _layers(exp: Experiment, n_layers: int, known: Known | None) -> list[int]:
    """The layers that are looked at. Raises `UserError` for one that isn't there, or has no SAE
    where one is needed."""
    kind = exp.experiment
    if "sae" in exp.needs and exp.sae.absent:
        who = f"method={exp.method.name}" if exp.reads("method") else f"experiment={kind.name}"
        raise UserError(
            f"{who} needs SAEs with these options, and sae=none gives none: "
            "choose sae=… (`ls conf/sae`), or a method that works with residuals (probe, "
            "probe_steering, raw_residual)"
        )
    return exp.layers.resolve(_available(exp, known), n_layers, "sae" in exp.needs)


def _available(exp: Experiment, known: Known | None) -> list[int] | None:
    """Layers that have an SAE; None where no SAEs are looked for."""
    if not exp.reads("sae") or exp.sae.absent:
        return None
    return once(known, ["available", asdict(exp.sae)], lambda: exp.sae.available)


def with_sae(exp: Experiment, layers: list[int], known: Known | None = None) -> list[int]:
    """Those of these layers that have an SAE."""
    available = _available(exp, known) if layers else None
    return [layer for layer in layers if available and layer in available]
