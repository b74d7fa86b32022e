"""Log-likelihood of answers under the unsteered model: against one plain pass an answer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.analysis.statistics import crossed
from crl_exp.config import kept
from crl_exp.experiments.kinds.evaluation import evaluate, evaluate_split
from crl_exp.generation.controller import Unsteered
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.parts import compare_parts
from crl_exp.report.tables import csv as table_csv
from crl_exp.report.tables import latex as table_latex
from crl_exp.report.tables.further import further_tables
from crl_exp.report.tables.quality import of_runs, quality_of
from crl_exp.runs.directory import write_json
from crl_exp.runs.items import LIKELIHOODS
from crl_exp.runs.records import find_records
from crl_exp.tracking.sending import content as tracking_content
from tests.helpers.synthetic import config, finished_run, run_of_items
from tests.helpers.tiny_run import lab_of
from tests.steering.test_parity import TASK

pc = pyarrow.compute
KEYS = [f"log_likelihood_{name}" for name in ("baseline", "steered", "delta", "delta_ci95")]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), "method=corrsteer_a", "coefficient=relative",
            "engine.batch_size=7", f"output_dir={tmp_path / 'out'}"]  # fmt: skip


def directly(workspace, prompt: list[int], tokens: list[int]) -> float:
    """Mean log-probability of an answer of at most five tokens, and of its end where it has one."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        log_prob_TV = workspace.lm.model(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
    said = [float(log_prob_TV[t, token]) for t, token in enumerate(tokens)]
    if len(tokens) < TASK.max_new_tokens:
        ends = sorted(workspace.lm.eos_ids)
        said.append(float(log_prob_TV[len(tokens), ends].logsumexp(0)))
    return float(np.mean(said))


def test_quality_is_what_a_plain_pass_gives(common, monkeypatch):
    monkeypatch.setattr(kept, "LOADED", {})  # its answers are no other test's
    workspace = lab_of(common, TASK)
    workspace.lm.tokenizer.eos_token = "w8"  # one that this random model says now and then
    try:
        controller = workspace.exp.method.prepare(workspace)
        figures, steered, likelihoods = evaluate_split(workspace, controller, "test")
        prompts = workspace.prompts("test").prompts
        lengths = {len(tokens) for tokens in steered.generation.tokens}
        assert len(lengths) > 1, "no answer ended by itself"
        was, now = (
            np.array([directly(workspace, p, t) for p, t in zip(prompts, made, strict=True)])
            for made in (workspace.baseline("test").generation.tokens, steered.generation.tokens)
        )
    finally:
        workspace.lm.tokenizer.eos_token = "<eos>"
    assert likelihoods.was_I is not None and likelihoods.now_I is not None
    np.testing.assert_allclose(likelihoods.was_I.numpy(), was, atol=1e-4)
    np.testing.assert_allclose(likelihoods.now_I.numpy(), now, atol=1e-4)
    assert figures[KEYS[0]] == pytest.approx(was.mean(), abs=1e-4)
    assert figures[KEYS[1]] == pytest.approx(now.mean(), abs=1e-4)
    assert figures[KEYS[2]] == pytest.approx((now - was).mean(), abs=1e-4)
    half = 1.96 * (now - was).std(ddof=1) / len(was) ** 0.5
    low, high = figures[KEYS[3]]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    # Greedy answers are likelier under the model that gave them.
    assert figures[KEYS[2]] < 0


def test_the_unsteered_model_against_itself_is_zero(common):
    workspace = lab_of(common, TASK)
    figures, *_ = evaluate_split(workspace, Unsteered(), "test")
    assert figures[KEYS[2]] == 0 and figures[KEYS[3]] == [0, 0] and figures[KEYS[0]] < 0


def test_it_is_null_for_choices_and_on_validation(common):
    figures, *_ = evaluate_split(lab_of(common), Unsteered(), "test")
    assert [figures[key] for key in KEYS] == [None] * 4
    figures, *_ = evaluate_split(lab_of(common, TASK), Unsteered(), "validation")
    assert [figures[key] for key in KEYS] == [None] * 4


def test_it_is_in_mlflow_where_there_is_one(tmp_path):
    """And nothing of it for results of earlier versions, or for choices."""
    values = dict.fromkeys(KEYS[:3], -1.5)
    run = finished_run(config(tmp_path), 0.1, **values, log_likelihood_delta_ci95=[-1, 1])
    sent = {p.name: p.value for p in tracking_content.final_points(run.result() or {}, 0)}
    assert sent["eval/log_likelihood_steered"] == -1.5
    assert not [name for name in sent if name.startswith("eval_validation/log")]
    old = finished_run(config(tmp_path, seed=1), 0.1)
    sent = {p.name for p in tracking_content.final_points(old.result() or {}, 0)}
    assert not [name for name in sent if "log_likelihood" in name]


def of_seeds(tmp_path, deltas: tuple[float, ...], half: float) -> None:
    for seed, delta in enumerate(deltas):
        values = dict(zip(KEYS, (-1.0, -1.0 + delta, delta, [delta - half, delta + half]),
                          strict=True))  # fmt: skip
        finished_run(config(tmp_path, seed=seed), 0.1, **values)


def test_the_report_sets_it_beside_the_reward(tmp_path):
    """Two seeds: −.2 and −.4, so −.3; half² = .05² + (12.7062 · .141421 / √2)² = 1.2716²."""
    of_seeds(tmp_path, (-0.2, -0.4), 0.05)
    sweep = compare_runs(find_records(tmp_path / "demo"))
    (more,) = further_tables(sweep)
    assert more.lines == [
        ["CRL", "18", "2", more.lines[0][3], "-1.00 → -1.30", "-0.30 [-1.57, 0.97]"]
    ]
    assert more.lines[0][3].startswith("+10.0 [")
    for text in (tables.markdown(sweep), table_latex.latex(sweep, "x")):
        assert more.title in text and "-1.00" in text.replace("$-$", "-")
    head, line = table_csv.rows_csv(compare_parts(find_records(tmp_path / "demo"))).splitlines()[:2]
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert float(row["log_likelihood_delta"]) == pytest.approx(-0.3)
    assert float(row["log_likelihood_delta_low"]) == pytest.approx(-1.5716, abs=1e-3)


def of_items(folder, seed: int, delta_I: np.ndarray) -> None:
    """A finished run whose items have these differences, in an order of its own."""
    ids = [f"item{i}" for i in range(len(delta_I))]
    run = run_of_items(config(folder, seed=seed), [0] * len(ids), [1] * len(ids), ids=ids)
    path = run.path / "items.parquet"
    table = pq.read_table(path)
    columns = (np.full(len(ids), -1.0), -1.0 + delta_I)
    for name, values in zip(LIKELIHOODS.names, columns, strict=True):
        table = table.append_column(name, pa.array(values))
    pq.write_table(table.take(list(range(seed, len(ids))) + list(range(seed))), path)
    half = 1.96 * float(delta_I.std(ddof=1)) / len(ids) ** 0.5
    mean = float(delta_I.mean())
    values = [-1.0, -1.0 + mean, mean, [mean - half, mean + half]]
    write_json(run.result_path, {**(run.result() or {}), **dict(zip(KEYS, values, strict=True))})


def test_the_interval_of_several_seeds_pairs_their_items(tmp_path):
    """What items have alike in both seeds is counted once; single runs can't tell it from noise."""
    draw = np.random.default_rng(0)
    alike, noise = draw.normal(0, 0.2, 60), draw.normal(0, 1.0, (2, 60))
    delta_SI = np.stack([alike + noise[0] - 0.2, alike + noise[1] - 0.21])
    for seed in (0, 1):
        of_items(tmp_path, seed, delta_SI[seed])
    (row,) = compare_runs(find_records(tmp_path / "demo")).rows
    found = quality_of(row)
    assert found is not None
    assert found.interval == pytest.approx(crossed(delta_SI).interval)
    ends_S2 = np.array([run.result["log_likelihood_delta_ci95"] for run in row.runs])
    wide = of_runs(delta_SI.mean(axis=1), ends_S2, 60).interval
    assert found.interval[1] - found.interval[0] < 0.9 * (wide[1] - wide[0])


def test_items_of_free_text_are_written_with_it(common, tmp_path):
    """Null on validation; where the output is restricted there are no such columns."""
    for task, there in ((TASK, True), (None, False)):
        workspace = lab_of(common, task) if task else lab_of(common)
        evaluate(workspace, Unsteered())
        table = pq.read_table(workspace.run.path / "items.parquet")
        assert (set(LIKELIHOODS.names) <= set(table.column_names)) is there
        if there:
            nulls = {
                split: table.filter(pc.equal(table["split"], split))[name].null_count
                for split in ("test", "validation")
                for name in LIKELIHOODS.names
            }
            n = table["split"].to_pylist().count("validation")
            assert nulls == {"test": 0, "validation": n}


def test_one_seed_has_its_own_interval_and_earlier_results_no_table(tmp_path):
    of_seeds(tmp_path, (-0.2,), 0.05)
    (more,) = further_tables(compare_runs(find_records(tmp_path / "demo")))
    assert more.lines[0][-1] == "-0.20 [-0.25, -0.15]"
    finished_run(config(tmp_path / "old"), 0.1)
    assert further_tables(compare_runs(find_records(tmp_path / "old" / "demo"))) == []
