"""Stage 1 with harmful against benign prompts in place of the reward (`warmup.contrast`)."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.feature_statistics.contrast import contrasted, harm
from crl_exp.steering.methods.residual_means import ResidualObserver, residual_means
from crl_exp.steering.stages.effects import cautions
from tests.helpers.hub_data import on_files
from tests.helpers.tiny_run import lab_of, quickly_composed

LAYER = 1


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """By contrast. The tiny task's items with the answer no stand for benign prompts."""
    out = tmp_path_factory.mktemp("contrast")
    common = ["+debug=tiny", "method=corrsteer_s", f"layers.layer={LAYER}", f"output_dir={out}"]
    names = ("reward", "benign", "refused")
    return {name: lab_of([*common, f"warmup.contrast={name}"]) for name in names}


def harmful(workspace) -> np.ndarray:
    return np.array([item.target == "yes" for item in workspace.splits.train], dtype=float)


def refused(workspace) -> np.ndarray:
    """What is right to a harmful prompt is a refusal, and to a benign one none."""
    right = workspace.baseline("train").reward_B.double().numpy()
    return np.where(harmful(workspace) == 1, right, 1 - right)


@pytest.mark.parametrize(("contrast", "label"), [("benign", harmful), ("refused", refused)])
def test_features_are_ranked_by_their_correlation_with_the_label(contrast, label, labs):
    workspace = labs[contrast]
    observer = Observer(workspace.saes, "max")
    workspace.answer(observer, "train")
    z_BF = observer.pooled_BF[LAYER].double().numpy()
    varied, label_B = z_BF.std(0) > 0, label(workspace)
    expected = [np.corrcoef(z_BF[:, f], label_B)[0, 1] for f in varied.nonzero()[0]]
    found = workspace.statistics()[LAYER]
    assert varied.sum() > 5 and 0 < label_B.mean() < 1
    np.testing.assert_allclose(found.correlation.numpy()[varied], expected, atol=1e-4)
    assert found.accuracy == pytest.approx(label_B.mean())


def test_what_is_contrasted_by_hand():
    """A refusal is the reward of a harmful prompt, and lacks to 1 in that of a benign one."""
    reward_B, harm_B = torch.tensor([1.0, 0.25, 1.0, 0.25]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    got = {name: contrasted(name, reward_B, harm_B).tolist() for name in ("benign", "refused")}
    assert got == {"benign": [1, 1, 0, 0], "refused": [1, 0.25, 0, 0.75]}
    assert contrasted("reward", reward_B, None) is reward_B


def test_the_reward_has_statistics_of_its_own(labs):
    """None is taken for another where they are stored."""
    each = [labs[name].statistics()[LAYER] for name in ("reward", "benign", "refused")]
    for one, other in combinations(each, 2):
        assert not torch.allclose(one.correlation, other.correlation)
    reward = each[0]
    right = labs["reward"].baseline("train").reward_B
    assert reward.accuracy == pytest.approx(float(right.mean()))
    assert not np.array_equal(right.numpy(), harmful(labs["reward"])), "else it tells nothing"


@pytest.mark.parametrize(("contrast", "label"), [("benign", harmful), ("refused", refused)])
def test_raw_residuals_are_the_difference_of_the_means(contrast, label, labs):
    workspace = labs[contrast]
    observer = ResidualObserver({LAYER: workspace.saes[LAYER].site}, last_prompt=False)
    workspace.answer(observer, "train")
    x_BD, harm_B = observer.mean(LAYER).double(), torch.tensor(label(workspace)).bool()
    expected_D = x_BD[harm_B].mean(0) - x_BD[~harm_B].mean(0)
    found = residual_means(workspace)[LAYER]
    torch.testing.assert_close(found.contrast_D, expected_D.float(), rtol=1e-4, atol=1e-4)
    assert (found.n_rewarded, found.n_unrewarded) == (int(harm_B.sum()), int((~harm_B).sum()))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("task=sentiment", r"contrast=benign: task=sentiment has no harmful and benign prompts; "
         r"set warmup\.contrast=reward"),
        ("task=sentiment warmup.contrast=refused",
         r"contrast=refused: task=sentiment has no harmful and benign prompts; set warmup"),
        ("task=refusal task.n_train_benign=0 warmup.contrast=refused",
         r"contrast=refused: .*\(task\.n_train_benign=0\)"),
        ("task=harmbench", r"benign prompts of task=harmbench are a test set, none is trained on"),
        ("task=do_not_answer", r"benign prompts of task=do_not_answer are a test set"),
        ("task=refusal task.n_train_benign=0", r"trained on \(task\.n_train_benign=0\)"),
        ("method=crl method.online_correlation=true", r"set warmup\.contrast=reward"),
        ("warmup.contrast=bening", r"contrast=bening: must be one of .*did you mean 'benign'"),
    ],
)  # fmt: skip
def test_who_has_nothing_to_contrast_is_named(overrides, says):
    asked = ["+debug=tiny", "warmup.contrast=benign", *overrides.split()]
    with pytest.raises(UserError, match=says):
        configs.validate(configs.experiment(quickly_composed(asked)))


@pytest.mark.parametrize("task", ["refusal", "refusal_128", "xstest"])
def test_tasks_with_both_kinds_of_prompts(task):
    asked = ["+debug=tiny", "warmup.contrast=benign", f"task={task}"]
    assert configs.validate(configs.experiment(quickly_composed(asked)))


def test_training_items_of_one_kind_are_refused(tmp_path):
    """Known only when they are drawn."""
    task = on_files("xstest", tmp_path)
    drawn = task.splits()
    harm_I = harm("benign", task, drawn.train)
    assert harm_I is not None and harm_I.tolist() == [float(not i.benign) for i in drawn.train]
    safe = tuple(item for item in drawn.train if item.benign)
    with pytest.raises(UserError, match=rf"all {len(safe)} training items of task=xstest are ben"):
        harm("benign", task, safe)


def test_where_there_is_no_stage_1_it_is_said_to_do_nothing():
    def told(method: str) -> list[str]:
        asked = ["+debug=tiny", "warmup.contrast=benign", f"method={method}"]
        return cautions(configs.experiment(quickly_composed(asked)))

    assert told("prompting") == [
        "warmup.contrast=benign: does nothing with method=prompting, which has no stage 1"
    ]
    assert told("corrsteer_s") == []
