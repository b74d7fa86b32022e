"""Methods that use no layer: in tables, figures, status and MLflow's names."""

from __future__ import annotations

import pytest

from crl_exp.launcher.commands.status import lines_of
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.figures import steering as figures
from crl_exp.report.tables.cells import main_cells, run_cells
from crl_exp.runs.records import find_records
from crl_exp.tracking.sending.content import run_name, tags
from tests.helpers.tiny_run import run_small


@pytest.fixture(scope="module")
def records(tiny_files, tmp_path_factory):
    """A sweep over two layers, in which the bias is found twice."""
    out = tmp_path_factory.mktemp("without")
    common = [*tiny_files.overrides(), f"output_dir={out}", "sweep_name=s"]
    for method in ("calibration", "probe"):
        for layer in (0, 1):
            run_small([*common, f"method={method}", f"layers.layer={layer}"])
    run_small([*common, "method=calibration", "layers=best_on_validation", "seed=1"])
    return find_records(out / "s")


def test_they_are_one_row_without_layers(records):
    sweep = compare_runs(records)
    rows = [(row.family, row.layers, row.seeds) for row in sweep.rows]
    assert rows == [
        ("bias on the answer", (), [0, 1]),
        ("linear probe (reads only)", (0,), [0]), ("linear probe (reads only)", (1,), [0]),
    ]  # fmt: skip
    bias = sweep.rows[0]
    assert main_cells(sweep, bias)[1] == run_cells(bias, bias.runs[0])[1] == "–"
    assert not any(row.control for row in sweep.rows) and len(sweep.chosen) == 1


def test_they_are_drawn_and_named_without_layers(records, quick_figures, tmp_path):
    assert figures.by_layer(compare_runs(records), (tmp_path / "a.png",))
    bias = next(r for r in records if r.config["method"]["name"] == "calibration")
    assert run_name(bias).startswith("calibration seed") and tags(bias)["layers"] == "none"
    said = [line.label for line in lines_of(records, records[0].path.parent)]
    assert "bias on the answer · seed 0" in said
    assert "linear probe (reads only) · layer 1 · seed 0" in said
