"""items.parquet: what a run writes, what reads it, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.kinds.evaluation import INTERVENTIONS
from crl_exp.runs.directory import write_json
from crl_exp.runs.items import NoItemsError, aligned, item_rewards, items_table, pc, write_items
from crl_exp.runs.records import Record
from crl_exp.tasks.base import Item, Splits
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import run_small


@pytest.fixture(scope="module")
def tiny_result(tiny_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("items")
    steering = ["method=corrsteer_a", "coefficient=relative", "coefficient.ratio=3", "layers=all"]
    return run_small([*tiny_files.overrides(), *steering, f"output_dir={out}"])


def test_a_run_writes_every_item_of_every_evaluated_split(tiny_result):
    result, path = tiny_result
    table = pq.read_table(path / "items.parquet")
    assert table.schema.field("item_id").type == pa.string()
    assert table["split"].value_counts().to_pylist() == [
        {"values": "test", "counts": 16}, {"values": "validation", "counts": 8},
    ]  # fmt: skip
    for split, figures in (("test", result), ("validation", result["validation"])):
        found = item_rewards(Record(path), split)
        assert len(set(found.ids)) == figures["n"]
        assert found.baseline.mean() == pytest.approx(figures["accuracy_baseline"], abs=0)
        assert (found.steered - found.baseline).mean() == figures["delta"]
    changed = table.filter(pc.equal(table["split"], "test"))["changed"].to_numpy()
    assert 0 < changed.sum() < 16


def test_a_run_of_before_is_read_from_its_interventions(tiny_result, tmp_path):
    _, path = tiny_result
    wanted = item_rewards(Record(path))
    old = tmp_path / "demo" / path.name
    shutil.copytree(path, old)
    (old / "items.parquet").unlink()
    found = item_rewards(Record(old))
    assert set(found.ids) == set(wanted.ids)
    mine, theirs = aligned([(Record(path), wanted), (Record(old), found)], "test")
    np.testing.assert_array_equal(mine.steered, theirs.steered)
    np.testing.assert_array_equal(mine.baseline, theirs.baseline)
    with pytest.raises(NoItemsError, match=r"single items of validation.*resume=force"):
        item_rewards(Record(old), "validation")


def synthetic(folder, ids, n=None, seed=0, **columns):
    """A finished run with these items on test."""
    run = finished_run(config(folder, seed=seed), 0.1, n=len(ids) if n is None else n)
    rewards = np.arange(len(ids)) % 2
    table = items_table(
        "test",
        [str(i) for i in ids],
        (1 - rewards).tolist(),
        rewards.tolist(),
        (rewards == 1).tolist(),
        [""] * len(ids),
    )
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    write_items(run.path, [table])
    return Record(run.path)


def test_an_id_that_comes_twice_is_refused_with_the_count(tmp_path):
    with pytest.raises(UserError, match="2 of the 5 items of test have an id"):
        item_rewards(synthetic(tmp_path, ["a", "b", "a", "c", "b"]))


def test_ids_that_are_numbers_are_refused(tmp_path):
    run = synthetic(tmp_path, ["7", "8"])
    table = pq.read_table(run.path / "items.parquet")
    pq.write_table(table.set_column(0, "item_id", pa.array([7, 8])), run.path / "items.parquet")
    with pytest.raises(UserError, match="item_id is int64, but ids are text"):
        item_rewards(run)


def test_ids_stay_the_text_that_they_are(tmp_path):
    odd = ["123456e78901", "007", "7", "1_000", "0x10", "true", "ä"]
    assert item_rewards(synthetic(tmp_path, odd)).ids == tuple(odd)


def test_more_columns_may_stand_beside(tmp_path):
    run = synthetic(tmp_path, ["a", "b"])
    table = pq.read_table(run.path / "items.parquet")
    table = table.append_column("prompt", pa.array(["x", "y"]))
    pq.write_table(table, run.path / "items.parquet")
    assert item_rewards(run).ids == ("a", "b")


def test_items_that_are_missing_are_told_with_counts(tmp_path):
    with pytest.raises(UserError, match=r"has 2 items of test, but result.json has 3"):
        item_rewards(synthetic(tmp_path / "one", ["a", "b"], n=3))
    runs = [synthetic(tmp_path, "abcdef"), synthetic(tmp_path, "defghi", seed=1)]
    with pytest.raises(UserError, match="3 are only in the first, 3 only in the second"):
        aligned([(run, item_rewards(run)) for run in runs], "test")


def test_items_are_paired_by_id_not_by_place(tmp_path):
    runs = [synthetic(tmp_path, "abcd"), synthetic(tmp_path, "dcab", seed=1)]
    found = aligned([(run, item_rewards(run)) for run in runs], "test")
    assert found[1].ids == found[0].ids == tuple("abcd")
    assert found[0].steered.tolist() == [0, 1, 0, 1]
    assert found[1].steered.tolist() == [0, 1, 1, 0]


def test_interventions_that_leave_items_out_are_not_enough(tmp_path):
    run = finished_run(config(tmp_path), 0.1, n=3)
    rows = {name: [None] * 2 for name in INTERVENTIONS.names}
    rows |= {"split": ["test"] * 2, "item": ["a", "b"], "reward_baseline": [0, 1],
             "reward_steered": [1, 1]}  # fmt: skip
    pq.write_table(pa.table(rows, schema=INTERVENTIONS), run.path / "interventions.parquet")
    with pytest.raises(NoItemsError, match="rewards of 2 of the 3 items of test"):
        item_rewards(Record(run.path))


def test_a_damaged_file_is_named(tmp_path):
    run = synthetic(tmp_path, "ab")
    (run.path / "items.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"items.parquet is damaged .*resume=force"):
        item_rewards(run)


def test_a_file_written_anew_is_read_anew(tmp_path):
    run = synthetic(tmp_path, "ab")
    assert item_rewards(run).ids == ("a", "b")
    write_items(
        run.path, [items_table("test", ["c", "d"], [0, 1], [1, 1], [True, False], ["", ""])]
    )
    assert item_rewards(run).ids == ("c", "d")
    write_json(run.path / "result.json", {**(run.result or {}), "n": 1})
    with pytest.raises(UserError, match="has 2 items of test"):
        item_rewards(Record(run.path))


def test_a_split_with_an_id_twice_is_refused_before_anything_runs():
    one, two = Item("a", "x"), Item("b", "y")
    splits = Splits(train=(one,), validation=(two,), test=(Item("c", "z"), Item("c", "w")))
    with pytest.raises(UserError, match="1 of the 2 items of test have an id"):
        splits.check_disjoint()
