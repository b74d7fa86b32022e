"""Controls: how long their additions are, what they are made of, and that they are logged alike."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.controller import StepContext, Unsteered
from crl_exp.steering.controllers.fixed import FixedFeatures
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.methods.residual_means import ResidualMeans, ResidualObserver, residual_means
from tests.helpers.tiny import D_MODEL
from tests.helpers.tiny_run import LAYERS, lab_of, random_sae_weights, run_small, save_sae
from tests.helpers.tiny_steering import statistics
from tests.steering.test_parity import TASK

CONTROLS = ("random", "random_direction", "top_activation", "raw_residual")


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), "layers=all", f"output_dir={tmp_path / 'out'}",
            "coefficient=mean_positive"]  # fmt: skip


def prepared(workspace: RunWorkspace) -> dict[int, torch.Tensor]:
    """What the workspace's method adds at each layer at the first steered token [D]."""
    controller = workspace.exp.method.prepare(workspace)
    if isinstance(controller, FixedVectors):
        return controller.vector_D
    assert isinstance(controller, FixedFeatures)
    return {
        layer: (coefficient_1K.T * workspace.saes[layer].W_dec_FD[feature_1K[0]]).sum(0)
        for layer, (feature_1K, coefficient_1K) in controller.by_layer.items()
    }


@pytest.mark.parametrize(
    "control", ["random", "random_direction", "raw_residual method.norm_match=true"]
)
def test_matched_additions_are_as_long_as_corrsteers(control, common):
    wanted = prepared(lab_of([*common, "method=corrsteer_a"]))
    method, *more = control.split()
    got = prepared(lab_of([*common, f"method={method}", *more]))
    assert set(got) == set(LAYERS)
    for layer in LAYERS:
        assert float(got[layer].norm()) == pytest.approx(float(wanted[layer].norm()), rel=1e-5)
        assert not torch.allclose(got[layer], wanted[layer])


@pytest.mark.parametrize(
    "control", ["random", "random_direction", "raw_residual method.norm_match=true"]
)
def test_lengths_match_where_decoder_rows_differ_in_length(control, common, tmp_path):
    """Rows from .5 to 3 long: the same coefficient is another length."""
    for layer in LAYERS:
        weights = random_sae_weights(layer)
        weights["W_dec"] *= torch.linspace(0.5, 3.0, len(weights["W_dec"]))[:, None]
        save_sae(tmp_path / "uneven", layer, weights)
    uneven = [*common, f"sae.folder={tmp_path / 'uneven'}"]
    wanted = prepared(lab_of([*uneven, "method=corrsteer_a"]))
    method, *more = control.split()
    got = prepared(lab_of([*uneven, f"method={method}", *more]))
    for layer in LAYERS:
        assert float(got[layer].norm()) == pytest.approx(float(wanted[layer].norm()), rel=1e-5)


def test_the_most_active_feature_is_one_that_may_be_steered(common):
    """Means 9, 1 and 2, but the first is active in too few answers."""
    workspace = lab_of([*common, "method=top_activation", "warmup.min_frequency=0.5"])
    found = statistics(1, D_MODEL, d_sae=3)
    found.by_feature["mean"] = torch.tensor([9.0, 1.0, 2.0])
    found.by_feature["frequency"] = torch.tensor([0.1, 0.9, 0.6])
    assert workspace.exp.method.best_features(workspace, found) == [2]  # type: ignore[attr-defined]


def test_random_directions_follow_the_seed(common):
    workspace = [*common, "method=random_direction"]
    first, again, other = (prepared(lab_of([*workspace, f"seed={s}"])) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in LAYERS)
    assert not any(torch.allclose(first[n], other[n]) for n in LAYERS)
    unit = [first[n] / first[n].norm() for n in LAYERS]
    assert abs(float(unit[0] @ unit[1])) < 0.9, "layers share one direction"


def test_top_activation_does_not_look_at_the_reward(common):
    """By hand: the mean of the pooled activations over the training answers."""
    workspace = lab_of([*common, "method=top_activation"])
    controller = workspace.exp.method.prepare(workspace)
    assert isinstance(controller, FixedFeatures)
    items = range(len(workspace.splits.train))
    for layer in LAYERS:
        sae = workspace.saes[layer]
        # One output token: the only steered position is the last prompt token.
        z_BF = sae.encode(workspace.prompts("train").batch(items).residual(sae.site))
        frequent_F = (z_BF > 0).double().mean(0) >= workspace.exp.warmup.min_frequency
        mean_F = torch.where(frequent_F, z_BF.double().mean(0), -1.0)
        torch.testing.assert_close(
            workspace.statistics()[layer].by_feature["mean"], z_BF.double().mean(0)
        )
        assert int(controller.by_layer[layer][0]) == int(mean_F.argmax())


def test_the_raw_residual_is_the_difference_of_means(common):
    workspace = lab_of([*common, "method=raw_residual", "method.multipliers=[2]"])
    got = prepared(workspace)
    items = list(range(len(workspace.splits.train)))
    good_B = (workspace.answer(Unsteered(), "train").reward_B >= 0.5).numpy()
    assert 0 < good_B.sum() < len(good_B)
    for layer in LAYERS:
        x_BD = workspace.prompts("train").batch(items).residual(layer).double().numpy()
        by_hand_D = 2 * (x_BD[good_B].mean(0) - x_BD[~good_B].mean(0))
        np.testing.assert_allclose(got[layer].numpy(), by_hand_D, atol=1e-5)


def test_the_raw_residuals_multiplier_is_the_best_on_validation(common):
    raw = [*common, "method=raw_residual"]
    workspace = lab_of([*raw, "method.multipliers=[0.25,1,8]"])
    got, one = prepared(workspace), prepared(lab_of([*raw, "method.multipliers=[1]"]))
    rewards = {
        m: workspace.validation_reward(workspace.vectors({n: m * v for n, v in one.items()}))
        for m in (0.25, 1.0, 8.0)
    }
    assert len(set(rewards.values())) > 1, "the multipliers can't be told apart"
    best = max(rewards, key=lambda m: rewards[m])
    for layer in LAYERS:
        torch.testing.assert_close(got[layer], best * one[layer])


def test_the_raw_residual_is_pooled_as_stage_1_pools(common):
    """In an answer of five tokens; `last_prompt` is the last prompt token alone."""
    free = [*common, "method=raw_residual"]
    workspace = lab_of([*free, "warmup.pooling=last_prompt"], TASK)
    x_BD = workspace.prompts("train").batch(range(len(workspace.splits.train))).residual(1).double()
    good_B = workspace.answer(Unsteered(), "train").reward_B >= 0.5
    by_hand_D = (x_BD[good_B].mean(0) - x_BD[~good_B].mean(0)).float()
    torch.testing.assert_close(residual_means(workspace)[1].contrast_D, by_hand_D)
    other = residual_means(lab_of([*free, "warmup.pooling=max"], TASK))[1].contrast_D
    assert not torch.allclose(other, by_hand_D, atol=0.05)


def test_residuals_are_averaged_over_living_tokens():
    """Row 0 lives for three tokens, row 1 for one, its last prompt token."""
    steps = [[[1.0, 2.0], [5.0, 6.0]], [[3.0, 2.0], [100.0, 100.0]], [[2.0, 5.0], [9.0, 9.0]]]
    for last_prompt, expected in ((False, [[2.0, 3.0], [5.0, 6.0]]), (True, steps[0])):
        observer, state = ResidualObserver({4: 4}, last_prompt), {}
        for t, x_BD in enumerate(steps):
            here = StepContext(t, [0, 1], torch.tensor([True, t == 0]), state)
            assert observer.act(4, torch.tensor(x_BD), here) is None
        observer.end(here)
        assert observer.mean(4).tolist() == expected
    means = ResidualMeans.none(2)
    means.update(torch.tensor([[2.0, 3.0], [5.0, 6.0]]), torch.tensor([1.0, 0.0]))
    means.update(torch.tensor([[4.0, 5.0]]), torch.tensor([0.5]))
    assert means.contrast_D.tolist() == [-2.0, -2.0]  # (3, 4) − (5, 6)


def test_nothing_to_contrast_is_told(tiny_files, tmp_path):
    """Where every training answer is right."""
    workspace = lab_of([*tiny_files.overrides(), "method=raw_residual", f"output_dir={tmp_path}"])
    means = ResidualMeans.none(D_MODEL)
    means.update(torch.ones(3, D_MODEL), torch.ones(3))
    with pytest.raises(UserError, match=r"gets all of the training items right.*n_train"):
        workspace.exp.method._contrast(1, means)  # type: ignore[attr-defined]
    assert set(residual_means(workspace)) == {1}


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_are_evaluated_and_logged_like_any_method(method, common, tmp_path):
    result, folder = run_small([*common, f"method={method}", "decay=exponential"])
    assert result["method"] == method and result["layers"] == list(LAYERS)
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    assert len(rows) == result["n"] * len(LAYERS)
    assert all(row["delta_norm"] > 0 for row in rows)
    without_sae = method in ("random_direction", "raw_residual")
    assert all((row["features"] == []) == without_sae for row in rows)
