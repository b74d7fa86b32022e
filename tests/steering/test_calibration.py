"""A bias on the answer: found exactly, added once, and nothing where it is 0."""

from __future__ import annotations

import itertools

import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import experiment, validate
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Job
from crl_exp.steering.controllers.fixed import Steer
from crl_exp.steering.methods.baselines.calibration import END, OutputBias, best_bias, tried_rewards
from crl_exp.steering.methods.baselines.options import option_rewards, option_scores, right_options
from tests.helpers import tiny
from tests.helpers.tiny_run import lab_of, run_small, small
from tests.helpers.tiny_steering import AddVector
from tests.steering.test_parity import TASK


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path}", "method=calibration"]


def reward(score_NO, reward_NO, bias_O) -> float:
    best_N = (score_NO + bias_O).argmax(1, keepdim=True)
    return float(reward_NO.gather(1, best_N).mean())


def test_the_bias_between_two_options_is_the_best_there_is():
    """Margins of the second option −3, −1, 2; it is right for the first two: between 1 … 3 and
    more only the last turns wrong, so 3 < bias would be as good where it is right anyway."""
    score_NO = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).double()
    reward_NO = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    assert best_bias(score_NO, reward_NO).tolist() == [0.0, 2.0]  # the middle of 1 … 3
    assert best_bias(score_NO, 1 - reward_NO)[1] != 0
    right_NO = torch.nn.functional.one_hot(score_NO.argmax(1), 2).double()
    assert best_bias(score_NO, right_NO).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_bias_of_a_fine_grid_does_better(seed):
    draw = torch.Generator().manual_seed(seed)
    score_NO = torch.randn(40, 2, generator=draw).double()
    reward_NO = torch.rand(40, 2, generator=draw).double().round()
    found = reward(score_NO, reward_NO, best_bias(score_NO, reward_NO))
    tried = [reward(score_NO, reward_NO, torch.tensor([0.0, b])) for b in torch.arange(-6, 6, 0.01)]
    assert found == pytest.approx(max(tried), abs=1e-12)
    three_NO = torch.randn(30, 3, generator=draw).double()
    right_NO = torch.nn.functional.one_hot(torch.randint(3, (30,), generator=draw), 3).double()
    bias_O = best_bias(three_NO, right_NO)
    found = reward(three_NO, right_NO, bias_O)
    assert found >= reward(three_NO, right_NO, torch.zeros(3)) and bias_O[0] == 0
    for option, b in itertools.product((1, 2), torch.arange(-6, 6, 0.05).tolist()):
        moved_O = bias_O.clone()
        moved_O[option] = b
        assert reward(three_NO, right_NO, moved_O) <= found + 1e-12


def test_bias_0_is_the_unsteered_model_item_by_item(common):
    workspace = lab_of(common)
    zero = workspace.answer(OutputBias({0: 0.0, 1: 0.0}), "test").generation
    assert zero.tokens == workspace.answer(Unsteered(), "test").generation.tokens
    free = lab_of([*common, "method.tokens=[w3]"], TASK)
    zero = free.answer(OutputBias({5: 0.0}), "test").generation
    assert zero.tokens == free.answer(Unsteered(), "test").generation.tokens


def test_a_run_takes_the_highest_biased_score(common):
    result, _ = run_small(common)
    workspace = lab_of(common)
    bias = result["notes"]["bias of each option, chosen on validation"]
    taken = (option_scores(workspace, "test") + torch.tensor([bias["yes"], bias["no"]])).argmax(1)
    wanted = right_options(workspace, "test")
    assert result["accuracy_steered"] == pytest.approx(float((taken == wanted).double().mean()))
    at = result["validation"]
    assert at["accuracy_steered"] >= at["accuracy_baseline"]
    assert at["accuracy_steered"] == pytest.approx(
        reward(
            option_scores(workspace, "validation"), option_rewards(workspace, "validation"),
            torch.tensor([bias["yes"], bias["no"]]),
        )
    )  # fmt: skip
    assert result["layers"] == [] and bias["yes"] == 0
    assert workspace.answer(OutputBias({1: 1e4}), "test").generation.texts == ["no"] * len(taken)


def test_no_sae_is_looked_for(common):
    result, folder = run_small([*common, "sae.folder=/nowhere", "layers.layer=99"])
    assert result["n"] == 16 and not (folder.parents[1] / "shared").exists()


def test_scores_are_those_that_the_engine_compares(common):
    workspace = lab_of(common)
    taken = option_scores(workspace, "test").argmax(1).tolist()
    assert [list(workspace.options.ids[i]) for i in taken] == workspace.baseline(
        "test"
    ).generation.tokens


def test_a_bias_beside_other_controllers_is_its_own_rows_alone():
    """Rows of several jobs in one batch, answers of 4 tokens, some of which end early."""
    lm = tiny.language_model("llama")
    lm.model.generation_config.eos_token_id = [1, 6, 9, 14, 27]
    engine = Engine(lm, EngineConfig(64, 1.0, "eager"))
    prompts = engine.read(tiny.prompts(6))
    biased, vector = OutputBias({20: 3.0, 6: 2.0}), AddVector({1: 3 * torch.ones(tiny.D_MODEL)})
    jobs = [Job(made, range(6)) for made in (Unsteered(), biased, vector, OutputBias({30: 1e4}))]
    together = engine.generate(prompts, jobs, 4)
    alone = [engine.generate(prompts, [job], 4)[0] for job in jobs]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert together[3].tokens == [[30] * 4] * 6
    assert together[1].tokens != together[0].tokens


def test_in_free_text_a_bias_on_the_end_ends_answers(common):
    free = [*common, f"method.tokens=['{END}']", "method.grid=[1e3]"]
    workspace = lab_of(free, TASK)
    ended = workspace.answer(
        OutputBias(dict.fromkeys(workspace.lm.eos_ids, 1e3)), "test"
    ).generation
    assert ended.tokens == [[]] * len(ended.tokens)
    found = workspace.exp.method.prepare(workspace)
    rewards = workspace.notes["validation_reward_by_bias"]
    best = max(rewards, key=lambda b: rewards[b])
    assert set(found.bias) == workspace.lm.eos_ids and found.bias[1] == float(best)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.choices=null"], r"free text: name the tokens"),
        (["task.choices=null", "method.tokens=[a]", "engine.decode=compiled"], "decode=eager"),
        (["method.tokens=[w3]"], r"method.tokens=null"),
        (["method.grid=[inf]"], r"method.grid=\[inf\]: must be finite"),
        (["method.chosen_on=test"], r"must be validation or train"),
    ],
)
def test_what_can_not_be_calibrated_is_refused(more, said, common):
    with pytest.raises(UserError, match=said):
        validate(experiment(small([*common, *more])))


def test_a_text_that_is_no_token_is_refused(common):
    workspace = lab_of([*common, "method.tokens=['w3 w4']"], TASK)
    with pytest.raises(UserError, match=r"'w3 w4' is 2 tokens to tiny"):
        workspace.exp.method.prepare(workspace)


def test_compiled_decoding_refuses_a_bias():
    lm = tiny.language_model("llama")
    engine = Engine(lm, EngineConfig(8, 1.0, "compiled"))
    with pytest.raises(UserError, match="can't show the scores to OutputBias"):
        engine.generate(engine.read(tiny.prompts(2)), [Job(OutputBias({5: 1.0}), [0, 1])], 3)


def test_steering_and_bias_in_one_lab_share_the_prompts(common):
    """A controller's answers don't depend on a bias having been asked before."""
    workspace = lab_of([*common, "method=corrsteer_a"])
    steer = workspace.fixed([Steer(1, 3, 5.0)])
    before = workspace.answer(steer, "test").generation.tokens
    workspace.answer(OutputBias({1: 5.0}), "test")
    assert workspace.answer(steer, "test").generation.tokens == before


def test_every_bias_that_answers_differently_is_counted_as_tried():
    draw = torch.Generator().manual_seed(0)
    score_NO = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    reward_NO = torch.nn.functional.one_hot(torch.randint(3, (40,), generator=draw), 3).double()
    bias_O = best_bias(score_NO, reward_NO)
    tried_MN = tried_rewards(score_NO, reward_NO, bias_O)
    assert len(tried_MN) == 2 * 41
    taken_N = (score_NO + bias_O).argmax(dim=1)
    best = float(reward_NO.gather(1, taken_N[:, None]).mean())
    assert float(tried_MN.mean(dim=1).max()) == best, "the one chosen is the best of them"
    for row_N in (tried_MN[0], tried_MN[41 - 1]):  # the second option nowhere, and everywhere
        assert not torch.equal(row_N, tried_MN[20])
    assert torch.equal(tried_MN[40], reward_NO[:, 1])
