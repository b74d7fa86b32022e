"""Several runs in one process, their rows in one batch: `run_pack`.

Decoding is bound by reading the weights, so rows of other runs in the same batch cost little. Each
run is `run_experiment`, the same as alone, in a thread of its own, with its own directory, random
streams, optimisers, checkpoint and result. The threads take turns: one of all works at a time, and
gives its turn away only where it asks the engine for answers. When every run asks or has ended,
the questions are answered together. So any method is packed, and none knows of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.config.keys import content_key, run_key, sections_read
from crl_exp.config.sections import Known
from crl_exp.experiments import config as configs
from crl_exp.experiments.run import RunHost, run_experiment
from crl_exp.experiments.turns import Outcome, Pack, PackedRun
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs import preemption
from crl_exp.runs.directory import RunDirectory
from crl_exp.steering.feature_statistics.fit import store_fits

log = logging.getLogger(__name__)
SHARED = ("model", "sae", "task", "engine")
"""Sections of the config that runs of a pack have in common: model and precision, SAE release, task
and decoding, engine."""


def pack_key(config: DictConfig) -> str:
    """Runs with the same key may be packed together."""
    return content_key(section_keys(config))


def section_keys(config: DictConfig) -> dict[str, str]:
    """The content of each section that runs of a pack have in common, as a key."""
    plain: Any = sections_read({
        name: OmegaConf.to_container(config[name], resolve=True)
        for name in ("experiment", *SHARED) if name in config
    })  # fmt: skip
    return {name: content_key(plain.get(name)) for name in SHARED}


def run_pack(runs: Sequence[DictConfig], skip_finished: bool = True) -> list[Outcome]:
    """Run composed configs together; returns each one's result, or the exception it ended with, or
    None where `run_experiment` left it alone.

    A run that fails ends alone, with its own status; the others go on. So does one that is
    cancelled by itself (`RunStatus.cancel_path`), with `Preempted` for its outcome. The results are
    those of running each alone, as far as rounding goes: matrix products of another shape differ in
    the last bits, so an action or a token can differ only where two candidates are that close. An
    interrupt ends all runs. Asked to end early, they all end after their step, saved, and
    `Preempted` is raised. Raises `UserError` where they can't share a model.
    """
    keys = [pack_key(config) for config in runs]
    if len(set(keys)) > 1:
        raise UserError(
            f"runs of a pack must have {', '.join(SHARED)} in common; pack those of one pack_key"
        )
    with preemption.guard():  # here: signals come to the main thread, not to those of the runs
        wanted, pack = _wanted_layers(runs), Pack()
        packed = sum(not _is_done(config) for config in runs)
        for number, config in enumerate(runs):

            def work(make: MakeEngine, number: int = number, config: DictConfig = config) -> Any:
                place = PackHost(pack.seats[number], make, packed, wanted)
                return run_experiment(config, skip_finished, place)

            pack.seat(work, run_key(config))
        outcomes = pack.play()
        if preemption.asked():
            _end_together(outcomes)
    return outcomes


MakeEngine = Callable[[LanguageModel, EngineConfig], Engine]
Layers = dict[str, set[int]]
"""Layers that a pack's runs steer, by what else their stage 1 depends on (`_warmup_key`)."""


class PackHost(RunHost):
    """A run's place in a pack. packed: runs that aren't done. layers: that the pack steers."""

    def __init__(self, seat: PackedRun, make_engine: MakeEngine, packed: int, layers: Layers):
        self.seat, self.make_engine = seat, make_engine
        self.packed, self.layers = max(packed, 1), layers

    def engine(self, lm: LanguageModel, config: EngineConfig) -> Engine:
        return self.make_engine(lm, config)

    def begun(self, run: RunDirectory) -> None:
        """Let the others begin too, before the first one loads: all are at work from then on."""
        self.seat.cancel_path = run.cancel_path
        log.info("begun, one of %d together", self.packed)
        self.seat.pause()

    def warming_up(self, workspace: RunWorkspace) -> None:
        """Stage 1 for all layers of the pack in one pass; each run then finds its own stored."""
        layers = self.layers.get(_warmup_key(workspace.exp), set()) | set(workspace.saes)
        if layers == set(workspace.saes):
            return
        try:
            whole = RunWorkspace(
                workspace.exp, sorted(layers), workspace.run, lambda lm, config: workspace.engine
            )
            whole.statistics()
            store_fits(whole)
        except Exception as error:  # whatever it is: the run that it concerns meets it again
            log.warning("warmup of all layers at once failed, each run warms up alone: %s", error)


def _wanted_layers(runs: Sequence[DictConfig]) -> Layers:
    wanted: Layers = {}
    known = Known()
    for config in runs:
        try:
            exp = configs.experiment(config, known)
            layers = configs.validate(exp, known)
        except UserError:
            continue  # it is told where this run itself begins
        if "feature_statistics" in exp.needs and not _is_done(config):
            wanted.setdefault(_warmup_key(exp), set()).update(layers)
    return wanted


def _warmup_key(exp: configs.Experiment) -> str:
    return content_key([asdict(exp.warmup), exp.output_dir])


def _is_done(config: DictConfig) -> bool:
    run = RunDirectory(config)
    try:
        return not run.from_scratch and run.result() is not None
    except UserError:
        return False  # damaged: it is told where this run itself begins


def _end_together(outcomes: Sequence[Outcome]) -> None:
    """Raise the `Preempted` of a run that is to go on, if there is one, so that the job is put
    back; or else that of one which was cancelled."""
    ended = [outcome for outcome in outcomes if isinstance(outcome, preemption.Preempted)]
    for preempted in sorted(ended, key=lambda one: one.cancelled):
        raise preempted
