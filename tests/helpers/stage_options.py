"""Every stage there is, found by globbing `conf/`, and contexts that any of them can work with."""

from __future__ import annotations

import copy
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from crl_exp.analysis.row_random import RowRandom
from crl_exp.experiments import config as configs
from crl_exp.steering.stages.base import STAGES, Observation, Pipeline, Shape, Stage, StageContext

CONF = Path(__file__).resolve().parents[2] / "conf"
INF = float("inf")
ORDERS = list(permutations(STAGES))
OPTIONS = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in STAGES}
# Every combination is more than 1,500; each option is met with every other of another group here.
EACH = [(group, name) for group in STAGES for name in OPTIONS[group]]
PAIRS = [
    {one: a, other: b}
    for i, one in enumerate(STAGES)
    for other in STAGES[i + 1 :]
    for a, b in product(OPTIONS[one], OPTIONS[other])
]
PLAIN = {"fusion": "add", "noise": "none", "activation": "identity", "mask": "none"}
LOGITS = torch.tensor([[1.0, -2.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]])
N_FEATURES, D_MODEL, N_TOKENS = 4, 3, 4


def built(group: str, name: str, **changes: Any) -> Stage:
    """The stage of `conf/GROUP/NAME.yaml`, with these values in place of its own."""
    if not changes:
        return copy.deepcopy(_as_it_comes(group, name))
    node = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"), changes)
    assert isinstance(node, DictConfig)
    return configs.build(node, group, Stage)


@cache
def _as_it_comes(group: str, name: str) -> Stage:
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return configs.build(node, group, Stage)


def made(stage: Stage, n_features: int = N_FEATURES) -> Stage:
    """Bound to the sizes of `LOGITS` and `context`."""
    stage.bind(Shape(n_features, D_MODEL, N_TOKENS, k=1))
    return stage


def piped(order: tuple[str, ...] = STAGES, n_features: int = N_FEATURES, **names: str) -> Pipeline:
    """A pipeline of options by their names; those not named are plain."""
    chosen = {**PLAIN, **names}
    pipeline = Pipeline({group: built(group, chosen[group]) for group in STAGES}, list(order))
    pipeline.bind(Shape(n_features, D_MODEL, N_TOKENS, k=1))
    return pipeline


def context(explore: bool = False, seed: int = 0, n: int = 2, **changes: Any) -> StageContext:
    """Two rows (or n, repeating) with everything a stage may ask for."""

    def rows(values: list) -> torch.Tensor:
        return torch.tensor((values * n)[:n])

    acts_C = torch.tensor([0.0, 2.0, 0.1, 3.0])
    at = Observation(
        obs_BD=rows([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]),
        token_index_B=rows([0, 3]),
        feature_acts_BC=acts_C.expand(n, -1),
        seen_BC=torch.tensor([True, True, False, True]).expand(n, -1),
        importance_BC=torch.tensor([0.5, 0.0, 0.2, 0.3]).expand(n, -1),
        past_B=rows([-INF, 2.0]),
        prompt_tokens_B=rows([4, 7]),
    )
    values: dict[str, Any] = {
        "correlation_C": torch.tensor([0.5, -1.0, 0.25, 0.1]),
        "value_BX": rows([[0.75], [-1.0]]),
        "length_B": rows([0.0, 1.0]),
        "norm_B": rows([40.0, 60.0]),
        "draws": RowRandom(seed, torch.arange(n)),
    }
    return StageContext(at, explore=explore, **{**values, **changes})
