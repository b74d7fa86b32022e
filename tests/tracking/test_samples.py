"""Some of a run's answers in MLflow, as a table that its pages show."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from crl_exp.runs.items import ItemTexts, items_table, write_items
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.samples import samples
from tests.config.test_foreign_text import CONTROLS, TEXTS
from tests.helpers.mlflow_reading import children, client, sync, with_database
from tests.helpers.synthetic import config, run_of_items
from tests.tracking.test_tracking_details import calls


def answered(folder, n: int = 300):
    """A third came right, a third went wrong, a third stayed. Texts are foreign."""
    was, now = [float(i % 3 == 1) for i in range(n)], [float(i % 3 == 0) for i in range(n)]
    run = run_of_items(config(folder), was, now)
    ids = [f"item{i:04d}" for i in range(n)]
    texts = [f"{i} {TEXTS[i % len(TEXTS)]}" for i in range(n)]
    kept = ItemTexts(texts, [None] * n, ["before"] * n, texts)
    write_items(run.path, [items_table("test", ids, was, now, [True] * n, [""] * n, kept)])
    return run


def table_of(folder, run_id: str) -> pd.DataFrame:
    """As MLflow reads a table (`MlflowClient.load_table`)."""
    found = client(resolved_uri(None, folder)).download_artifacts(run_id, "samples.json")
    return pd.read_json(found, orient="split")


def test_fifty_items_at_most_of_each_kind(tmp_path):
    table = samples(Record(answered(tmp_path).path))
    assert table is not None and len(table["data"]) == 50
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    for line in lines:
        rise = line["reward_steered"] - line["reward_unsteered"]
        assert line["what"] == {1: "fixed", -1: "broken", 0: "same reward"}[rise]
        assert line["item_id"] == f"item{line['item'] - 1:04d}"
    assert [sum(line["what"] == what for line in lines) for what in ("fixed", "broken")] == [20, 20]
    numbers = [line["item"] for line in lines[:20]]
    assert numbers != list(range(1, 61, 3)), "drawn, not the first ones"
    assert samples(Record(answered(tmp_path).path)) == table
    assert not CONTROLS & set(json.dumps(table, ensure_ascii=False))


def test_mlflow_shows_the_table_and_is_sent_it_once(tmp_path, monkeypatch):
    with_database(tmp_path)
    run = answered(tmp_path)
    sync(run)
    asked = calls(monkeypatch, "log_dict", "set_tag", "log_artifact")
    sync(run)
    assert asked == []
    (child,) = children(resolved_uri(None, tmp_path))
    shown = table_of(tmp_path, child.info.run_id)
    table = samples(Record(run.path))
    assert table is not None and list(shown.columns) == table["columns"]
    assert shown["steered"].tolist() == [line[6] for line in table["data"]]
    assert json.loads(child.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "samples.json", "type": "table"}
    ]
    run = answered(tmp_path, n=30)  # run anew
    sync(run)
    assert asked.count("log_dict") == 1 and "set_tag" not in asked, "in the place of the first"
    assert len(table_of(tmp_path, child.info.run_id)) == 30


def test_a_run_without_answers_has_no_table(tmp_path):
    with_database(tmp_path)
    run = run_of_items(config(tmp_path), [0, 1], [1, 1])
    assert samples(Record(run.path)) is None
    sync(run)
    (child,) = children(resolved_uri(None, tmp_path))
    assert "mlflow.loggedArtifacts" not in child.data.tags


@pytest.mark.parametrize("missing", ["result.json", "items.parquet"])
def test_an_unfinished_run_has_none(tmp_path, missing):
    with_database(tmp_path)
    run = answered(tmp_path)
    (run.path / missing).unlink()
    sync(run)
    (child,) = children(resolved_uri(None, tmp_path))
    assert "mlflow.loggedArtifacts" not in child.data.tags
