"""`show`: a run's answers as they were kept, beside the unsteered ones."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pyarrow.parquet as pq
import pytest

from crl_exp.__main__ import main
from crl_exp.runs.answers import NoAnswersError, answers, drawn
from crl_exp.runs.items import TEXTS, ItemTexts, item_rewards, items_table, write_items
from crl_exp.runs.records import Record
from tests.config.test_foreign_text import CONTROLS
from tests.config.test_foreign_text import TEXTS as FOREIGN
from tests.helpers.synthetic import config, run_of_items
from tests.helpers.tiny_run import ROOT, run_small


@pytest.fixture(scope="module")
def steered(tiny_files, tmp_path_factory):
    """A finished run whose answers partly changed."""
    out = tmp_path_factory.mktemp("show")
    steering = ["method=corrsteer_a", "coefficient=relative", "coefficient.ratio=3", "layers=all"]
    return run_small([*tiny_files.overrides(), *steering, f"output_dir={out}", "sweep_name=s"])[1]


def said(capsys, *typed: str) -> str:
    assert main(["show", *typed]) == 0, capsys.readouterr()
    return capsys.readouterr().out


def refused(capsys, *typed: str) -> str:
    assert main(["show", *typed]) == 1
    return capsys.readouterr().err


def test_what_was_asked_and_answered_is_kept(steered, tiny_files):
    """As the task has it, and so that scoring the kept texts gives the kept rewards."""
    rows = {r["question"]: r["answer"] for r in map(
        json.loads, (tiny_files.root / "task.jsonl").read_text().splitlines())}  # fmt: skip
    for split in ("test", "validation"):
        items, rewards = answers(Record(steered), split), item_rewards(Record(steered), split)
        assert tuple(one.item_id for one in items) == rewards.ids
        for one, was, now in zip(items, rewards.baseline, rewards.steered, strict=True):
            assert one.target == rows[one.prompt]
            assert one.reward_baseline == was == (one.baseline == one.target)
            assert one.reward_steered == now == (one.steered == one.target)
            assert one.changed == (one.baseline != one.steered)
    assert any(one.changed for one in answers(Record(steered)))


def test_items_are_chosen_by_what_became_of_them(steered, capsys):
    items = answers(Record(steered))
    for which, wanted in (
        ("fixed", [one for one in items if one.reward_steered > one.reward_baseline]),
        ("broken", [one for one in items if one.reward_steered < one.reward_baseline]),
        ("changed", [one for one in items if one.changed]),
    ):
        told = said(capsys, str(steered), f"--{which}", "--limit", "16")
        assert f"{len(wanted)} of 16 items" in told
        assert [one.item_id in told for one in items] == [one in wanted for one in items]
    assert said(capsys, str(steered), "--limit", "3").count("target: ") == 3
    assert "and 13 more: --limit 16" in said(capsys, str(steered), "--limit", "3")


def test_an_item_is_shown_with_what_was_added(steered, capsys):
    table = pq.read_table(steered / "interventions.parquet")
    one = answers(Record(steered))[2]
    mine = [row for row in table.to_pylist() if row["item"] == one.item_id]
    assert len({row["layer"] for row in mine}) == 3
    for wanted in ("3", one.item_id, one.item_id[:8]):
        told = " ".join(said(capsys, str(steered), "--item", wanted).split())
        assert f"item 3 of 16 {one.item_id}" in told and told.count("target:") == 1
        assert f"asked: {one.prompt} target: {one.target}" in told
        for row in mine:
            dose = f"{row['coefficients'][0]:.3g}"
            assert f"layer {row['layer']}: feature {row['features'][0]} × {dose} at 1 of 1" in told


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("17", "there are 16 items, 1 to 16; the nearest is 16"),
        ("0", "the nearest is 1"),
        ("", "no item has this id"),
        ("nonsense", "items are numbered 1 to 16"),
    ],
)
def test_an_item_that_is_not_there_is_told_with_what_is(steered, capsys, wanted, told):
    assert told in refused(capsys, str(steered), "--item", wanted)


def test_an_id_with_a_typo_is_told_with_the_nearest(steered, capsys):
    item = answers(Record(steered))[5].item_id
    told = refused(capsys, str(steered), "--item", f"{item[:-1]}x")
    assert f"did you mean {item!r}" in told


def test_a_split_that_is_not_there_is_told_with_those_that_are(steered, capsys):
    told = refused(capsys, str(steered), "--split", "train")
    assert "no items of 'train'; it has test, validation" in told


def test_a_row_of_a_report_is_shown_by_its_first_seed(tmp_path, capsys):
    runs = [synthetic(tmp_path, seed=seed) for seed in (1, 0)]
    told = said(capsys, "demo:CRL@18", "--output-dir", str(tmp_path), "--fixed")
    assert f"answers of seed 0 (demo/{runs[1].key}); other seeds: demo/{runs[0].key}" in told
    assert "answer 1" in told and "answer 2" not in told
    assert f"demo/{runs[0].key}" in said(capsys, runs[0].key, "--output-dir", str(tmp_path))


def synthetic(folder, texts=("answer 1", "answer 2"), seed=0):
    """A finished run: the first item came right, the others went wrong."""
    n = len(texts)
    was, now = [0.0] + [1.0] * (n - 1), [1.0] + [0.0] * (n - 1)
    run = run_of_items(config(folder, seed=seed), was, now)
    kept = ItemTexts(texts, [None] * n, ["before"] * n, texts)
    ids = [f"item{i:04d}" for i in range(n)]
    write_items(run.path, [items_table("test", ids, was, now, [True] * n, [""] * n, kept)])
    return run


def test_foreign_text_is_kept_and_nothing_of_it_is_obeyed(tmp_path, monkeypatch):
    """A lone surrogate, which UTF-8 can't hold, is written out; all else is kept as it was."""
    run = synthetic(tmp_path, FOREIGN)
    kept = [one.prompt for one in answers(Record(run.path))]
    assert kept == [text.replace("\ud800", "\\ud800") for text in FOREIGN]
    terminal = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
        assert main(["show", str(run.path), "--limit", "99"]) == 0
        sys.stdout.flush()
        told = terminal.getvalue().decode("ascii")
    assert not CONTROLS & set(told) and "[/bold][red]x[/]" in told


def test_a_long_text_is_cut_in_a_list_and_whole_by_itself(tmp_path, capsys):
    run = synthetic(tmp_path, ("x" * 5000, "y"))
    assert "… (5,000 characters; --item shows all)" in said(capsys, str(run.path))
    assert said(capsys, str(run.path), "--item", "1").count("x") >= 10_000


def test_a_run_of_before_says_so_and_what_to_do(tmp_path, capsys):
    for version, told in (
        ("before_the_house", "it was run before answers were kept. The line that made it, typed"),
        ("first_version", "it was run before there was one. The line that made it, typed"),
    ):
        shutil.copytree(ROOT / "tests" / "fixtures" / version / "old", tmp_path / version)
        done = sorted((tmp_path / version).glob("*/result.json"))
        assert done
        for path in done:
            assert told in refused(capsys, str(path.parent)), version
    # its rewards are read as ever
    assert (
        len(item_rewards(Record(sorted((tmp_path / "before_the_house").glob("9*"))[0])).ids) == 16
    )


def test_without_texts_the_file_is_what_it_was(tmp_path):
    run = run_of_items(config(tmp_path), [0, 1], [1, 1])
    there = pq.read_schema(run.path / "items.parquet").names
    assert there == ["item_id", "split", "reward_baseline", "reward_steered", "changed", "group"]
    with pytest.raises(NoAnswersError, match="before answers were kept"):
        answers(Record(run.path))
    assert not set(TEXTS.names) & set(there)


def test_items_are_drawn_alike_whatever_their_order(steered):
    items = answers(Record(steered))
    some = drawn(items, 5)
    assert drawn(items[::-1], 5) == some and len(some) == 5
    assert [one.number for one in some] == sorted(one.number for one in some)
    assert some != items[:5] and drawn(items, 99) == items
