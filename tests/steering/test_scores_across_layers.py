"""Scores between layers: which layer CorrSteer-S takes, and what enters the policy's logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.controller import Unsteered
from tests.helpers.tiny_run import LAYERS, lab_of

FISHER = dict(zip(LAYERS, (0.05, 0.48, 4.87), strict=True))
BEST, FORBIDDEN = 5, 6


@pytest.fixture(scope="module")
def common(tiny_files, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("across")
    return [*tiny_files.overrides(), "layers=all", f"output_dir={out}", "method.multipliers=[1]"]


def with_fisher(overrides: list[str]) -> RunWorkspace:
    """Feature 5 has the highest ratio of each layer, but for one of the first layer that is active
    in too few answers."""
    workspace = lab_of([*overrides, "warmup.score=fisher"])
    made = {}
    for layer, statistics in workspace.statistics().items():
        fisher_F = torch.linspace(-1, 1, workspace.saes[layer].d_sae, dtype=torch.float64) * 0.01
        frequency_F = torch.ones_like(fisher_F)
        fisher_F[BEST] = FISHER[layer]
        if layer == LAYERS[0]:
            fisher_F[FORBIDDEN], frequency_F[FORBIDDEN] = 1000.0, 0.0
        by_feature = {**statistics.by_feature, "fisher": fisher_F, "frequency": frequency_F}
        made[layer] = replace(statistics, by_feature=by_feature).scored(workspace.exp.warmup)
    workspace._statistics = made
    return workspace


def test_s_takes_the_layer_of_the_highest_score(common):
    workspace = with_fisher([*common, "method=corrsteer_s"])
    (steer,) = workspace.exp.method.select(workspace)  # type: ignore[attr-defined]
    assert (steer.layer, steer.feature_idx) == (LAYERS[-1], BEST)


def test_the_logits_take_scores_on_one_scale_for_all_layers(common):
    """The highest that may be steered, of all layers, becomes 1."""
    workspace = with_fisher([*common, "method=crl"])
    for layer, agent in workspace.exp.method.free_agents(workspace).items():  # type: ignore[attr-defined]
        at = agent.allowed_C.tolist().index(BEST)
        assert FORBIDDEN in agent.allowed_C or layer == LAYERS[0]
        assert float(agent.correlation_C[at]) == pytest.approx(FISHER[layer] / 4.87)
        assert float(agent.correlation_C.abs().max()) <= 1


def test_r_enters_the_logits_as_it_is(common):
    workspace = lab_of([*common, "method=crl"])
    for layer, agent in workspace.exp.method.free_agents(workspace).items():  # type: ignore[attr-defined]
        r_F = workspace.statistics()[layer].correlation
        assert torch.equal(agent.correlation_C, r_F[agent.allowed_C].float())


@pytest.mark.parametrize("statistic", ["mean_positive", "mean_active", "contrastive"])
def test_what_is_steered_against_is_taken_away_as_much_as_there_is_in_failure(statistic, common):
    """By hand, from the activations at the one steered token of each training answer."""
    workspace = lab_of([*common, "warmup.negative=steer", f"coefficient={statistic}"])
    good_B = workspace.answer(Unsteered(), "train").reward_B > 0
    for layer, sae in workspace.saes.items():
        x_BD = workspace.prompts("train").batch(range(len(good_B))).residual(sae.site)
        z_BF = sae.encode(x_BD).double()
        means = {}
        for name, group_BF in (("good", z_BF[good_B]), ("bad", z_BF[~good_B])):
            active_F = (group_BF > 0).sum(0).clamp(min=1)
            n = {"mean_active": active_F}.get(statistic, torch.tensor(len(group_BF)))
            means[name] = group_BF.sum(0) / n
        if statistic == "contrastive":
            difference_F = (means["good"] - means["bad"]).abs()
            means = {"good": difference_F, "bad": difference_F}
        r_F = workspace.statistics()[layer].correlation
        plain_F = means["good"] if statistic != "contrastive" else r_F.sign() * means["good"]
        expected_F = torch.where(r_F < 0, -means["bad"], plain_F).float()
        assert (r_F < 0).any() and (r_F > 0).any()
        torch.testing.assert_close(workspace.coefficients(layer), expected_F, atol=1e-5, rtol=1e-4)


def test_dropped_are_all_features_that_do_not_go_with_success(common):
    for name in ("crl", "random"):
        workspace = lab_of([*common, f"method={name}", "warmup.negative=drop"])
        for statistics in workspace.statistics().values():
            allowed_C, r_F = statistics.allowed(0.02), statistics.correlation
            expected_F = (statistics.by_feature["frequency"] >= 0.02) & (r_F > 0)
            assert allowed_C.tolist() == expected_F.nonzero()[:, 0].tolist()
            assert 0 < len(allowed_C) < int((statistics.by_feature["frequency"] >= 0.02).sum())


def without_success(overrides: list[str]) -> RunWorkspace:
    """No feature of layer 1 goes with success."""
    workspace = lab_of(overrides)
    made = workspace.statistics()
    negative_F = -made[1].correlation.abs() - 0.01
    by_feature = {**made[1].by_feature, "correlation": negative_F}
    workspace._statistics = {
        **made,
        1: replace(made[1], by_feature=by_feature).scored(workspace.exp.warmup),
    }
    return workspace


def test_a_layer_whose_features_all_go_with_failure_is_left_out_or_said(common):
    workspace = without_success([*common, "method=corrsteer_a", "warmup.negative=drop"])
    assert [s.layer for s in workspace.exp.method.select(workspace)] == [0, 2]  # type: ignore[attr-defined]
    assert any("layer 1: no feature with r > 0" in text for text in workspace.warnings)
    workspace = without_success([*common, "method=corrsteer_a"])
    assert [s.layer for s in workspace.exp.method.select(workspace)] == [0, 1, 2]  # type: ignore[attr-defined]
    (said,) = [text for text in workspace.warnings if "r = -" in text]
    assert said.startswith("layer 1:") and "warmup.negative=drop" in said


def test_where_no_layer_is_left_nothing_is_steered(common):
    workspace = without_success(
        [*common, "method=corrsteer_s", "warmup.negative=drop", "layers=single", "layers.layer=1"]
    )
    assert isinstance(workspace.exp.method.prepare(workspace), Unsteered)


def test_crl_leaves_layers_without_an_allowed_feature_out(common):
    """As CorrSteer does; the others are steered."""
    workspace = without_success([*common, "method=crl", "warmup.negative=drop"])
    assert sorted(workspace.exp.method.free_agents(workspace)) == [la for la in LAYERS if la != 1]  # type: ignore[attr-defined]
    (said,) = [text for text in workspace.warnings if "nothing is added there" in text]
    assert said.startswith("layer 1:")
