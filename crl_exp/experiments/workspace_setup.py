"""What a workspace is made of: model, engine, SAEs, splits and options, loaded once a process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor

from crl_exp.analysis.winners_curse import Tried
from crl_exp.experiments.config import Experiment, with_sae
from crl_exp.experiments.fed import look_at, options_for
from crl_exp.experiments.inputs import scorer_inputs
from crl_exp.experiments.shared import layer_sae, shared_model, shared_splits
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.model_check import checked
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.models.language_model import LanguageModel, load_model
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.heartbeat import progress_bar
from crl_exp.saes.layer_sae import LayerSAE, site_of
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.tasks.base import Splits

log = logging.getLogger(__name__)


class WorkspaceSetup:
    """What is loaded, and what is said and noted on the way."""

    def __init__(
        self,
        exp: Experiment,
        layers: list[int],
        run: RunDirectory,
        make_engine: Callable[[LanguageModel, EngineConfig], Engine] = Engine,
    ):
        self.exp, self.run = exp, run
        self.notes: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.splits: Splits = shared_splits(exp.task)
        self.scorers = scorer_inputs(exp.task)
        self.model_key = asdict(exp.model)
        self.engine_key = [self.model_key, asdict(exp.engine)]
        self.lm = shared_model(self.model_key, lambda: checked(load_model(exp.model)))
        self.engine = make_engine(self.lm, exp.engine)
        self.layers = list(layers)
        with_features = exp.needs & {"sae", "feature_statistics"}
        self.saes: dict[int, LayerSAE] = {
            layer: layer_sae(exp.sae, layer, self.lm, self.model_key, exp.seed)
            for layer in layers
            if with_features
        }
        self.sites = self._sites()
        self.before_statistics: Callable[[], None] = lambda: None
        for sae in self.saes.values():
            for warning in sae.warnings:
                self.warn(warning)
        for warning in self.splits.warnings:
            self.warn(warning)
        self.options = options_for(exp.task, self.lm, self.splits)
        lengths, warning = look_at(exp.task, self.lm, self.options, self.splits.test[0].user)
        if lengths:
            self.note("option_tokens", lengths)
        if warning:
            self.warn(warning)
        self._statistics: dict[int, LayerStatistics] | None = None
        self.signed_by_method: dict[int, Tensor] = {}  # coefficients [F] whose signs aren't r's
        self.tried = Tried()  # whatever was chosen among, at all layers
        self._asked = 0  # times that a controller was tried on validation

    def _sites(self) -> dict[int, int]:
        """Of each layer the site at which its residual is read and steered: its SAE's; where there
        is none, its output."""
        own = {layer: layer for layer in self.layers}
        if self.saes:
            return own | {layer: sae.site for layer, sae in self.saes.items()}
        there = with_sae(self.exp, self.layers)
        return own | {layer: site_of(self.exp.sae.metadata(layer).hook_name) for layer in there}

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """One of the run's phases: its seconds are noted, and status names it."""
        return self.run.progress.timed(phase)

    def own_options(self, split: str) -> tuple[Options, ...] | None:
        """The options of each item of a split, where each has its own."""
        return self.options.of[split] if isinstance(self.options, ItemOptions) else None

    @property
    def n_tokens(self) -> int:
        """Steered tokens that an answer has at most."""
        return self.exp.task.max_new_tokens if self.options is None else self.options.longest

    def warn(self, message: str) -> None:
        """Say it now and keep it in the result."""
        log.warning(message)
        self.warnings.append(message)

    def note(self, name: str, value: Any) -> None:
        """Keep something found on the way (a chosen multiplier, say) in the result."""
        self.notes[name] = value

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar, told by the heartbeat too. done: steps of an earlier attempt."""
        told = self.run.progress
        with told.bar(what, total), progress_bar(what, total) as bar:

            def advance(n: int) -> None:
                told.advance(n)
                bar(n)

            advance(done)
            told.known(done)
            yield advance

    def fixed(self, steers: list[Steer]) -> Controller:
        """Adds these features; none of them: the unsteered model itself."""
        return FixedFeatures(steers, self.saes, self.exp.decay) if steers else Unsteered()

    def vectors(self, vector_D: dict[int, Tensor]) -> Controller:
        """Adds these; none of them: the unsteered model itself."""
        if not vector_D:
            return Unsteered()
        there = {layer: vector.to(self.lm.device) for layer, vector in vector_D.items()}
        return FixedVectors(there, self.sites, self.exp.decay)
