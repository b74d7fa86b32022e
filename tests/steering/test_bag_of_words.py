"""The bag of words reads words and nothing else."""

from __future__ import annotations

import json

import pytest

from crl_exp.config.errors import UserError
from tests.helpers.tiny_run import lab_of, run_small

FREE = ["task.choices=null", "task.max_new_tokens=4"]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    """Questions of which the answer is the word that stands among others."""
    path = tmp_path / "words.jsonl"
    rows = [
        {"question": f"w{i % 29} {'good' if i % 2 else 'bad'} w{(7 * i) % 31}",
         "answer": "yes" if i % 2 else "no"}
        for i in range(120)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["task.n_train=60", "task.n_validation=20", "task.n_test=40"]
    return [*tiny_files.overrides(), "method=bag_of_words", f"task.path={path}", *sizes,
            f"output_dir={tmp_path / 'out'}"]  # fmt: skip


def test_words_that_decide_are_learned_and_no_layer_is_steered(common):
    result, folder = run_small([*common, "layers.layer=99"])
    assert result["accuracy_steered"] == 1 and result["layers"] == []
    assert json.loads((folder / "features.json").read_text()) == {}


def test_shuffled_labels_teach_it_nothing(common):
    result, _ = run_small([*common, "task.shuffle_labels=true"])
    assert 0.2 < result["accuracy_steered"] < 0.8


def test_what_it_cannot_do_is_told(common):
    with pytest.raises(UserError, match=r"method=bag_of_words answers with one of the .*options"):
        lab_of([*common, *FREE])
    with pytest.raises(UserError, match=r"method\.strengths=\[0"):
        lab_of([*common, "method.strengths=[0.0]"])
