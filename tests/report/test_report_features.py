"""What features did, by hand-made run directories; and the page that shows it."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crl_exp.experiments.kinds.evaluation import INTERVENTIONS
from crl_exp.report.command import main
from crl_exp.report.comparison.feature_credit import credits_of, items_with_features
from crl_exp.report.comparison.feature_use import layer_uses, learned
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.tables.cells import feature_cells
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import run_small

pytestmark = pytest.mark.usefixtures("quick_reports")
LINK = "https://www.neuronpedia.org/tiny/18-res/9"


def feature(idx: int, correlation: float, **more) -> dict:
    return {"feature": idx, "correlation": correlation, "neuronpedia": None, **more}


def with_features(run: RunDirectory, tokens: tuple[int, int] = (60, 40)) -> RunDirectory:
    found = [feature(1, 0.4), feature(2, 0.3), feature(3, 0.2)]
    used = [
        feature(2, 0.3, tokens=tokens[0], mean_coefficient=10.0),
        feature(9, -0.1, tokens=tokens[1], mean_coefficient=20.0) | {"neuronpedia": LINK},
    ]
    layer = {"n": 100, "allowed": 12, "found": found, "used": used}
    write_json(run.path / "features.json", {"18": layer})
    return run


# split, item, features, changed, rewards unsteered and steered; two tokens of item `a`
ROWS = (
    ("test", "a", [2], True, 0.0, 1.0), ("test", "a", [2, 9], True, 0.0, 1.0),
    ("test", "b", [9], True, 1.0, 0.0), ("test", "c", [9], False, 1.0, 1.0),
    ("test", "d", [], False, 0.0, 0.0), ("benign", "e", [2], True, 0.0, 1.0),
)  # fmt: skip


def with_interventions(run: RunDirectory, rewards: bool = True) -> RunDirectory:
    rows = [
        dict.fromkeys(INTERVENTIONS.names)
        | {"split": split, "item": item, "layer": 18, "features": features, "changed": changed,
           "reward_baseline": was, "reward_steered": now}
        for split, item, features, changed, was, now in ROWS
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=INTERVENTIONS)
    if not rewards:
        table = table.drop_columns(["reward_baseline", "reward_steered"])
    pq.write_table(table, run.path / "interventions.parquet")
    return run


def only_row(folder: Path):
    (row,) = compare_runs(find_records(folder / "demo")).rows
    return row


def test_a_list_without_a_stage_1_has_its_credits(tmp_path):
    run = with_interventions(with_features(finished_run(config(tmp_path, "listed"), 0.1)))
    layer = Record(run.path).features["18"]
    write_json(run.path / "features.json", {"18": {**layer, "found": []}})
    nine, two = credits_of(only_row(tmp_path))
    assert (nine.feature, nine.items, nine.fixed, nine.broken) == (9, 3, 1, 1)
    assert (two.feature, two.correlation, two.rank, two.coefficient) == (2, None, None, 10.0)
    assert feature_cells(two)[5:7] == ["–", "–"]
    assert not layer_uses(only_row(tmp_path))


def test_overlap_diversity_and_correlation_by_hand(tmp_path):
    with_features(finished_run(config(tmp_path), 0.1, steps=20))
    ((layer, (use,)),) = layer_uses(only_row(tmp_path)).items()
    assert layer == 18
    assert use.metrics() == pytest.approx(
        {"found": 3, "used": 2, "in_common": 1, "used_found": 0.5, "chance": 0.25, "jaccard": 0.25,
         "additions_found": 0.6, "additions_corrsteer": 0.0, "entropy": 0.673012,
         "r_added": 0.14, "r_best_found": 0.4, "r_mean_found": 0.3},
        abs=1e-6,
    )  # fmt: skip


def test_only_trained_policies_have_figures_of_features(tmp_path):
    finished_run(config(tmp_path), 0.1, steps=20)
    finished_run(config(tmp_path, "corrsteer_s"), 0.1)
    assert [row.method for row in learned(compare_runs(find_records(tmp_path / "demo")))] == ["crl"]


def test_critic_loss_is_that_at_the_end(tmp_path):
    run = RunDirectory(config(tmp_path))
    run.path.mkdir(parents=True)
    for step in range(1, 21):
        run.log(step, {"layer_18/critic_loss": 1.0 if step < 19 else step / 100})
    finished_run(config(tmp_path), 0.1)
    (use,) = layer_uses(only_row(tmp_path))[18]
    assert use.critic_loss == pytest.approx((0.19 + 0.20) / 2)


def test_items_are_credited_to_the_features_added_to_them(tmp_path):
    for seed, tokens in enumerate(((60, 40), (20, 0))):
        with_interventions(
            with_features(finished_run(config(tmp_path, seed=seed), 0.1), (tokens[0], 40))
        )
    nine, two = credits_of(only_row(tmp_path))
    assert (nine.feature, nine.items, nine.changed, nine.fixed, nine.broken) == (9, 6, 4, 2, 2)
    assert (two.feature, two.items, two.changed, two.fixed, two.broken) == (2, 2, 2, 2, 0)
    assert (two.runs, two.tokens, two.rank, nine.rank) == (2, 80, 2, None)
    assert two.coefficient == pytest.approx(10.0) and nine.link == LINK


def test_runs_without_rewards_say_that_nothing_is_known(tmp_path):
    with_interventions(with_features(finished_run(config(tmp_path), 0.1)), rewards=False)
    credits = credits_of(only_row(tmp_path))
    assert {(c.feature, c.changed, c.fixed, c.broken) for c in credits} == {
        (2, 1, None, None), (9, 2, None, None),
    }  # fmt: skip
    assert "| 1 | 1 | – | – |" in tables.feature_section(credits)


def test_a_real_run_writes_what_credits_are_made_from(tiny_files, tmp_path):
    result, path = run_small(
        [*tiny_files.overrides(), f"output_dir={tmp_path}", "method=corrsteer_s",
         "coefficient=relative", "coefficient.ratio=4.0"]
    )  # fmt: skip
    pairs = items_with_features(Record(path))
    assert pairs is not None and len(pairs) == result["n"]  # one token, one feature
    assert sum(pairs["fixed"].to_pylist()) == result["fixed"]
    assert sum(pairs["broken"].to_pylist()) == result["broken"]
    assert result["fixed"] + result["broken"] > 0


class Page(HTMLParser):
    """What a page loads, links to and holds."""

    def __init__(self):
        super().__init__()
        self.loads, self.links, self.open, self.captions = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [given[key] for key in ("src", "data") if key in given]
        self.loads += [given["href"]] if tag == "link" else []
        self.links += [given["href"]] if tag == "a" else []
        self.captions += tag == "figcaption"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path):
    with_interventions(with_features(finished_run(config(tmp_path), 0.1, steps=20)))
    bad = RunDirectory(config(tmp_path, seed=5))
    with pytest.raises(RuntimeError), bad.opened():
        raise RuntimeError("a <b> & c")
    assert main([str(tmp_path / "demo")]) == 0
    text = (tmp_path / "demo" / "report" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.links == [LINK]
    assert len(page.loads) == page.captions == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert "@import" not in text and "url(" not in text
    assert "a &lt;b&gt; &amp; c" in text and "<td>CRL</td>" in text
    assert f"[18/9]({LINK})" in (tmp_path / "demo" / "report" / "table.md").read_text()


def test_features_as_csv(tmp_path):
    with_interventions(with_features(finished_run(config(tmp_path), 0.1, steps=20)))
    assert main([str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo" / "report"
    first = next(iter(csv.DictReader((folder / "features.csv").open())))
    assert (first["feature"], first["fixed"], first["broken"], first["neuronpedia"]) == (
        "9", "1", "1", LINK,
    )  # fmt: skip
    items = [tuple(line.values())[2:] for line in csv.DictReader((folder / "items.csv").open())]
    assert items == [("a", "1", "1", "0", "18/2 18/9"), ("b", "1", "0", "1", "18/9")]
    (line,) = csv.DictReader((folder / "by_layer.csv").open())
    assert (line["layer"], line["seed"], line["used_found"]) == ("18", "0", "0.5")


def test_a_report_made_again_is_the_same(tmp_path):
    """Else MLflow would be sent everything again."""
    with_interventions(with_features(finished_run(config(tmp_path), 0.1, steps=20)))
    folder, seen = tmp_path / "demo" / "report", []
    for _ in range(2):
        assert main([str(tmp_path / "demo")]) == 0
        seen.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert seen[0] == seen[1] and len(seen[0]) == 17
