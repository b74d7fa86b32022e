"""task=jsonl: answers of each kind, and sizes that are shares of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.config.keys import frozen_config, run_key, settle
from crl_exp.config.sections import build
from crl_exp.runs.directory import RunDirectory
from crl_exp.tasks.base import Item, Task
from crl_exp.tasks.own.answer_kinds import WRITTEN
from tests.helpers.tiny_run import quickly_composed, run_small, write_task

FREE = ("task.choices=null", "task.max_new_tokens=3")


def lines(path: Path, answers: list) -> Path:
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def typed(path: Path, kind: str, *more: str) -> list[str]:
    return ["task=jsonl", f"task.path={path}", f"task.answer_kind={kind}", *FREE, *more]


def task_of(overrides: list[str]) -> Task:
    config = quickly_composed(overrides)
    settle(config)
    return build(config.task, "task", Task)


@pytest.mark.parametrize(
    ("kind", "target", "rewards"),
    [
        ("exact", "New York", {'"new  york."': 1, "**New York**": 1, "in New York": 0,
                               "\uff2eew York!": 1}),
        ("number", "1,234", {"so it is 1234.0": 1, "#### 1234 and 5": 1, "1234 or 5": 0}),
        ("f1", "the red house", {"A red house": 1, "red": 2 / 3, "blue": 0}),
        ("contains", "Oslo", {"It is OSLO, I think": 1, "Oslofjord": 0, "(oslo)": 1}),
        ("contains", "3.5%", {"It is 3.5%.": 1, "13.5%": 0}),
        ("regex", r"^(yes|no)\b", {"yes, it is": 1, "Yes": 0, "oh yes": 0}),
    ],
)  # fmt: skip
def test_what_each_kind_of_answer_rewards(kind, target, rewards):
    items = [Item(str(n), "q", target) for n in range(len(rewards))]
    scores = WRITTEN[kind].scorer(items, list(rewards))
    assert [score.reward for score in scores] == pytest.approx(list(rewards.values()))
    assert all(score.valid for score in scores)


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_answer_that_says_nothing_is_invalid_whatever_the_kind(kind):
    (score,) = WRITTEN[kind].scorer([Item("1", "q", "1" if kind == "number" else ".*")], ["  "])
    assert (score.reward, score.valid) == (0, False)


@pytest.mark.parametrize(
    ("kind", "bad", "says"),
    [
        ("number", "none", "has no number"), ("f1", "the", "has no word"),
        ("exact", "...", "no letter or digit"), ("contains", "?", "no letter or digit"),
        ("regex", "(a", "is no regular expression"), ("regex", "*", "is no regular expression"),
    ],
)  # fmt: skip
def test_an_answer_that_lacks_what_its_kind_needs_is_named_with_its_line(kind, bad, says, tmp_path):
    path = lines(tmp_path / "own.jsonl", ["1 a", "2 b", bad, "3 c"])
    task = task_of(typed(path, kind, "task.n_train=1", "task.n_validation=1", "task.n_test=1"))
    with pytest.raises(UserError, match=rf"own\.jsonl, line 3: .*{says}.*answer_kind={kind}"):
        task.splits()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task.answer_kind=numbr"], "did you mean 'number'"),
        (["task.answer_kind=number"], "set task.choices=null and task.max_new_tokens=32"),
        (["task.choices=null"], r"task\.answer_kind=exact\|number"),
        (["task.stop=['\\n']"], "task.stop"),
    ],
)
def test_kinds_that_do_not_fit_together_say_what_to_set(overrides, says, tmp_path):
    path = write_task(tmp_path / "own.jsonl", n=20)
    sizes = [f"task.n_{part}=5" for part in ("train", "validation", "test")]
    with pytest.raises(UserError, match=says):
        task_of(["task=jsonl", f"task.path={path}", "task.choices=[yes,no]", *sizes,
                 *overrides]).splits()  # fmt: skip


# --- sizes ---


def sized(path: Path, train: str, validation: str, test: str, *more: str) -> list[str]:
    return typed(path, "number", f"task.n_train={train}", f"task.n_validation={validation}",
                 f"task.n_test={test}", *more)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (("null", "null", "null"), (60, 15, 25)), ((".5", "null", "10"), (50, 40, 10)),
        (("null", "null", "20"), (64, 16, 20)), ((".29", ".1", ".2"), (29, 10, 20)),
        (("0.6", "15", "null"), (60, 15, 25)),
    ],
)  # fmt: skip
def test_shares_and_sizes_left_out_become_numbers_of_the_files_questions(sizes, found, tmp_path):
    """Questions that come twice count once."""
    path = lines(tmp_path / "own.jsonl", list(range(100)))
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    splits = task_of(sized(path, *sizes)).splits()
    drawn = (splits.train, splits.validation, splits.test)
    assert tuple(map(len, drawn)) == found
    assert len({item.item_id for part in drawn for item in part}) == sum(found)


def test_a_key_is_of_the_numbers_that_shares_come_to(tmp_path):
    path = lines(tmp_path / "own.jsonl", list(range(40)))
    shares = quickly_composed(sized(path, ".6", "null", "null"))
    key = run_key(shares)
    assert run_key(quickly_composed(sized(path, "24", "6", "10"))) == key
    lines(path, list(range(50)))
    assert run_key(shares) != key, "a longer file is split into others"


def test_a_frozen_run_has_the_numbers_and_needs_no_file_for_its_key(tmp_path):
    path = lines(tmp_path / "own.jsonl", list(range(40)))
    run = RunDirectory(
        quickly_composed([*sized(path, ".6", "null", "null"), f"output_dir={tmp_path}"])
    )
    run.freeze()
    path.unlink()
    task = frozen_config(run.path).task
    assert (task.n_train, task.n_validation, task.n_test) == (24, 6, 10)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((".9", "null", ".3"), "has 20 items.*task.n_train=0.9.*would make 18 for n_train"),
        (("1.5", "null", "null"), r"task\.n_train=1\.5: a share must be over 0 and under 1"),
        ((".01", "null", "null"), "would make 0 for n_train"),
    ],
)
def test_shares_that_do_not_add_up_are_refused_with_what_they_would_make(sizes, says, tmp_path):
    path = lines(tmp_path / "own.jsonl", list(range(20)))
    with pytest.raises(UserError, match=says):
        run_key(quickly_composed(sized(path, *sizes)))


def test_shares_are_of_the_groups_that_are_asked_for(tmp_path):
    rows = [{"question": f"q{n}", "answer": n, "group": "ab"[n % 2]} for n in range(40)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = task_of(sized(path, "null", "null", "null", "task.groups=[a]")).splits()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 3, 5)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_has_nothing_to_split(content, tmp_path):
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(UserError, match="has 0 items"):
        run_key(quickly_composed(sized(tmp_path / "own.jsonl", "null", "null", "null")))


def test_a_run_of_written_numbers_from_start_to_end(tiny_files, tmp_path):
    path = write_task(tmp_path / "own.jsonl", n=40, answers=("1", "2"))
    model = [one for one in tiny_files.overrides() if not one.startswith("task")]
    overrides = [*model, *sized(path, ".6", "null", "null"), "method=corrsteer_s",
                 f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    result, folder = run_small(overrides)
    assert (result["scorer"], result["n"]) == ("number", 10)
    assert frozen_config(folder).task.n_train == 24
