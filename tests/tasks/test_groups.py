"""Groups of items (subjects, categories), and training items drawn anew."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item
from crl_exp.tasks.refusal import read_benign_prompts
from tests.helpers.hub_data import on_files
from tests.tasks.test_tasks import cache, ids, refusal, sentiment, task  # noqa: F401  (a fixture)

GROUPS = {
    "mmlu": {"anatomy", "high_school_physics"}, "mmlu_pro": {"law", "math"}, "bbq_ambig": {"Age"},
    "bbq_disambig": {"Age"},
    "harmbench": {"illegal", ""}, "xstest": {"homonyms"}, "do_not_answer": {"r"}, "gsm8k": {""},
}  # fmt: skip


def groups(items: tuple[Item, ...]) -> set[str]:
    return {item.group for item in items}


@pytest.mark.parametrize("name", GROUPS)
def test_items_of_public_sets_know_their_group(name, tmp_path):
    assert groups(on_files(name, tmp_path).splits().test) == GROUPS[name]


def test_only_items_of_the_groups_asked_for(tmp_path):
    splits = on_files("mmlu_pro", tmp_path, groups=["law"]).splits()
    assert all(groups(items) == {"law"} for items in splits.named().values())


def test_a_split_without_groups_is_used_whole_and_said_to_be(tmp_path, monkeypatch):
    """As MMLU's auxiliary_train, whose rows have no subject."""
    import tests.helpers.hub_data as hub_data

    plain = hub_data.mmlu
    every = hub_data.SCHEMAS["cais/mmlu"]["all"]
    features = every[0]
    # Rows 0 to 131 are train's.
    monkeypatch.setitem(
        hub_data.SCHEMAS["cais/mmlu"], "all",
        (features, lambda i: plain(i) | ({"subject": ""} if i < 132 else {})),
    )  # fmt: skip
    splits = on_files("mmlu", tmp_path, groups=["anatomy"]).splits()
    assert groups(splits.test) == {"anatomy"} and groups(splits.train) == {""}
    assert any("are in no groups" in warning for warning in splits.warnings)


def test_an_unknown_group_is_named_with_those_there_are(tmp_path):
    with pytest.raises(
        UserError, match=r"no group 'lwa'; did you mean 'law'\? \(it has law, math\)"
    ):
        on_files("mmlu_pro", tmp_path, groups=["lwa"]).splits()
    with pytest.raises(UserError, match="name groups"):
        on_files("mmlu_pro", tmp_path, groups=[]).splits()


def test_a_task_without_groups_says_so(cache):  # noqa: F811
    with pytest.raises(UserError, match="its items are in no groups"):
        sentiment(groups=["comedy"]).splits()


def test_few_shot_examples_of_bbq_are_those_of_before(tmp_path):
    """Its group is for reports; examples come from any, as they did."""
    splits = on_files("bbq_ambig", tmp_path, n_shots=2).splits()
    heads = {item.user.split("\n\n")[0] for items in splits.named().values() for item in items}
    assert len(heads) == 1


def test_refusal_prompts_have_kinds_of_harm(cache):  # noqa: F811
    splits = refusal().splits()
    assert groups(splits.test) == {"part0", "part1"} and groups(splits.extra["benign"]) == {""}
    only = refusal(groups=["part1"], n_train=5, n_validation=5, n_test=5).splits()
    assert groups(only.test) == {"part1"}
    assert {item.group for item in only.train if not item.benign} == {"part1"}


def test_a_line_of_ones_own_file_names_its_group(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question": f"q{i}", "answer": "yes", "group": "odd" if i % 2 else "even"}
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    sizes = {"n_train": 8, "n_validation": 4, "n_test": 4, "choices": ["yes", "no"]}
    odd = task("jsonl", path=str(path), groups=["odd"], **sizes).splits()
    assert groups(odd.train) == groups(odd.test) == {"odd"}
    path.write_text(json.dumps({"question": "q", "answer": "yes", "group": 3}))
    with pytest.raises(UserError, match="line 1: the group 3 is not a text"):
        task("jsonl", path=str(path), **sizes).splits()


def test_whether_an_item_is_to_be_refused_is_part_of_what_is_asked(tmp_path):
    """The digest that reports compare by stays what it was."""
    splits = on_files("xstest", tmp_path).splits()
    turned = replace(splits, test=tuple(replace(i, benign=not i.benign) for i in splits.test))
    assert turned.digest() == splits.digest() and turned.asked() != splits.asked()


# --- training items drawn anew ---


@pytest.mark.parametrize("make", [sentiment, refusal])
def test_train_seed_draws_other_training_items_and_leaves_the_rest(cache, make):  # noqa: F811
    plain, first, second = (make(train_seed=seed).splits() for seed in (None, 0, 1))
    for benign in {item.benign for item in plain.train}:
        drawn = [[i.item_id for i in s.train if i.benign == benign] for s in (plain, first, second)]
        assert len({frozenset(one) for one in drawn}) == 3 and len(set(map(len, drawn))) == 1
    assert plain.test == first.test == second.test
    assert plain.validation == first.validation == second.validation
    assert first.train == make(train_seed=0).splits().train
    assert not set(ids(first.train)) & {*ids(first.validation), *ids(first.test)}


def test_more_labels_with_one_train_seed_hold_the_fewer(cache):  # noqa: F811
    few, more = sentiment(train_seed=3, n_train=10), sentiment(train_seed=3, n_train=20)
    assert set(ids(few.splits().train)) < set(ids(more.splits().train))


def test_draws_of_all_there_is_are_told(cache, tmp_path):  # noqa: F811
    """They have the same items. More than there are is refused with the number that fits."""
    for made in (sentiment(train_seed=0), on_files("mmlu_pro", tmp_path, train_seed=0)):
        with pytest.raises(UserError, match="fits") as refused:
            replace(made, n_train=10**6).splits()
        most = int(re.findall(r"task\.n_train=(\d+) fits", str(refused.value))[0])
        told = f"task.n_train={most} takes every item"
        assert any(told in line for line in replace(made, n_train=most).splits().warnings)
        fewer = replace(made, n_train=most - 1)
        for not_told in (fewer, replace(made, n_train=most, train_seed=None)):
            assert not any("takes every item" in line for line in not_told.splits().warnings)


def test_draws_that_all_have_the_same_benign_prompts_are_told(cache):  # noqa: F811
    """The harmful ones are others, so that the draws differ all the same."""
    left = len(read_benign_prompts()) - 160 - 4

    def told(**changes) -> list[str]:
        found = refusal(**{"n_train_benign": left, **changes}).splits().warnings
        return [text for text in found if "every benign prompt" in text]

    (said,) = told(train_seed=0)
    assert f"task.n_train_benign={left} takes every benign prompt that is left" in said
    drawn = [
        {item.item_id for item in refusal(n_train_benign=left, train_seed=s).splits().train}
        for s in (0, 1)
    ]
    assert drawn[0] != drawn[1] and len(drawn[0] & drawn[1]) >= left
    assert told() == [] == told(train_seed=0, n_train_benign=left - 1)
    assert told(train_seed=0, n_train_benign=0) == []


def test_a_train_seed_below_0_would_draw_what_another_does():
    with pytest.raises(UserError, match="train_seed=-1: must be 0 or more"):
        sentiment(train_seed=-1).splits()


@pytest.mark.parametrize("name", ["gsm8k", "harmbench", "xstest"])
def test_train_seed_on_public_sets(name, tmp_path):
    plain, drawn = (
        on_files(name, tmp_path).splits(),
        on_files(name, tmp_path, train_seed=5).splits(),
    )
    assert set(ids(plain.train)) != set(ids(drawn.train))
    assert plain.test == drawn.test and plain.validation == drawn.validation
    assert not set(ids(drawn.train)) & {*ids(drawn.validation), *ids(drawn.test)}


def test_few_shot_examples_are_never_drawn_as_training_items(tmp_path):
    """They come first out of the pool that train is drawn from."""
    users = [
        item.user
        for seed in (None, 0, 1, 2)
        for item in on_files("gsm8k", tmp_path, train_seed=seed, n_shots=3).splits().train
    ]
    shots = {user.split("Question: ")[i] for user in users for i in (1, 2, 3)}
    asked = {user.split("Question: ")[-1].removesuffix("\nAnswer:") for user in users}
    assert len(shots) == 3 and not {shot.split("\nAnswer:")[0] for shot in shots} & asked


def test_one_question_in_two_groups_is_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"question": f"q{i}", "answer": "Yes", "group": "a"} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, [*lines, {**lines[0], "group": "b"}])))
    sizes = {"n_train": 3, "n_validation": 3, "n_test": 3}
    with pytest.raises(UserError, match="the same question has other fields in line 1 than in"):
        task("jsonl", path=str(path), **sizes).splits()


def test_negative_seeds_are_refused_as_they_would_draw_what_positive_ones_do():
    with pytest.raises(UserError, match="split_seed=-1: must be 0 or more"):
        sentiment(split_seed=-1).splits()
