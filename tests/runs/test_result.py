"""A result of any kind: written and read it is the same, and earlier versions' are read."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from crl_exp.runs.result import Figure, Result, Series, objective, write_by_layer

SERIES = Series(
    "probe", "accuracy", {10: Figure(0.8, 0.7, 0.9, 100), 2: Figure(0.5), -1: Figure(None)},
    better=1, interval="wilson", reference=0.5, reference_name="larger class",
)  # fmt: skip
RESULT = Result(
    "probing", "validation/accuracy",
    {"validation/accuracy": Figure(0.75, 0.6, 0.9, 20), "readable_from": Figure(None)},
    [SERIES], ["readable nowhere"],
)  # fmt: skip
IDENTITY = {"sweep": "s", "run_key": "k", "seed": 0, "data_digest": "d"}
STEERED = {
    "accuracy_baseline": 0.5, "accuracy_steered": 0.6, "delta": 0.1, "delta_ci95": [0.0, 0.2],
    "n": 50, "validation": {
        "accuracy_baseline": 0.5, "accuracy_steered": 0.4, "delta": -0.1,
        "delta_ci95": [-0.2, 0.0], "n": 8,
    },
}  # fmt: skip


def test_what_is_written_is_read():
    read = Result.read(json.loads(json.dumps(RESULT.plain())))
    by_number = dict(sorted(SERIES.by_layer.items()))
    assert read == replace(RESULT, series=[replace(SERIES, by_layer=by_number)])
    assert list(read.series[0].by_layer) == [-1, 2, 10], "numbers, in their order"


def test_the_primary_figure_is_what_a_sweeper_optimises():
    assert objective(RESULT.plain()) == 0.75
    undefined = replace(RESULT, primary="readable_from")
    assert objective(undefined.plain()) is None


def test_of_a_run_that_steers_it_is_validations():
    assert objective(STEERED) == 0.4
    assert objective({"kind": "steering", **STEERED}) == 0.4
    read = Result.read(STEERED)
    assert read.figures["delta"] == Figure(0.1, 0.0, 0.2, 50)
    assert Result.steering(STEERED).plain() == {
        "kind": "steering", "primary": "validation/accuracy", **STEERED,
    }  # fmt: skip


def test_series_of_stage_1_are_read_too():
    by_layer = {"sae_fit/steered/l0": {"18": {"value": 31.5, "n": 256, "left_out": 1}}}
    (series,) = Result.read({**STEERED, "by_layer": by_layer}).series
    assert (series.key, series.metric) == ("sae_fit/steered/l0", "l0")
    assert series.by_layer == {18: Figure(31.5, n=256)}


def test_a_primary_figure_that_isnt_there_is_refused():
    with pytest.raises(ValueError, match=r"primary='auc' is none of validation/accuracy"):
        replace(RESULT, primary="auc")


def test_the_table_has_a_row_for_each_figure(tmp_path):
    write_by_layer(tmp_path, {**RESULT.plain(), **IDENTITY})
    rows = pq.read_table(tmp_path / "by_layer.parquet").to_pylist()
    assert [row["layer"] for row in rows] == [-1, 2, 10]
    assert rows[0]["value"] is None and rows[2]["high"] == 0.9
    assert {row["kind"] for row in rows} == {"probing"}
    assert rows[2]["reference_name"] == "larger class" and rows[2]["unit"] == "share"


def test_a_column_without_values_has_its_type_all_the_same(tmp_path):
    """Tables of several runs are put together; a column of nulls alone has none of its own."""
    bare = Series("x", "kl", {0: Figure(None)})
    result = Result("lens", "a", {"a": Figure(1.0)}, [bare])
    write_by_layer(tmp_path, {**result.plain(), **IDENTITY})
    schema = pq.read_schema(tmp_path / "by_layer.parquet")
    assert str(schema.field("low").type) == "double" and str(schema.field("n").type) == "int64"
    assert str(schema.field("interval").type) == "string"
