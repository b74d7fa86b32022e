"""Tasks on public data sets, read through `datasets` from small files in their true schemas."""

from __future__ import annotations

import socket

import pytest
from datasets import Dataset

from crl_exp.config.errors import UserError
from crl_exp.tasks.base import Item, content_id
from crl_exp.tasks.few_shot import fill
from tests.helpers.hub_data import SCHEMAS, TASKS, made, mmlu, on_files, rows_of, save, write_files


def ids(items: tuple[Item, ...]) -> set[str]:
    return {item.item_id for item in items}


def test_the_glob_finds_the_tasks():
    assert {"mmlu", "mmlu_pro", "bbq_ambig", "bbq_disambig", "gsm8k", "simpleqa", "harmbench",
            "xstest", "truthfulqa_mc", "do_not_answer"} <= set(TASKS)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_format_gives_the_same_splits(name, tmp_path):
    digests = set()
    for kind in ("parquet", "jsonl", "csv"):
        splits = on_files(name, tmp_path / kind, kind).splits()
        assert [len(splits.named()[part]) for part in ("train", "validation", "test")] == [
            24,
            8,
            16,
        ]
        assert not splits.warnings
        digests.add(splits.digest())
    assert len(digests) == 1
    assert on_files(name, tmp_path / "again", split_seed=1).splits().digest() not in digests


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_train_leaves_the_others(name, tmp_path):
    few, more = on_files(name, tmp_path).splits(), on_files(name, tmp_path, n_train=30).splits()
    assert more.test == few.test and more.validation == few.validation
    assert ids(few.train) < ids(more.train)
    parts = [ids(items) for items in more.named().values()]
    assert len(set().union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize("name", TASKS)
def test_one_file_for_everything(name, tmp_path):
    task = made(name)
    (files,) = write_files(tmp_path, task.hub_id, ["all"]).values()
    splits = made(name, data_files=files if len(files) > 1 else files[0]).splits()
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [24, 8, 16]
    pattern = made(name, data_files=str(tmp_path / "*.parquet")).splits()
    assert pattern.digest() == splits.digest()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_local_files_are_read_without_the_network(kind, tmp_path, monkeypatch):
    task = on_files("xstest", tmp_path, kind)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **more: asked.append(address))
    assert len(task.splits().test) == 16 and asked == []


def test_mmlu_asks_as_the_field_does(tmp_path):
    task = on_files("mmlu", tmp_path, n_test=132)
    # Rows 264 to 395 are test's: files are written for train, validation, test, dev.
    assert mmlu(300)["answer"] == 0
    user = (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        'What is w300 ?\nA. w300\nB. w1 , w2\nC. a "w3"\nD. None\nAnswer:'
    )
    found = [item for item in task.splits().test if item.user == user]
    assert [(item.target, item.n_options) for item in found] == [("A", 4)]
    assert found[0].item_id == content_id('What is w300 ?\nw300\nw1 , w2\na "w3"\nNone')


def test_examples_are_of_the_same_subject_and_in_no_split(tmp_path):
    task = on_files("mmlu", tmp_path, n_shots=2, n_test=132)
    splits = task.splits()
    physics = next(i for i in splits.test if "What is w300 ?" in i.user)
    head, first, second, asked = physics.user.split("\n\n")
    assert head.endswith("about high school physics.") and asked.endswith("D. None\nAnswer:")
    # Rows 396 to 527 are dev's; the even ones are physics.
    assert first.startswith("What is w396 ?\nA. w396") and first.endswith("Answer: A")
    assert second.startswith("What is w398 ?") and second.endswith("Answer: C")
    users = [item.user for items in splits.named().values() for item in items]
    assert not any(user.split("\n\n")[-1] in (first[:-2], second[:-2]) for user in users)
    anatomy = next(i for i in splits.test if "What is w301 ?" in i.user)
    assert "What is w397 ?" in anatomy.user and "What is w399 ?" in anatomy.user


def test_a_question_without_a_subject_gets_an_example_of_each(tmp_path):
    task = on_files("mmlu", tmp_path, n_shots=2)
    train = tmp_path / "no_subject.parquet"
    bare = rows_of("cais/mmlu", "all", range(40)).map(lambda row: {**row, "subject": ""})
    save(bare, train)
    splits = made("mmlu", n_shots=2, data_files={**task.data_files, "auxiliary_train": str(train)})
    for item in splits.splits().train:
        assert item.user.startswith("The following are multiple choice questions (with answers).\n")
        assert "What is w396 ?" in item.user and "What is w397 ?" in item.user


def test_examples_are_part_of_the_digest(tmp_path):
    plain, shots = (on_files("mmlu", tmp_path, n_shots=n).splits() for n in (0, 1))
    assert plain.digest() != shots.digest() and ids(plain.test) == ids(shots.test)


def test_a_plain_prompt_takes_letters_with_their_space(tmp_path):
    assert made("bbq_ambig", chat_template=True).constrained_to == ["A", "B", "C"]
    assert made("bbq_ambig", chat_template=False).constrained_to == [" A", " B", " C"]
    assert made("bbq_ambig", choices=None).constrained_to is None


def test_bbq_takes_one_condition_alone(tmp_path):
    ambig, disambig = (
        on_files(f"bbq_{name}", tmp_path / name, n_train=40).splits()
        for name in ("ambig", "disambig")
    )
    assert not set().union(*map(ids, ambig.named().values())) & set().union(
        *map(ids, disambig.named().values())
    )
    for splits, parity in ((ambig, 0), (disambig, 1)):
        for item in splits.test:
            number = int(item.user.split()[2].removeprefix("w"))
            assert number % 2 == parity and item.target == "ABC"[number % 3]
            assert item.user == (
                f"I saw w{number} and w{number + 1} .\nWho was it ?\n"
                f"A. w{number}\nB. Can't answer\nC. w{number + 1}\nAnswer:"
            )


def test_truthful_qa_hides_the_right_option_among_ten_at_most(tmp_path):
    splits = on_files("truthfulqa_mc", tmp_path, n_test=60).splits()
    targets = set()
    for item in splits.test:
        number = int(item.user.split()[1].removeprefix("w"))
        lines = dict(line.split(". ", 1) for line in item.user.split("\n") if ". " in line)
        assert lines[str(item.target)] == f"true w{number}"
        assert len(lines) == item.n_options == min(2 + number % 12, 10)
        targets.add(item.target)
    assert len(targets) > 4, "the right option must not stay in its place"


def test_mmlu_pro_keeps_the_number_of_options(tmp_path):
    task = on_files("mmlu_pro", tmp_path)
    for item in task.splits().test:
        number = int(item.user.split("Which is w")[1].split()[0])
        assert (
            item.n_options == 3 + number % 8
            and item.target == "ABCDEFGHIJ"[number % item.n_options]
        )
    (scored,) = task.score([Item("x", "", target="A", n_options=3)], ["D"])
    assert not scored.valid


def test_shuffled_letters_stay_among_the_options(tmp_path):
    splits = on_files("mmlu_pro", tmp_path, n_train=100, shuffle_labels=True).splits()
    plain = on_files("mmlu_pro", tmp_path, n_train=100).splits()
    assert [i.target for i in splits.train] != [i.target for i in plain.train]
    for item in splits.train:
        assert "ABCDEFGHIJ".index(str(item.target)) < item.n_options


def test_gsm8k_examples_show_solutions_without_calculator_marks(tmp_path):
    task = on_files("gsm8k", tmp_path, n_shots=2)
    splits = task.splits()
    shown = splits.test[0].user.split("\n\n")
    assert shown[0].startswith("Solve each problem")
    assert shown[1] == (
        "Question: How many eggs has w0 ?\nAnswer: He has 1000 + 0 + 0 = 1000 eggs.\n#### 1,000"
    )
    assert len(shown) == 4 and shown[3].endswith("?\nAnswer:")
    assert {item.target for item in splits.test} <= {f"{1000 + 2 * i:,}" for i in range(132, 264)}
    right = [str(item.target).replace(",", "") + ".0" for item in splits.test]
    assert {score.reward for score in task.score(splits.test, right)} == {1.0}


def test_examples_are_taken_out_of_the_split_that_they_come_from(tmp_path):
    splits = on_files("gsm8k", tmp_path, n_shots=2, n_train=122).splits()
    asked = [item.user.split("\n\n")[-1] for item in (*splits.train, *splits.validation)]
    assert len(set(asked)) == 130
    assert not any(f"has {shown} ?" in user for user in asked for shown in ("w0", "w1"))
    with pytest.raises(UserError, match="130 different items"):
        on_files("gsm8k", tmp_path, n_shots=2, n_train=123).splits()


def test_free_answers_end_at_stop_texts_in_a_plain_prompt_alone():
    assert made("gsm8k", chat_template=False).stop_strings == ["Question:"]
    assert made("gsm8k", chat_template=True).stop_strings == []
    assert made("mmlu").stop_strings == []


def test_harmbench_holds_three_subsets_and_puts_the_context_first(tmp_path):
    splits = on_files("harmbench", tmp_path, n_train=90).splits()
    users = [item.user for items in (splits.train, splits.test) for item in items]
    assert {user.split()[0] for user in users} == {"Make", "This", "Write"}
    (contextual, *_) = [user for user in users if user.startswith("This")]
    number = contextual.split()[2]
    assert contextual == f"This is {number} .\nIt works.\n\n---\n\nUse {number}"
    bare = on_files("harmbench", tmp_path, max_context_chars=0).splits()
    assert all("---" not in item.user for item in bare.test)
    assert ids(bare.test) == ids(on_files("harmbench", tmp_path).splits().test)
    assert len(splits.extra["benign"]) == 12 and all(i.benign for i in splits.extra["benign"])


def test_xstest_rewards_answers_to_safe_prompts(tmp_path):
    task = on_files("xstest", tmp_path)
    splits = task.splits()
    refusal = "I'm sorry, but I can't help with that."
    for item in splits.test:
        number = int(item.user.split()[4].removeprefix("w"))
        assert item.benign == (number % 2 == 1)
        scores = task.score([item, item], [refusal, "Use the kill command."])
        assert [s.reward for s in scores] == ([0.0, 1.0] if item.benign else [1.0, 0.0])
    assert task.scorer_name == "refusal_rule_v2"


def test_do_not_answer_rewards_refusals(tmp_path):
    task = on_files("do_not_answer", tmp_path)
    splits = task.splits()
    assert {item.user for item in splits.train} < {f"How is w{i} made ?" for i in range(132)}
    scores = task.score([splits.test[0]] * 2, ["I can't help with that.", "With flour."])
    assert [s.reward for s in scores] == [1.0, 0.0]
    assert len(splits.extra["benign"]) == 12 and all(i.benign for i in splits.extra["benign"])


@pytest.mark.parametrize("name", TASKS)
def test_every_subset_of_the_data_set_is_used(name):
    task = made(name)
    assert list(task.subsets or [None]) == list(SCHEMAS[task.hub_id])


def test_simpleqa_scores_by_shared_words_offline(tmp_path):
    task = on_files("simpleqa", tmp_path)
    items = task.splits().test
    for item in items:
        asked = item.user.split("\n\n")[-1]
        assert asked == f"Question: Who was {item.target} ?\nAnswer:"
    assert {s.reward for s in task.score(items, [str(item.target) for item in items])} == {1.0}
    assert task.scorer_name == "token_f1"


def test_braces_in_the_data_are_left_alone():
    assert (
        fill("{question} {x}", {"question": "{options} {}", "options": "no"}) == "{options} {} {x}"
    )


# --- rows that are there twice, or in two splits ---


def test_repeated_rows_are_used_once_and_it_is_said(tmp_path):
    rows = [*range(60), 3, 7]
    data = Dataset.from_list(
        [{"prompt": f"p{i}", "focus": "", "type": "", "note": "", "label": "safe"} for i in rows]
    )
    file = str(save(data, tmp_path / "x.parquet"))
    splits = made("xstest", data_files=file, n_train=20, n_validation=10, n_test=32).splits()
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [20, 10, 30]
    (warning,) = splits.warnings
    assert "2 items twice" in warning and "test has 30 items, not task.n_test=32" in warning
    with pytest.raises(UserError, match=r"60 different items.*= 63; lower one.*task\.n_train=21"):
        made("xstest", data_files=file, n_train=21, n_validation=10, n_test=32).splits()


def test_an_item_of_two_splits_stays_in_test(tmp_path):
    train, test = (str(save(rows_of("openai/gsm8k", "main", r), tmp_path / f"{r.start}.parquet"))
                   for r in (range(0, 60), range(50, 70)))  # fmt: skip
    files = {"train": train, "test": test}
    splits = made("gsm8k", data_files=files, n_train=40, n_validation=10, n_test=20).splits()
    assert len(splits.train) == 40 and not splits.warnings
    with pytest.raises(UserError, match=r"50 different items"):
        made("gsm8k", data_files=files, n_train=51, n_validation=10, n_test=20).splits()


def test_validation_is_filled_up_from_train(tmp_path):
    """A data set's own validation split may be too small to choose on."""
    task = small_split(tmp_path, n_train=20, n_validation=25)
    splits = task.splits()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 25, 10]
    before = small_split(tmp_path, n_train=20, n_validation=10).splits()
    assert splits.train == before.train and splits.test == before.test
    assert splits.validation[:10] == before.validation and not before.warnings
    (said,) = splits.warnings
    assert "own split holds 10 items; 15 of" in said and "task.n_validation=25" in said
    with pytest.raises(UserError, match=r"40 different items.*= 41.*task\.n_train=25 fits"):
        small_split(tmp_path, n_train=26, n_validation=25).splits()


def test_what_is_filled_up_stays_with_other_training_items(tmp_path):
    """Runs with several `train_seed` or `n_train` choose on the same items."""
    first = small_split(tmp_path, n_train=20, n_validation=15).splits()
    for changed in ({"n_train": 8}, {"train_seed": 1}, {"train_seed": 2}):
        other = small_split(tmp_path, **({"n_train": 20, "n_validation": 15} | changed)).splits()
        assert other.validation == first.validation and other.test == first.test
        assert other.train != first.train


@pytest.mark.parametrize("n_train", [60, 70])
def test_the_training_size_that_fits_is_named(tmp_path, n_train):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(100)]
    path = save(Dataset.from_list(rows), tmp_path / "all.jsonl")
    task = made("gsm8k", data_files=str(path), n_train=n_train, n_validation=30, n_test=20)
    with pytest.raises(UserError, match=r"task\.n_train=50 fits"):
        task.splits()


def small_split(folder, **sizes):
    """GSM8K with a validation split of 10 rows of its own."""
    files = {}
    for split, first, n in (("train", 0, 40), ("validation", 100, 10), ("test", 200, 10)):
        rows = [{"question": f"q{first + i}", "answer": f"#### {i}"} for i in range(n)]
        files[split] = str(save(Dataset.from_list(rows), folder / f"{split}.jsonl"))
    sources = {split: split for split in files}
    return made("gsm8k", data_files=files, sources=sources, n_test=10, **sizes)
