"""What can be wrong with a public task's config or data: told before the model is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item, Splits
from tests.helpers.hub_data import SCHEMAS, TASKS, made, on_files, rows_of, save
from tests.helpers.tiny_run import run_small


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gsm8k", {"choices": ["1", "2"]}, r"task\.choices=\['1', '2'\]: gsm8k takes free text"),
        ("simpleqa", {"choices": ["a", "b"]}, r"simpleqa takes free text.*task\.choices=null"),
        ("harmbench", {"choices": ["a", "b"]}, r"harmbench takes free text"),
        ("mmlu", {"choices": ["A", "B"]}, r"letters A to D; set task\.choices=\[A,B,C,D\]"),
        ("mmlu", {"n_shots": -1}, r"task\.n_shots=-1"),
        ("mmlu", {"question_template": "Q"}, r"must hold \{question\}"),
        ("harmbench", {"scorer": "phrase"}, r"task\.scorer=phrase: .*did you mean 'phrases'"),
        ("simpleqa", {"scorer": "f1"}, r"task\.scorer=f1: must be one of cross_encoder, token_f1"),
        ("simpleqa", {"threshold": 0.0}, r"task\.threshold=0\.0"),
        ("harmbench", {"classifier": {"batch_size": 0}}, r"task\.classifier\.batch_size=0"),
        ("harmbench", {"n_test_benign": 0}, r"task\.n_test_benign=0"),
        ("gsm8k", {"stop": [""]}, r"task\.stop=\[''\]"),
        ("bbq_ambig", {"context_condition": "ambiguous"}, r"must be ambig or disambig"),
        ("mmlu", {"data_files": {"test": "x.csv"}}, r"no file for 'validation'; give task"),
        ("gsm8k", {"data_files": {"tset": "x.csv", "train": "x.csv", "test": "x.csv"}},
         r"has 'tset', which openai/gsm8k hasn't; did you mean 'test'"),
        ("gsm8k", {"data_files": 3}, r"task\.data_files=3: give a file"),
        ("gsm8k", {"sources": {"trian": "x"}}, r"task\.sources=.*did you mean 'train'"),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_fault_of_the_config(name, changes, says):
    task = made(name, **changes)
    assert re.search(says, "\n".join(task.faults())), task.faults()


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("task", "file", "text", "says"),
    [
        ("gsm8k", "a.jsonl", '{"question": "q", "anwser": "#### 1"}\n',
         r"a\.jsonl lacks the column answer; did you mean 'anwser'\?; it has question, anwser"),
        ("gsm8k", "a.csv", "question\nq\n", r"a\.csv lacks the column answer"),
        ("gsm8k", "a.jsonl", '{"question": "q", "answer": "one"}\n',
         r"a\.jsonl, row 1: column answer has no number after ####"),
        ("gsm8k", "a.jsonl", '{"question": " ", "answer": "#### 1"}\n', r"question is empty"),
        ("gsm8k", "a.csv", "question,answer\n", r"a\.csv has no rows"),
        ("gsm8k", "a.csv", "question,answer\nq,#### 1\n", r"1 different items, but .*n_test"),
        ("gsm8k", "a.jsonl",
         '{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "#### 2"}\n',
         r"a\.jsonl, row 2: .*another answer than in .*a\.jsonl, row 1 \('q'\); keep one"),
        ("xstest", "a.csv", "prompt,label\np,safe\nq,safe\np,unsafe\n",
         r"a\.csv, row 3: .*another answer than in .*a\.csv, row 1"),
        ("gsm8k", "a.jsonl", "{not json\n", r"can't read .*a\.jsonl"),
        ("gsm8k", "a.parquet", "not parquet", r"can't read .*a\.parquet"),
        ("gsm8k", "a.txt", "x", r"a\.txt must end in \.parquet, \.csv"),
        ("mmlu", "a.csv", "question,choices,answer,subject\nq,\"['a' 'b']\",0,s\n",
         r"row 1: column choices holds .*write lists as JSON"),
        ("mmlu", "a.csv", 'question,choices,answer,subject\nq,"[""a"", ""b""]",2,s\n',
         r"column answer is '2', not a whole number from 0 to 1"),
        ("mmlu", "a.csv", 'question,choices,answer,subject\nq,"[""a""]",0,s\n',
         r"column choices has 1 options, not 2 to 4"),
        ("mmlu_pro", "a.csv", 'question,options,answer,category\nq,"[""a"", ""b""]",C,s\n',
         r"column answer is 'C', not a letter of its options"),
        ("xstest", "a.csv", "prompt,label\np,maybe\n", r"label is 'maybe', not safe or unsafe"),
        ("truthfulqa_mc", "a.jsonl",
         '{"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}}\n',
         r"one label for each choice, one of them 1"),
        ("truthfulqa_mc", "a.jsonl", '{"question": "q", "mc1_targets": {"choices": ["a"]}}\n',
         r"must hold choices and labels"),
    ],
)  # fmt: skip
def test_bad_data_is_named_with_its_place(task, file, text, says, tmp_path):
    with pytest.raises(UserError, match=says):
        made(task, data_files=written(tmp_path, file, text)).splits()


def test_cells_of_a_csv_file_are_taken_as_written(tmp_path):
    lines = ["problem,answer", *(f"q{i},{a}" for i, a in enumerate(("None", "007", "NA", "1.50")))]
    file = written(tmp_path, "a.csv", "\n".join(lines) + "\n")
    task = made("simpleqa", data_files=file, n_train=2, n_validation=1, n_test=1)
    parts = task.splits()
    targets = [str(i.target) for p in ("train", "validation", "test") for i in parts.named()[p]]
    assert sorted(targets) == ["007", "1.50", "NA", "None"]


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"there is no file no/such\.csv"):
        made("gsm8k", data_files="no/such.csv").splits()


def test_a_hub_out_of_reach_names_the_data_set_and_the_offline_way(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says = r"task\.hub_id=walledai/XSTest: can't load .*hf auth login.*task\.data_files=FILE"
    with pytest.raises(UserError, match=says):
        made("xstest").splits()


@pytest.mark.parametrize("name", TASKS)
def test_a_run_whose_data_is_not_to_be_had_leaves_nothing(name, tiny_files, tmp_path, monkeypatch):
    """Neither a run directory nor a failed run in MLflow: it hasn't begun."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = [o for o in tiny_files.overrides() if not o.startswith(("task", "tracking"))]
    with pytest.raises(UserError, match=r"task\.(hub_id|classifier|cross_encoder)"):
        run_small([*kept, f"task={name}", "method=none", f"output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_run_that_wants_more_items_than_the_hub_has_leaves_nothing(
    tiny_files, tmp_path, monkeypatch
):
    def hub(self, subset, split):
        return "the hub", list(rows_of(self.hub_id, subset, range(60)))

    monkeypatch.setattr("crl_exp.tasks.data.rows.Source._from_hub", hub)
    kept = [o for o in tiny_files.overrides() if not o.startswith(("task", "tracking"))]
    typed = [*kept, "task=gsm8k", "task.n_test=1000", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"has 60 different items, but .*task\.n_test"):
        run_small([*typed, "method=none"])
    assert not (tmp_path / "out").exists()


def test_too_many_examples(tmp_path):
    file = str(save(rows_of("openai/gsm8k", "main", range(60)), tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"fewer than task\.n_shots=61; lower task\.n_shots"):
        made("gsm8k", data_files=file, n_shots=61).splits()


def test_labels_that_do_not_exist_are_not_shuffled(tmp_path):
    with pytest.raises(UserError, match="shuffle_labels"):
        on_files("harmbench", tmp_path, shuffle_labels=True).splits()


def test_every_schema_belongs_to_a_task():
    assert set(SCHEMAS) == {made(name).hub_id for name in TASKS}


def test_an_empty_split_is_still_an_error():
    with pytest.raises(UserError, match="empty"):
        Splits((), (Item("a", ""),), (Item("b", ""),)).check_disjoint()
