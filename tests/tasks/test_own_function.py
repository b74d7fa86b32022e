"""task.scorer=function: a reward from a module of one's own, in single runs, jobs and retries."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from crl_exp.config import own_code
from crl_exp.config.errors import UserError
from crl_exp.config.keys import frozen_config, run_key, settle
from crl_exp.config.sections import build
from crl_exp.experiments.run import run_experiment
from crl_exp.tasks.base import Task
from crl_exp.tasks.own.function import FunctionScorer
from tests.helpers.tiny_run import quickly_composed, run_small, small

GOOD = """
def score(prompts, answers, items):
    return [item["weight"] for item in items]
"""


@pytest.fixture(autouse=True)
def paths_as_before(monkeypatch):
    """What a test adds to the path and imports is gone after it."""
    monkeypatch.setattr(own_code, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("rewards_")]:
        del sys.modules[name]


def module(folder: Path, source: str, name: str) -> list[str]:
    """Overrides for a function `score` in a module of this name; names differ by test, as a process
    imports a module once."""
    (folder / f"{name}.py").write_text(source)
    rows = [{"question": f"w{n} w1", "weight": n / 60} for n in range(60)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["task=jsonl", f"task.path={folder / 'own.jsonl'}", "task.choices=null",
            "task.max_new_tokens=2", "task.scorer=function", f"task.function={name}.score",
            f"own_code=[{folder}]", "task.n_train=24", "task.n_validation=8",
            "task.n_test=16"]  # fmt: skip


def task_of(overrides: list[str]) -> Task:
    config = quickly_composed(overrides)
    settle(config)
    return build(config.task, "task", Task)


def test_a_function_is_given_prompts_answers_and_whole_lines(tmp_path):
    source = """
def score(prompts, answers, items):
    assert [item["question"] for item in items] == prompts and items[0]["answer"] is None
    return [item["weight"] if answer == "yes" else 0 for answer, item in zip(answers, items)]
"""
    task = task_of(module(tmp_path, source, "rewards_lines"))
    items = task.splits().test
    rewards = [score.reward for score in task.score(items, ["yes"] * len(items))]
    assert rewards == [int(item.user[1:].split()[0]) / 60 for item in items]
    assert task.scorer_name.startswith("function(rewards_lines.score@")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0] * (len(items) + 1)", "gave 2 values; it must return 1 numbers"),
        ("return [float('nan')] * len(items)", r"gave nan, which is no number from 0 to 1; item"),
        ("return [1.5] * len(items)", r"gave 1.5, .*item [0-9a-f]{12} \('w"),
        ("return ['1'] * len(items)", "gave '1', which is no number"),
        ("return None", "gave None, a NoneType; it must return a list"),
        ("return 'yes'", "gave 'yes', a str"),
        ("return {0: 1.0}", "a dict; it must return a list"),
        ("raise KeyError('rubric')", r"raised KeyError: 'rubric'; item [0-9a-f]{12} \('w"),
    ],
)
def test_what_is_no_reward_is_refused_before_a_run_with_the_item(body, says, tmp_path, request):
    name = f"rewards_bad{request.node.callspec.indices['body']}"
    source = f"def score(prompts, answers, items):\n    {body}\n"
    with pytest.raises(UserError, match=says):
        task_of(module(tmp_path, source, name)).splits()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("score = 3", "is a int, not a function"),
        ("def score(prompts, answers): ...", r"must be called as score\(prompts, answers, items\)"),
        ("def scores(): ...", "has no score"),
        ("import no_such_thing", "can't be imported .ModuleNotFoundError: .*no_such_thing"),
        ("def score(:", "can't be imported .SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_had_says_why(source, says, tmp_path, request):
    name = f"rewards_none{request.node.callspec.indices['source']}"
    with pytest.raises(UserError, match=says):
        task_of(module(tmp_path, source, name)).splits()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.function=no_such_module_here.score", "there is no module.*launch from the folder"),
        ("task.function=score", "must be MODULE.FUNCTION"),
        ("task.function=null", "must be MODULE.FUNCTION"),
        ("task.scorer=answer", "isn't used without task.scorer=function"),
        ("task.scorer=functoin", "did you mean 'function'"),
        ("task.answer_kind=f1", "does nothing with task.scorer=function"),
    ],
)
def test_a_name_that_means_nothing_says_what_to_set(override, says, tmp_path):
    with pytest.raises(UserError, match=says):
        task_of([*module(tmp_path, GOOD, "rewards_named"), override]).splits()


def test_the_item_is_named_that_makes_a_function_raise(tmp_path):
    source = """
def score(prompts, answers, items):
    return [1 / (len(answer) - 3) for answer in answers]
"""
    task = task_of(module(tmp_path, source.replace("- 3", "+ 3"), "rewards_raises"))
    items = task.splits().test[:3]
    (tmp_path / "rewards_later.py").write_text(source)
    digest = own_code.source_digest("rewards_later", "")
    with pytest.raises(UserError, match=rf"ZeroDivisionError.*item {items[1].item_id} .*'abc'"):
        FunctionScorer("rewards_later.score", digest)(items, ["abcd", "abc", "abcde"])


def test_a_function_that_does_not_mean_to_be_caught_ends_the_run(tiny_files, tmp_path):
    """A reward out of range after the trial on one item: the run fails, and says which item."""
    source = """
calls = []
def score(prompts, answers, items):
    calls.append(len(items))
    return [0.5] * len(items) if sum(calls) < 3 else [2.0] * len(items)
"""
    own = module(tmp_path, source, "rewards_turns")
    model = [one for one in tiny_files.overrides() if not one.startswith("task")]
    overrides = [*model, *own, "method=none", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"gave 2\.0, which is no number from 0 to 1; item"):
        run_small(overrides)
    (status,) = (tmp_path / "out").glob("*/*/status.json")
    said = json.loads(status.read_text())
    assert said["state"] == "failed" and "gave 2.0" in said["error"]
    assert not list((tmp_path / "out").glob("*/*/result.json"))


def test_an_edited_function_is_another_run_and_the_old_one_is_not_gone_on_with(
    tiny_files, tmp_path
):
    own = module(tmp_path, GOOD, "rewards_edited")
    model = [one for one in tiny_files.overrides() if not one.startswith("task")]
    overrides = [*model, *own, "method=none", f"output_dir={tmp_path / 'out'}"]
    result, folder = run_small(overrides)
    assert result["scorer"].startswith("function(rewards_edited.score@")
    assert run_key(small(overrides)) == folder.name
    (tmp_path / "rewards_edited.py").write_text(GOOD + "# other\n")
    assert run_key(small(overrides)) != folder.name
    (folder / "result.json").unlink()
    frozen = frozen_config(folder)
    with pytest.raises(UserError, match=r"something else in task\.function=rewards_edited\.score"):
        run_experiment(frozen, skip_finished=True)
    (folder / "inputs.json").unlink()
    (folder / "data.json").unlink()
    with pytest.raises(UserError, match=r"rewards_edited\.py was edited since this run was frozen"):
        run_experiment(frozen, skip_finished=True)
    (tmp_path / "rewards_edited.py").write_text(GOOD)
    again = run_experiment(frozen_config(folder), skip_finished=True)
    assert again is not None and again["run_key"] == folder.name


def test_a_process_that_goes_on_after_an_edit_takes_the_new_function(tmp_path):
    """As a notebook does."""
    own = module(tmp_path, GOOD, "rewards_notebook")
    first = task_of(own)
    item = first.splits().test[0]
    (tmp_path / "rewards_notebook.py").write_text(GOOD.replace('["weight"]', '["weight"] / 2'))
    second = task_of(own)
    assert second.score([item], [""])[0].reward == json.loads(item.row)["weight"] / 2
    with pytest.raises(UserError, match="was edited since this run was frozen"):
        first.score([item], [""])


def test_a_function_in_the_working_directory_is_found_from_elsewhere(tmp_path, monkeypatch):
    """Its folder is noted in the config."""
    own = module(tmp_path, GOOD, "rewards_here")
    monkeypatch.chdir(tmp_path)
    sys.path.append(str(tmp_path))  # as every command does, crl_exp/config/paths.py
    config = quickly_composed([one for one in own if not one.startswith("own_code")])
    settle(config)
    assert list(config.own_code) == [str(tmp_path)]


def test_lines_that_differ_in_other_fields_alone_are_told_apart(tmp_path):
    own = module(tmp_path, GOOD, "rewards_twice")
    path = tmp_path / "own.jsonl"
    path.write_text(path.read_text() + '{"question": "w3 w1", "weight": 1}\n')
    with pytest.raises(UserError, match="other fields in line 4 than in line 61"):
        task_of(own).splits()
