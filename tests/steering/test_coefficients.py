"""Each option of conf/coefficient and conf/decay by hand; a file not listed here fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from crl_exp.experiments.config import build
from crl_exp.generation.controller import StepContext
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Coefficient, Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.feature_statistics.correlation import StreamingCorrelation
from crl_exp.steering.feature_statistics.store import LayerStatistics
from tests.helpers.tiny_steering import PlainSAE, statistics

CONF = Path(__file__).parents[2] / "conf"
# Decoder rows of lengths 5, .5 and 0: a dead one must not divide by zero.
W_DEC = torch.tensor([[3.0, 4.0], [0.5, 0.0], [0.0, 0.0]])
# Rewarded: rows 0, 1 and 2. Feature 0 is active in two of them, feature 1 in one, 2 in none.
Z = torch.tensor([[3.0, 0, 0], [1.0, 0, 0], [0.0, 2, 0], [0.0, 4, 0], [1.0, 0, 0]])
Y = torch.tensor([1.0, 1, 1, 0, 0])


def option(group: str, name: str, base: type, **changes: Any) -> Any:
    node = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"), changes)
    assert isinstance(node, DictConfig)
    return build(node, group, base)


@pytest.fixture
def measured() -> LayerStatistics:
    stream = StreamingCorrelation()
    stream.update(Z, Y)
    # Median, mean and deviation of the residual's length all differ.
    plain = statistics(1, 2, d_sae=3)
    return replace(plain, median_norm=8.0, norm_mean=9.0, by_feature=stream.statistics())


BY_HAND = {
    "unit": ({}, [1.0, 1.0, 1.0]),
    "constant": ({"value": 30.0}, [30.0, 30.0, 30.0]),
    "mean_positive": ({}, [4 / 3, 2 / 3, 0.0]),
    "mean_active": ({}, [2.0, 2.0, 0.0]),
    "contrastive": ({}, [4 / 3 - 1 / 2, 2 / 3 - 2.0, 0.0]),
    # .25 · 8 / ‖row‖: each moves the residual by 2.
    "relative": ({"ratio": 0.25}, [0.4, 4.0, 2e8]),
}


def test_every_option_is_worked_out_here():
    assert set(BY_HAND) == {path.stem for path in (CONF / "coefficient").glob("*.yaml")}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_each_coefficient_by_hand(name, multiplier, measured):
    changes, expected = BY_HAND[name]
    made = option("coefficient", name, Coefficient, **changes, multiplier=multiplier)
    sae = LayerSAE(1, "blocks.1.hook_resid_post", PlainSAE(W_DEC, torch.zeros(2)))
    values_F = made.values(measured, sae)
    assert values_F.dtype == torch.float32
    assert values_F.tolist() == pytest.approx([multiplier * value for value in expected])


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [("none", {}, [1.0, 1.0, 1.0, 1.0]), ("exponential", {"gamma": 0.5}, [1.0, 0.5, 0.25, 0.125])],
)
def test_decay_by_hand(name, changes, expected):
    """α_t = α · γ^t, t = 0 at the last prompt token; for features and for plain vectors alike."""
    decay = option("decay", name, Decay, **changes)
    sae = LayerSAE(1, "blocks.1.hook_resid_post", PlainSAE(W_DEC, torch.ones(2)))
    fixed = FixedFeatures([Steer(1, 0, 2.0)], {1: sae}, decay)
    vector = FixedVectors({1: torch.tensor([1.0, -2.0])}, {1: 1}, decay)
    for t, share in enumerate(expected):
        assert decay.at(t) == share
        here = StepContext(t, [0], torch.ones(1, dtype=torch.bool))
        action = fixed.act(1, torch.zeros(1, 2), here)
        assert action.coefficient_BK.tolist() == [[2 * share]]
        assert action.delta_BD.tolist() == [[6 * share, 8 * share]]
        assert vector.act(1, torch.zeros(1, 2), here).delta_BD.tolist() == [[share, -2 * share]]
