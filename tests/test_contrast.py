"""Stage 1 with harmful against benign prompts in place of the reward (`warmup.contrast`)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crl_exp import config as configs
from crl_exp.contrast import harm
from crl_exp.controllers.observer import Observer
from crl_exp.effects import cautions
from crl_exp.errors import UserError
from crl_exp.residual_means import ResidualObserver, residual_means
from tests.hub_data import on_files
from tests.tiny_run import lab_of, quickly_composed

LAYER = 1


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """By contrast. The tiny task's items with the answer no stand for benign prompts."""
    out = tmp_path_factory.mktemp("contrast")
    common = ["+debug=tiny", "method=corrsteer_s", f"layers.layer={LAYER}", f"output_dir={out}"]
    return {name: lab_of([*common, f"warmup.contrast={name}"]) for name in ("reward", "benign")}


def harmful(lab) -> np.ndarray:
    return np.array([item.target == "yes" for item in lab.splits.train], dtype=float)


def test_features_are_ranked_by_their_correlation_with_harm(labs):
    lab = labs["benign"]
    observer = Observer(lab.saes, "max")
    lab.answer(observer, "train")
    z_BF = observer.pooled_BF[LAYER].double().numpy()
    varied = z_BF.std(0) > 0
    expected = [np.corrcoef(z_BF[:, f], harmful(lab))[0, 1] for f in varied.nonzero()[0]]
    found = lab.statistics()[LAYER]
    assert varied.sum() > 5
    np.testing.assert_allclose(found.correlation.numpy()[varied], expected, atol=1e-4)
    assert found.accuracy == pytest.approx(harmful(lab).mean())


def test_the_reward_has_statistics_of_its_own(labs):
    """Neither is taken for the other where they are stored."""
    reward, benign = (labs[name].statistics()[LAYER] for name in ("reward", "benign"))
    assert not torch.allclose(reward.correlation, benign.correlation)
    right = labs["reward"].baseline("train").reward_B
    assert reward.accuracy == pytest.approx(float(right.mean()))
    assert not np.array_equal(right.numpy(), harmful(labs["reward"])), "else it tells nothing"


def test_raw_residuals_are_the_difference_of_the_means(labs):
    lab = labs["benign"]
    observer = ResidualObserver({LAYER: lab.saes[LAYER].site}, last_prompt=False)
    lab.answer(observer, "train")
    x_BD, harm_B = observer.mean(LAYER).double(), torch.tensor(harmful(lab)).bool()
    expected_D = x_BD[harm_B].mean(0) - x_BD[~harm_B].mean(0)
    found = residual_means(lab)[LAYER]
    torch.testing.assert_close(found.contrast_D, expected_D.float(), rtol=1e-4, atol=1e-4)
    assert (found.n_rewarded, found.n_unrewarded) == (int(harm_B.sum()), int((~harm_B).sum()))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("task=sentiment", r"contrast=benign: task=sentiment has no harmful and benign prompts; "
         r"set warmup\.contrast=reward"),
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
    warmup = SimpleNamespace(contrast="benign")
    drawn = task.splits()
    lab = SimpleNamespace(exp=SimpleNamespace(task=task, warmup=warmup), splits=drawn)
    harm_I = harm(lab)  # type: ignore[arg-type]
    assert harm_I is not None and harm_I.tolist() == [float(not i.benign) for i in drawn.train]
    safe = tuple(item for item in drawn.train if item.benign)
    lab.splits = SimpleNamespace(train=safe)
    with pytest.raises(UserError, match=rf"all {len(safe)} training items of task=xstest are ben"):
        harm(lab)  # type: ignore[arg-type]


def test_where_there_is_no_stage_1_it_is_said_to_do_nothing():
    def told(method: str) -> list[str]:
        asked = ["+debug=tiny", "warmup.contrast=benign", f"method={method}"]
        return cautions(configs.experiment(quickly_composed(asked)))

    assert told("prompting") == [
        "warmup.contrast=benign: does nothing with method=prompting, which has no stage 1"
    ]
    assert told("corrsteer_s") == []
