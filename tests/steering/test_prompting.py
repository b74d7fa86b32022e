"""Other wordings and examples: what is put before the model, and which is taken."""

from __future__ import annotations

import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import experiment, validate
from crl_exp.generation.controller import Unsteered
from crl_exp.steering.methods.baselines.demonstrations import (
    Demonstration,
    demonstrations,
    in_turns,
)
from crl_exp.steering.methods.baselines.prompting import OtherWords, listed
from crl_exp.tasks.base import Item
from tests.helpers.tiny_run import lab_of, run_small, small
from tests.steering.test_parity import TASK


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path}", "method=prompting"]


def shown(n: int) -> list[Demonstration]:
    return [Demonstration(i, f"q{i}", "yes", (4,), 0) for i in range(n)]


def test_the_tasks_own_wording_is_the_unsteered_model_item_by_item(common):
    own = ["method.wordings=['{user}']", "method.shots=[0]"]
    result, _ = run_small([*common, *own])
    assert result["delta"] == result["fixed"] == result["broken"] == 0
    for task in (None, TASK):
        workspace = lab_of([*common, *own], task)
        made = workspace.exp.method.prepare(workspace)
        assert made.wording == "{user}" and made.n_shots == 0
        mine, plain = (workspace.answer(one, "test").generation for one in (made, Unsteered()))
        assert mine.tokens == plain.tokens and mine.texts == plain.texts
        assert made.read[1] is workspace.prompts("test"), "they aren't read twice"


def test_no_prompt_shows_its_own_question():
    """Three items, two shots: the other two; whoever asks the same is the item itself."""
    examples = shown(3)
    asked = OtherWords("{user}", [], examples, 2)
    for i in range(3):
        before, user = asked.turns(Item(f"{i}", f"q{i}"))
        assert user == f"q{i}" and len(before) == 2
        assert user not in [turn for turn, _ in before]
    twice = OtherWords("{user}", [], [*examples, *examples], 2)
    assert [turn for turn, _ in twice.turns(Item("9", "q0"))[0]] == ["q1", "q2"]


def test_examples_come_before_as_turns_or_as_texts(common):
    workspace = lab_of(common)
    words = OtherWords("w1 {user} {choices} {other}", ["yes", "no"], shown(1), 1)
    before, user = words.turns(Item("0", "w2"))
    assert user == "w1 w2 yes or no {other}" and before == (("w1 q0 yes or no {other}", "yes"),)
    chat = workspace.lm.prompt_ids("w2", True, [("w3", "yes")])
    assert chat == workspace.lm.tokenizer("<user> w3 <user> yes <user> w2 <bot>")["input_ids"]
    plain = workspace.lm.prompt_ids("w2", False, [("w3 ", "yes")])
    assert plain == workspace.lm.tokenizer("w3 yes\n\nw2")["input_ids"]
    assert workspace.lm.prompt_ids("w2", True, ()) == workspace.lm.prompt_ids("w2", True)


def test_options_take_turns_and_are_right(common):
    workspace = lab_of(common)
    found = demonstrations(workspace)
    assert [one.answer for one in found] == [
        workspace.splits.train[one.item].target for one in found
    ]
    order = in_turns(found, seed=0)
    assert order != found and len(order) == len(found)
    assert {order[0].option, order[1].option} == {order[2].option, order[3].option} == {0, 1}
    assert order == in_turns(found, seed=0) != in_turns(found, seed=1)


def test_in_free_text_examples_are_the_models_own_rewarded_answers(common):
    workspace = lab_of([*common, "method.shots=[0,2]"], TASK)
    own = workspace.baseline("train")
    found = demonstrations(workspace)
    good = [i for i, score in enumerate(own.scores) if score.reward >= 0.5]
    assert [one.item for one in found] == good
    assert all(one.answer == own.generation.texts[one.item] for one in found)
    made = workspace.exp.method.prepare(workspace)
    assert "{choices}" not in made.wording
    assert all(
        "{choices}" in w for w in next(v for k, v in workspace.notes.items() if "left out" in k)
    )


def test_the_best_pair_on_validation_is_taken_the_first_of_equals(common):
    workspace = lab_of([*common, "method.shots=[0,2,4]"])
    made = workspace.exp.method.prepare(workspace)
    tried = workspace.notes["validation_reward_by_wording"]
    assert len(tried) == 4 * 3 and len({reward for *_, reward in tried}) > 1
    best = max(reward for *_, reward in tried)
    first = next(one for one in tried if one[2] == best)
    assert [made.wording, made.n_shots] == first[:2]
    assert float(workspace.answer(made, "validation").reward_B.mean()) == pytest.approx(best)
    assert len(workspace.notes["examples"]) == made.n_shots


def test_what_the_model_has_no_room_for_is_not_tried_and_said(common):
    workspace = lab_of([*common, "method.shots=[0,20]"])
    workspace.exp.method.prepare(workspace)
    assert {n for _, n, _ in workspace.notes["validation_reward_by_wording"]} == {0}
    assert sum("takes 128: not tried" in warning for warning in workspace.warnings) == 4
    full = lab_of([*common, "method.shots=[20]"])
    with pytest.raises(UserError, match="no wording leaves room"):
        full.exp.method.prepare(full)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["method.wordings=[a]"], r"'a' must hold \{user\}"),
        (["method.wordings=[]"], "method.wordings is empty"),
        (["method.shots=[-1]"], r"method.shots=\[-1\]"),
        (["method.wordings=['{user}{choices}']", "task.choices=null"], "add one without"),
    ],
)
def test_what_can_not_be_asked_is_refused(more, said, common):
    with pytest.raises(UserError, match=said):
        validate(experiment(small([*common, *more])))


def test_options_as_a_text():
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a or b"
    assert listed(["a", "b", "c"]) == "a, b or c"
