"""What a program of one's own asks for: a run, a model, SAEs, a task, from a composed config.

`crl_exp` exports these functions. They change nothing of the config that they are given, nor of the
process's environment variables.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.experiments.config import Experiment
from crl_exp.experiments.run import run_experiment
from crl_exp.generation.model_check import checked
from crl_exp.models import language_model
from crl_exp.models.architecture import check_architecture
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs.directory import RunDirectory
from crl_exp.saes import layer_sae
from crl_exp.saes.dictionaries import with_dictionary
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.tasks.base import Task


def run(config: DictConfig) -> dict[str, Any]:
    """Run a composed experiment in its run directory; returns what result.json holds.

    One that was cut off goes on from its checkpoint, and of a finished one the result is read:
    `resume=force` runs it anew. Raises `UserError` for whatever is wrong with it, and where another
    process has the run.
    """
    with _environment_kept():
        result = run_experiment(copy.deepcopy(config), skip_finished=True)
    if result is None:
        path = RunDirectory(config).path
        raise UserError(
            f"{path} is left alone: another process has it, or resume=retry, which starts only "
            "failed, lost and cancelled runs; `crl-exp status` tells which"
        )
    return result


def load_model(config: DictConfig) -> LanguageModel:
    """The language model of a composed config, on its device, tried as every run tries it.

    Raises `UserError` where it can't be had, or can't be steered.
    """
    return checked(language_model.load_model(_experiment(config).model))


def load_saes(config: DictConfig, layers: Sequence[int] | None = None) -> dict[int, LayerSAE]:
    """SAEs of a composed config by layer, on the model's device; the model isn't loaded for it.

    layers: those that the config steers, unless named. Raises `UserError` where one can't be had or
    doesn't fit the model.
    """
    exp = _experiment(config)
    if not exp.reads("sae") or exp.sae.absent:
        raise UserError(
            "this config has no SAEs (sae=none, or an analysis): compose one with sae=…"
        )
    if layers is None:
        layers = configs.validate(exp)
    d_model, device = check_architecture(exp.model).hidden_size, torch.device(exp.model.device)
    found = layer_sae.load_saes(exp.sae, list(layers), d_model, exp.model.name, device)
    kind = exp.sae.dictionary
    if kind == "sae":
        return found
    return {layer: with_dictionary(sae, kind, exp.seed) for layer, sae in found.items()}


def load_task(config: DictConfig) -> Task:
    """The task of a composed config: `splits()` draws its items, `score(items, texts)` scores."""
    return _experiment(config).task


def _experiment(config: DictConfig) -> Experiment:
    """The config's sections as objects. Raises `UserError` with all faults of the config."""
    return configs.experiment(copy.deepcopy(config))


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Environment variables that are set within (MLflow is told to be quiet so) are as before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
