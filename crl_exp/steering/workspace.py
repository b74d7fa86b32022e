"""What methods may ask for of an experiment: model, SAEs, items, answers, statistics, notes.

A method sees this and no more of what runs it (`crl_exp.experiments.workspace.Workspace`), so that
it can be read, tested and written without it. Shapes: B answers, D d_model, F d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from crl_exp.analysis.winners_curse import Tried
from crl_exp.generation.config import EngineConfig
from crl_exp.generation.controller import Controller
from crl_exp.generation.engine import Engine, Prompts
from crl_exp.generation.results import Generation
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.models.config import ModelConfig
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs.checkpoints import CheckpointConfig
from crl_exp.runs.directory import RunDirectory
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.answers import Answers
from crl_exp.steering.coefficients import Coefficient, Decay
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.base import Stage
from crl_exp.tasks.base import Task
from crl_exp.tasks.data.items import Splits


class SteeringConfig(Protocol):
    """Of an experiment's config, what methods and stages read; see `conf/` for the keys."""

    @property
    def seed(self) -> int: ...
    @property
    def order(self) -> list[str]: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def sae(self) -> SAEConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def warmup(self) -> WarmupConfig: ...
    @property
    def policy(self) -> PolicyConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def task(self) -> Task: ...
    @property
    def layers(self) -> Any: ...
    @property
    def method(self) -> Any: ...
    @property
    def activation(self) -> Stage: ...
    @property
    def stages(self) -> dict[str, Stage]: ...
    @property
    def coefficient(self) -> Coefficient: ...
    @property
    def decay(self) -> Decay: ...
    @property
    def algorithm(self) -> Algorithm: ...


class Workspace(Protocol):
    """What an experiment offers to its method."""

    @property
    def exp(self) -> SteeringConfig: ...
    @property
    def run(self) -> RunDirectory:
        """Where checkpoints and the journal go."""
        ...

    @property
    def lm(self) -> LanguageModel: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def saes(self) -> dict[int, LayerSAE]:
        """By layer, those of the steered layers, where the method needs any."""
        ...

    @property
    def layers(self) -> Sequence[int]:
        """Those that are looked at, ascending."""
        ...

    @property
    def sites(self) -> dict[int, int]:
        """By layer, the site of its residual: its SAE's, or its output's where there is none."""
        ...

    @property
    def splits(self) -> Splits: ...
    @property
    def options(self) -> Options | ItemOptions | None:
        """What an answer is restricted to; None: nothing."""
        ...

    def own_options(self, split: str) -> Sequence[Options] | None:
        """The options of each item of a split, where each has its own."""
        ...

    @property
    def n_tokens(self) -> int:
        """Steered tokens that an answer has at most."""
        ...

    @property
    def signed_by_method(self) -> dict[int, Tensor]:
        """Coefficients [F] whose signs aren't r's, by layer."""
        ...

    @property
    def tried(self) -> Tried:
        """What was chosen among on validation."""
        ...

    @property
    def notes(self) -> dict[str, Any]:
        """What was found on the way, for the result."""
        ...

    @property
    def warmup_home(self) -> Path: ...

    def alone(self, layer: int) -> Workspace:
        """This one with one of its layers only, notes and a folder of its own for checkpoints."""
        ...

    # --- what is said of the run ---

    def warn(self, message: str) -> None:
        """Say it now and keep it in the result."""

    def note(self, name: str, value: Any) -> None:
        """Keep something found on the way in the result."""

    def bar(
        self, what: str, total: int, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar; what it gives is told how many more are done."""
        ...

    # --- prompts and answers ---

    def prompts(self, split: str) -> Prompts:
        """A split's prompts, read when first asked for."""
        ...

    def prompts_kept(self, split: str) -> Prompts | None: ...

    def prompt_ids(self, split: str) -> list[list[int]]: ...

    def read(self, split: str, ids: list[list[int]]) -> Prompts:
        """These token ids in place of the split's own prompts."""
        ...

    def generated(
        self,
        controller: Controller,
        prompts: Prompts,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        """The model's answers to these of the prompts, under a controller."""
        ...

    def answer(
        self,
        answerer: Any,
        split: str,
        items: Sequence[int] | None = None,
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Answers:
        """Answers to these items of a split (all, by default), scored by the task."""
        ...

    def baseline(self, split: str) -> Answers:
        """The unsteered model's answers."""
        ...

    def depends_on(self, split: str) -> list[Any]:
        """What answers to a split depend on besides the controller."""
        ...

    def play(self, controller: Controller, items: list[int]) -> tuple[Generation, Tensor]:
        """A recorded rollout on training items, and its rewards [B]."""
        ...

    def validation_reward(self, answerer: Any) -> float:
        """Mean reward on validation, for choosing between controllers and the like."""
        ...

    def training_reward(self, answerer: Any, rewards: list[float]) -> float:
        """Mean reward on validation in the middle of training."""
        ...

    # --- features ---

    def statistics(self) -> dict[int, LayerStatistics]:
        """Stage 1's statistics of the steered layers."""
        ...

    def coefficients(self, layer: int) -> Tensor:
        """Coefficient of every feature [F]."""
        ...

    def fixed(self, steers: list[Steer]) -> Controller:
        """Adds these features; none of them: the unsteered model itself."""
        ...

    def vectors(self, vector_D: dict[int, Tensor]) -> Controller:
        """Adds these; none of them: the unsteered model itself."""
        ...
