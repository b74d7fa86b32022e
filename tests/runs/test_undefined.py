"""Figures that have no value, from the run that finds them to every place that shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crl_exp.analysis.winners_curse import Tried, warnings
from crl_exp.config.files import defined, finite
from crl_exp.launcher.commands.status import lines_of
from crl_exp.report.command import write_report
from crl_exp.report.parts import compare_parts
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.heartbeat import Progress, beating, read_heartbeat
from crl_exp.runs.records import Record, find_records
from crl_exp.tasks.base import Score
from crl_exp.tasks.jsonl import JsonLines
from crl_exp.tracking.sending.content import final_points, points
from tests.helpers.synthetic import config, finished_run, run_of_items
from tests.helpers.tiny_run import run_small


def strict(text: str) -> Any:
    """As a strict reader takes it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_none_are_null_with_what_they_were():
    reasons: dict[str, str] = {}
    given = {"a": [1.5, math.nan], "b": {"c": -math.inf, "d": np.float32(0.5)}, "e": True,
             "f": np.int64(3), "g": None}  # fmt: skip
    made = finite(given, reasons)
    assert made == {"a": [1.5, None], "b": {"c": None, "d": 0.5}, "e": True, "f": 3, "g": None}
    assert reasons == {"a.1": "not a number", "b.c": "infinite"}
    whole = {"a": 0.1, "b": (1, 2)}
    assert defined(whole) is whole, "a result without such figures is as it was"


@pytest.fixture(scope="module")
def undefined_run(tiny_files, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A real run whose scorer gives NaN for one validation item and for the only test item."""

    def score(self, items, outputs):
        bad = {item.item_id for item in (*self.splits().validation[:1], *self.splits().test)}
        return [Score(math.nan if item.item_id in bad else 1.0) for item in items]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "score", score)
        folder = tmp_path_factory.mktemp("undefined")
        overrides = [*tiny_files.overrides(), f"output_dir={folder}", "method=corrsteer_s"]
        return run_small([*overrides, "sweep_name=u", "task.n_test=1"])


def test_a_run_with_undefined_figures_ends_well(undefined_run):
    result, path = undefined_run
    assert Record(path).state == "done"
    written = strict((path / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written["n"] == 1 and written["delta"] is None and written["delta_ci95"] == [None, None]
    assert written["undefined"]["delta"] == "not a number"
    assert written["undefined"]["validation.accuracy_steered"] == "not a number"
    assert any("1 of 8 rewards on validation aren't finite" in w for w in written["warnings"])


def test_it_is_shown_as_a_dash_with_its_reason(undefined_run, quick_reports):
    path = undefined_run[1]
    records = find_records(path.parent)
    parts = compare_parts(records)
    write_report(parts, path.parent / "report")
    table = (path.parent / "report" / "table.md").read_text()
    assert "| – → – | – |" in table and "delta: not a number (runs: 1)" in table
    for name in ("table.csv", "table.md", "table.tex"):
        assert "nan" not in (path.parent / "report" / name).read_text().replace("constrained", "")
    (line,) = lines_of(records, path.parent)
    assert line.metrics == "Δ – [–, –]"


def test_mlflow_gets_no_point_for_it(undefined_run):
    names = {point.name: point.value for point in final_points(undefined_run[0], 0)}
    assert "eval/delta" not in names and "eval_validation/accuracy_steered" not in names
    assert names["eval/n"] == 1 and all(map(math.isfinite, names.values()))
    before = {**undefined_run[0], "delta": math.nan, "p_value": math.inf}  # by an older version
    assert not {"eval/delta", "eval/p_value"} & {p.name for p in final_points(before, 0)}


def test_one_undefined_metric_ends_neither_journal_nor_heartbeat(tmp_path):
    run = RunDirectory(config(tmp_path))
    with run.opened(), beating(run.path / "heartbeat.json", run.progress):
        run.log(1, {"reward": 0.5, "layer_1/critic_loss": math.inf})
        run.log(2, {"reward": math.nan, "layer_1/critic_loss": np.float32(2.0)})  # type: ignore[dict-item]
    told = strict((run.path / "heartbeat.json").read_text())
    assert told["metrics"] == {"reward": None}
    lines = [strict(line) for line in run.journal_path.read_text().splitlines()]
    assert [line["metrics"]["reward"] for line in lines] == [0.5, None]
    read = Record(run.path).journal
    assert (
        math.isnan(read[1]["metrics"]["reward"]) and read[1]["metrics"]["layer_1/critic_loss"] == 2
    )
    sent = [(p.name, p.step) for p in points(lines)]
    assert sent == [("reward", 1), ("layer_1/critic_loss", 2)]


def test_a_heartbeat_goes_on_after_an_undefined_metric(tmp_path):
    path, progress = tmp_path / "heartbeat.json", Progress()
    progress.metrics["reward"] = math.nan
    with beating(path, progress):
        first = read_heartbeat(path)
    assert first["metrics"] == {"reward": None}, "told at once, not only once it is a number again"


def test_a_row_with_an_undefined_seed_isnt_chosen(tmp_path, quick_reports):
    finished_run(config(tmp_path, layers=(3,)), 0.1)
    bad = finished_run(config(tmp_path, layers=(9,)), 0.1)
    result = json.loads(bad.result_path.read_text())
    result["validation"]["accuracy_steered"] = None
    result["p_value"] = None
    bad.result_path.write_text(json.dumps(result))
    (part,) = compare_parts(find_records(tmp_path / "demo")).parts
    (best,) = part.sweep.chosen
    assert best.layers == (3,)
    holm = {row.layers: p for row, p in part.sweep.p_holm.items()}
    assert holm[(3,)] == pytest.approx(0.001) and math.isnan(holm[(9,)])
    write_report(compare_parts(find_records(tmp_path / "demo")), tmp_path / "report")


def test_one_undefined_reward_leaves_the_rest_of_a_report(tmp_path, quick_reports):
    """Of two methods, one with seeds that differ; validation undefined too."""
    draw = np.random.default_rng(0)
    was = draw.integers(0, 2, 40).astype(float)
    for method, layer, seed in (("crl", 3, 0), ("crl", 3, 1), ("corrsteer_s", 9, 0)):
        now = np.where(draw.random(40) < 0.3, 1.0, was)
        now[5] = math.nan
        run = run_of_items(config(tmp_path, method, (layer,), seed=seed), was, now)
        result = json.loads(json.dumps(run.result()))
        for key in ("accuracy_baseline", "accuracy_steered", "delta"):
            result["validation"][key] = None
        run.result_path.write_text(json.dumps(result))
    write_report(compare_parts(find_records(tmp_path / "demo")), tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    assert "nan" not in table.lower() and "| CorrSteer-S @ 9 | CRL @ 3 | 1 / 2 | – | – |" in table


def test_an_undefined_reward_on_validation_doesnt_end_a_run():
    tried, draw = Tried(), np.random.default_rng(0)
    for _ in range(26):
        rewards = (draw.random(13) < 0.5).astype(float)
        rewards[0] = math.nan
        tried.add(rewards)
    assert "12 validation items are few" in str(warnings(tried.choices()))
    tried.add(np.full(13, math.nan))
    assert tried.choices() == []
