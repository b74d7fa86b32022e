"""The probe is a logistic regression of the stored residuals, and what it reads steers."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.analysis.regression import Regression, fit, fit_two
from crl_exp.config import kept
from crl_exp.config.errors import UserError
from crl_exp.experiments.config import experiment, validate
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.methods.baselines.options import right_options
from crl_exp.steering.methods.baselines.probe import all_last_residuals
from crl_exp.steering.methods.baselines.probe_steering import (
    Branch,
    ProbeController,
    rewarded,
    towards,
)
from tests.helpers.tiny import D_MODEL
from tests.helpers.tiny_run import lab_of, run_small, small
from tests.steering.test_parity import TASK

SIZES = ["task.n_train=44", "task.n_validation=16", "task.n_test=16"]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), *SIZES, f"output_dir={tmp_path}"]


def data(n: int, n_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    x_ND = x_ND * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    noise_NC = torch.randn(n, n_classes, generator=draw, dtype=torch.float64)
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    return x_ND, (z_ND[:, :n_classes] + noise_NC).argmax(1)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_fit_is_that_of_another_implementation(n_classes):
    """scikit-learn's loss is a sum; for two classes it has one weight vector, ours two opposite
    ones, of half the length each."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_ND, class_N = data(300, n_classes)
    z_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)
    for penalty, made in fit(x_ND, class_N, n_classes, [0.3, 0.01]).items():
        strength = (2 if n_classes == 2 else 1) / (len(x_ND) * penalty)
        other = linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        other.fit(z_ND.numpy(), class_N.numpy())
        ours = made.scores(x_ND).softmax(dim=1).numpy()
        np.testing.assert_allclose(ours, other.predict_proba(z_ND.numpy()), atol=1e-5)


def test_two_ways_to_fit_two_classes_give_the_same():
    """Weak penalties too, at which the classes are told apart without a fault."""
    x_ND, class_N = data(40, 2)
    x_ND = torch.cat([x_ND, torch.randn(40, 60, generator=torch.Generator().manual_seed(1))], 1)
    penalties = [1.0, 0.01, 1e-4]
    ours, other = fit_two(x_ND, class_N, penalties), fit(x_ND, class_N, 2, penalties)
    for penalty in penalties:
        mine, theirs = (one[penalty].scores(x_ND).softmax(1) for one in (ours, other))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        assert (ours[penalty].W_DC.sum(1).abs() < 1e-12).all()


def test_a_dimension_that_never_changes_takes_no_part_in_the_faster_way_either():
    x_ND, class_N = data(60, 2)
    same_N1 = 100 + 1e-12 * torch.randn(60, 1, dtype=torch.float64)
    made = fit_two(torch.cat([x_ND, same_N1], 1), class_N, [0.1])[0.1]
    assert (made.W_DC[-1] == 0).all()
    torch.testing.assert_close(made.W_DC[:-1], fit_two(x_ND, class_N, [0.1])[0.1].W_DC)


def test_a_penalty_is_as_strong_whatever_the_number_of_items():
    x_ND, class_N = data(60, 2)
    once = fit(x_ND, class_N, 2, [0.1])[0.1]
    twice = fit(torch.cat([x_ND, x_ND]), torch.cat([class_N, class_N]), 2, [0.1])[0.1]
    torch.testing.assert_close(once.W_DC, twice.W_DC, atol=1e-6, rtol=0)


def test_a_dimension_that_never_changes_takes_no_part():
    """As at the first site, where all last prompt tokens are one vector but for rounding."""
    x_ND, class_N = data(60, 2)
    noisy_N1 = 100 + 1e-12 * torch.randn(60, 1, dtype=torch.float64)
    made = fit(torch.cat([x_ND, noisy_N1], dim=1), class_N, 2, [0.1])[0.1]
    assert made.W_DC[5].tolist() == [0.0, 0.0]
    torch.testing.assert_close(made.W_DC[:5], fit(x_ND, class_N, 2, [0.1])[0.1].W_DC)
    only = fit(noisy_N1.expand(-1, 3), class_N, 2, [0.1])[0.1]
    assert len(only.classes(noisy_N1.expand(-1, 3)).unique()) == 1


def test_its_gradient_is_that_of_its_scores():
    x_ND, class_N = data(90, 3)
    made = fit(x_ND, class_N, 3, [0.05])[0.05]
    at_1D = x_ND[:1].clone().requires_grad_()
    for c in range(3):
        score_1C = made.scores(at_1D)
        (slope_1D,) = torch.autograd.grad((score_1C[:, c] - score_1C.mean(1)).sum(), at_1D)
        torch.testing.assert_close(made.direction_CD[c], slope_1D[0])


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_its_answers_are_what_a_regression_of_the_residuals_says(layers, common):
    asked = [*common, "method=probe", "layers=list", f"layers.layers={layers}"]
    result, folder = run_small(asked)
    workspace = lab_of(asked)
    (penalty,) = [v for k, v in result["notes"].items() if k.startswith("penalty")]
    class_N = right_options(workspace, "train")
    items = {split: range(len(workspace.splits.named()[split])) for split in ("train", "test")}
    x = {
        split: torch.cat([workspace.prompts(split).batch(i).residual(s) for s in layers], dim=1)
        for split, i in items.items()
    }
    by_hand = fit(x["train"], class_N, 2, [penalty])[penalty].classes(x["test"])
    good = by_hand == right_options(workspace, "test")
    assert result["accuracy_steered"] == pytest.approx(float(good.double().mean()))
    assert result["layers"] == layers and result["invalid_steered"] == 0
    assert len(pq.read_table(folder / "interventions.parquet")) == 0
    tried = next(v for k, v in result["notes"].items() if k.startswith("validation accuracy"))
    assert tried[str(penalty)] == max(tried.values())
    assert penalty == max(float(p) for p, r in tried.items() if r == max(tried.values()))


def test_a_probe_answers_with_an_option_only(common):
    for method in ("probe", "probe_steering"):
        free = small([*common, f"method={method}", "task.choices=null", "engine.decode=compiled"])
        with pytest.raises(UserError, match=r"use method=probe_steering|set engine.decode=eager"):
            validate(experiment(free))


def test_one_class_is_nothing_to_tell_apart(common):
    workspace = lab_of([*common, "method=probe"])
    with pytest.raises(UserError, match="of one class"):
        workspace.exp.method.fitted(
            workspace, [1], lambda workspace, split: torch.zeros(44).long(), 2
        )


def always(option: int, n_classes: int = 2) -> Regression:
    b_C = torch.zeros(n_classes, dtype=torch.float64)
    b_C[option] = 1
    zeros_D = torch.zeros(D_MODEL, dtype=torch.float64)
    return Regression(zeros_D, zeros_D + 1, zeros_D[:, None].expand(-1, n_classes).clone(), b_C)


def random_probe(seed: int = 0) -> Regression:
    made = always(0)
    draw = torch.Generator().manual_seed(seed)
    made.W_DC.copy_(torch.randn(D_MODEL, 2, generator=draw))
    made.b_C.zero_()
    return made


def test_equal_directions_are_the_fixed_vector(common):
    """Token by token, what is added too, in answers of five tokens with a decay."""
    workspace = lab_of([*common, "method=probe_steering"], TASK)
    vector_D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    branch = Branch(random_probe(), vector_D.expand(2, -1))
    made = [
        ProbeController({1: branch}, {1: 1}, Decay(0.5)),
        FixedVectors({1: vector_D}, {1: 1}, Decay(0.5)),
    ]
    read, fixed = (workspace.answer(one, "test", record=True).generation for one in made)
    assert read.tokens == fixed.tokens
    assert read.tokens != workspace.baseline("test").generation.tokens
    for a, b in zip(read.steps, fixed.steps, strict=True):
        assert a.rows == b.rows and torch.equal(a.action.delta_BD, b.action.delta_BD)


def test_what_was_read_first_holds_for_the_whole_answer(common, monkeypatch):
    """Whoever else leaves the batch."""
    monkeypatch.setattr(kept, "LOADED", {})  # its answers are no other test's
    workspace = lab_of([*common, "method=probe_steering"], TASK)
    ends = [1, *range(30, 64)]  # of a model that other tests share
    monkeypatch.setattr(workspace.lm.model.generation_config, "eos_token_id", ends)
    probe, vector_CD = random_probe(), torch.stack([torch.ones(D_MODEL), -torch.ones(D_MODEL)])
    made = ProbeController({1: Branch(probe, vector_CD)}, {1: 1}, Decay(1.0))
    played = workspace.answer(made, "test", record=True).generation
    items = range(len(workspace.splits.test))
    class_B = probe.classes(workspace.prompts("test").batch(items).residual(1))
    assert 0 < class_B.sum() < len(class_B)
    assert len({len(step.rows) for step in played.steps}) > 1, "no answer ended early"
    for step in played.steps:
        wanted_B = class_B[step.rows]
        assert torch.equal(step.action.delta_BD, vector_CD[wanted_B])
        log_prob_B = probe.scores(
            workspace.prompts("test").batch(step.rows).residual(1)
        ).log_softmax(1)
        torch.testing.assert_close(
            step.action.log_prob_B, log_prob_B.gather(1, wanted_B[:, None])[:, 0].float()
        )


def test_directions_by_hand():
    x_ND = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0], [9.0, 9.0]])
    class_N = torch.tensor([0, 0, 1, 1, -1])
    assert towards(x_ND, class_N, 2).tolist() == [[2.0, -3.0], [-2.0, 3.0]]
    assert towards(x_ND, class_N, 3)[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("direction", ["means", "probe"])
def test_probe_steering_leads_towards_what_it_reads(direction, common):
    asked = [*common, "method=probe_steering", f"method.direction={direction}",
             "method.doses=[0.5,0.1]", "layers=list", "layers.layers=[0,2]"]  # fmt: skip
    result, folder = run_small(asked)
    workspace = lab_of(asked)
    made = workspace.exp.method.prepare(workspace)
    assert made.sites == {0: 0, 2: 2}
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    assert len(rows) == 2 * result["n"] and all(row["features"] == [] for row in rows)
    assert all(row["log_prob"] <= 0 for row in rows)
    for layer, branch in made.branches.items():
        x_ND = all_last_residuals(workspace, "train", [layer]).double()
        length = result["notes"]["dose"] * float(x_ND.norm(dim=1).median())
        norms = [row["delta_norm"] for row in rows if row["layer"] == layer]
        assert norms == pytest.approx([length] * result["n"], rel=1e-4)
        if direction == "means":
            means = towards(x_ND, right_options(workspace, "train"), 2)
        else:
            means = branch.probe.direction_CD
        cosine_C = torch.cosine_similarity(branch.vector_CD.double(), means)
        assert cosine_C.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_in_free_text_it_steers_where_it_reads_a_failure(common, monkeypatch):
    monkeypatch.setattr(kept, "LOADED", {})  # nor answers that others changed the model for
    workspace = lab_of([*common, "method=probe_steering", "method.doses=[0.5]"], TASK)
    made = workspace.exp.method.prepare(workspace)
    (branch,) = made.branches.values()
    class_N = rewarded(workspace, "train")
    assert 0 < class_N.sum() < len(class_N)
    x_ND = all_last_residuals(workspace, "train", [1]).double()
    wanted_D = x_ND[class_N == 1].mean(0) - x_ND[class_N == 0].mean(0)
    cosine = torch.cosine_similarity(branch.vector_CD[0].double(), wanted_D, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert not branch.vector_CD[1].any()


def test_held_out_residuals_say_nothing_but_the_penalty(common):
    """Changed validation and test items leave mean, deviation and each penalty's weights."""
    workspace, other = (
        lab_of([*common, "method=probe", f"task.split_seed={seed}"]) for seed in (0, 0)
    )
    other.splits = type(other.splits)(
        other.splits.train, other.splits.test, other.splits.validation
    )
    one = "method.penalties=[0.1]"
    found = [
        lab_of([*common, "method=probe", one]).exp.method.fitted(made, [1], right_options, 2)
        for made in (workspace, other)
    ]
    for name, tensor in vars(found[0]).items():
        assert torch.equal(tensor, getattr(found[1], name)), name
