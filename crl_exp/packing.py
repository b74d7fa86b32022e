"""Several runs in one process, their rows in one batch: `run_pack`.

Decoding is bound by reading the weights, so rows of other runs in the same batch cost little. Each
run is `run_experiment`, the same as alone, in a thread of its own, with its own directory, random
streams, optimisers, checkpoint and result. The threads take turns: one of all works at a time, and
gives its turn away only where it asks the engine for answers. When every run asks or has ended,
the questions are answered together. So any method is packed, and none knows of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from crl_exp import config as configs
from crl_exp import preemption
from crl_exp.errors import UserError
from crl_exp.experiment import run_experiment
from crl_exp.lab import Lab
from crl_exp.methods import NoSteering
from crl_exp.runs import RunDirectory, content_key
from crl_exp.seats import Outcome, Pack

log = logging.getLogger(__name__)
SHARED = ("model", "sae", "task", "engine")
"""Sections of the config that runs of a pack have in common: model and precision, SAE release, task
and decoding, engine."""


def pack_key(config: DictConfig) -> str:
    """Runs with the same key may be packed together."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return content_key({name: plain[name] for name in SHARED})


def run_pack(runs: Sequence[DictConfig], skip_finished: bool = True) -> list[Outcome]:
    """Run composed configs together; returns each one's result, or the exception it ended with, or
    None where `run_experiment` left it alone.

    A run that fails ends alone, with its own status; the others go on. The results are those of
    running each alone, as far as rounding goes: matrix products of another shape differ in the last
    bits, so an action or a token can differ only where two candidates are that close. An interrupt
    ends all runs. Asked to end early, they all end after their step, saved, and `Preempted` is
    raised. Raises `UserError` where they can't share a model.
    """
    keys = [pack_key(config) for config in runs]
    if len(set(keys)) > 1:
        raise UserError(
            f"runs of a pack must have {', '.join(SHARED)} in common; pack those of one pack_key"
        )
    with preemption.guard():  # here: signals come to the main thread, not to those of the runs
        _share_warmup(runs)
        pack = Pack()
        for config in runs:
            pack.seat(
                lambda make, config=config: run_experiment(config, skip_finished, make, len(runs))
            )
        outcomes = pack.play()
        for outcome in outcomes:
            if isinstance(outcome, preemption.Preempted):
                raise outcome
    return outcomes


def _share_warmup(runs: Sequence[DictConfig]) -> None:
    """Stage 1 for all layers of the runs in one pass; each run then finds its own in the store."""
    by_warmup: dict[str, tuple[configs.Experiment, DictConfig, set[int]]] = {}
    for config in runs:
        try:
            exp = configs.experiment(config)
            layers = configs.validate(exp)
        except UserError:
            continue  # it is told where this run itself begins
        if isinstance(exp.method, NoSteering) or RunDirectory(config).result() is not None:
            continue
        same = content_key([asdict(exp.warmup), exp.output_dir])
        _, _, wanted = by_warmup.setdefault(same, (exp, config, set()))
        wanted.update(layers)
    for exp, config, wanted in by_warmup.values():
        try:
            Lab(exp, sorted(wanted), RunDirectory(config)).statistics()
        except Exception as error:  # whatever it is: the run that it concerns meets it again
            log.warning("warmup of all layers at once failed, each run warms up alone: %s", error)
