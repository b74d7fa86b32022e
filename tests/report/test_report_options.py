"""Options that vary in a sweep, named as they are typed: rows, columns and heat maps."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes

from crl_exp.config.option_names import CONF, option_name, typed
from crl_exp.report.command import main
from crl_exp.report.comparison.rows import SweepComparison, compare_runs
from crl_exp.report.figures import by_labels as label_figure
from crl_exp.report.figures.by_labels import label_lines
from crl_exp.report.figures.heat_map import grids
from crl_exp.report.figures.style import legend_below, style, wrapped
from crl_exp.report.figures.training import floors
from crl_exp.report.labels import labels
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, finished_run

pytestmark = pytest.mark.usefixtures("quick_reports")


def option(group: str, name: str, **changes) -> dict:
    """Keys of a config as they are with `GROUP=NAME`."""
    return {group: {**yaml.safe_load((CONF / group / f"{name}.yaml").read_text()), **changes}}


def compared(folder: Path) -> SweepComparison:
    return compare_runs(find_records(folder / "demo"))


def families(folder: Path) -> list[str]:
    return sorted(row.family for row in compared(folder).rows)


@pytest.mark.parametrize(
    ("group", "name", "changes", "said"),
    [
        ("activation", "jumprelu", {}, "jumprelu"),
        ("activation", "jumprelu_constant", {}, "jumprelu_constant"),
        ("activation", "jumprelu_constant", {"threshold": 0.3}, "jumprelu"),
        ("decay", "none", {}, "none"),
        ("decay", "exponential", {"gamma": 0.8}, "exponential"),
        ("coefficient", "contrastive", {"multiplier": 3.0}, "contrastive"),
        ("coefficient", "constant", {"value": 30.0}, "constant"),
        ("task", "sentiment", {"n_train": 7}, "sentiment"),
    ],
)
def test_a_section_is_called_what_one_types(group, name, changes, said):
    assert option_name(group, option(group, name, **changes)[group]) == said


def test_what_was_found_in_a_tasks_documents_is_no_option(tmp_path):
    """Of two numbers of examples, which word all prompts otherwise."""
    for n_shots, documents in ((0, "0a"), (5, "5b")):
        more = {
            "n_shots": n_shots,
            "documents": documents,
            "lm_eval_task": "arc_easy",
            "n_test": 16,
        }
        made = config(tmp_path, "crl", **option("task", "lm_eval", **more))
        finished_run(made, 0.1)
    differing = labels(find_records(tmp_path / "demo")).values()
    assert {name for label in differing for name, _ in label.settings} == {"task.n_shots"}


def test_a_class_without_a_file_goes_by_its_name():
    assert option_name("fusion", {"_target_": "crl_exp.steering.stages.mine.Mine"}) == "Mine"


def test_values_as_typed():
    values = [None, True, [8, "x"], {"a": 0.5}, "text"]
    assert list(map(typed, values)) == ["null", "true", "[8,x]", "{a:0.5}", "text"]


def test_long_labels_are_broken_between_words():
    label = "CRL order=[activation,fusion,noise,mask]"
    lines = wrapped(label, 24, indent="").split("\n")
    assert lines == ["CRL order=[activation,", "fusion,noise,mask]"]
    assert wrapped(label, 80) == label


def test_a_plain_name_is_that_of_a_run_without_the_switch(tmp_path):
    """However many have it on."""
    for changes in ({"null_action": False}, *({"null_start": p} for p in (0.1, 0.5, 0.9))):
        more = option("policy", "mlp", **{"null_action": True, **changes})
        for seed in (0, 1):
            finished_run(config(tmp_path, seed=seed, more=more), 0.1)
    assert families(tmp_path)[0] == "CRL"
    (plain,) = [row for row in compared(tmp_path).rows if row.family == "CRL"]
    assert not plain.runs[0].config["policy"]["null_action"]


def test_a_legend_leaves_room_for_the_panels(tmp_path):
    with style():
        figure, axes = plt.subplots(1, 1, figsize=(3.5, 2.0), squeeze=False)
        for i in range(8):
            axes[0, 0].plot([0, 1], label=f"a method with options that take two lines, number {i}")
        legend_below(figure, axes, columns=1)
        figure.canvas.draw()  # a warning where nothing is left, which the tests' settings raise
        below, panel = figure.legends[0].get_window_extent(), axes[0, 0].get_tightbbox()
    assert panel is not None and panel.y0 >= below.y1 - 1 and panel.height / figure.dpi > 1.2
    plt.close(figure)


def test_each_activation_is_named(tmp_path):
    for name in ("identity", "jumprelu", "softmax"):
        for seed in (0, 1):
            finished_run(config(tmp_path, seed=seed, more=option("activation", name)), 0.1)
    assert families(tmp_path) == [
        "CRL activation=identity", "CRL activation=jumprelu", "CRL activation=softmax",
    ]  # fmt: skip


def test_a_part_is_named_with_its_values(tmp_path):
    """As in sweeps/decay.yaml and sweeps/exploration.yaml."""
    finished_run(config(tmp_path, more=option("decay", "none")), 0.1)
    for gamma in (0.99, 0.95, 0.8):
        finished_run(config(tmp_path, more=option("decay", "exponential", gamma=gamma)), 0.1)
    assert families(tmp_path) == [
        "CRL decay=exponential decay.gamma=0.8", "CRL decay=exponential decay.gamma=0.95",
        "CRL decay=exponential decay.gamma=0.99", "CRL decay=none",
    ]  # fmt: skip


def test_orders(tmp_path):
    orders = (["noise", "fusion"], ["fusion", "noise"])
    for order in orders:
        finished_run(config(tmp_path, order=order), 0.1)
    assert families(tmp_path) == ["CRL order=[fusion,noise]", "CRL order=[noise,fusion]"]


def test_options_are_columns(tmp_path):
    for mask in ("none", "active"):
        finished_run(config(tmp_path, more=option("mask", mask)), 0.1)
    finished_run(config(tmp_path, "corrsteer_s", more=option("mask", "none")), 0.1)
    assert main([str(tmp_path / "demo")]) == 0
    lines = list(csv.DictReader((tmp_path / "demo" / "report" / "table.csv").open()))
    assert sorted((line["method"], line["mask"]) for line in lines) == [
        ("CRL mask=active", "active"), ("CRL mask=none", "none"), ("CorrSteer-S", ""),
    ]  # fmt: skip
    assert (tmp_path / "demo" / "report" / "by_option.png").exists()
    assert not (tmp_path / "demo" / "report" / "heat_map.png").exists()


def test_training_is_drawn_beside_what_unsteered_answers_get() -> None:
    """Shuffled labels have another baseline than true ones; seeds of one row have one."""
    from matplotlib.figure import Figure

    def curve(baselines: list[float], name: str) -> Any:
        return SimpleNamespace(values=lambda *_: np.array(baselines)), "blue", name

    true, shuffled = curve([0.54, 0.56], "CRL"), curve([0.47], "CRL (shuffled)")
    plain = "unsteered, validation"
    for curves, expected in (
        ([true, curve([0.55], "CRL k=2")], [(55, plain)]),
        ([true, shuffled], [(55, plain), (47, f"{plain}: CRL (shuffled)")]),
    ):
        axis = Figure().subplots()
        floors(axis, curves)
        heights = [np.asarray(line.get_ydata())[0] for line in axis.lines]
        said = [line.get_label() for line in axis.lines]
        assert list(zip(heights, said, strict=True)) == expected
        assert len({line.get_linestyle() for line in axis.lines}) == len(expected)


def test_a_map_of_layers_by_option(tmp_path):
    for layer in (8, 12, 18):
        for i, mask in enumerate(("none", "active")):
            if (layer, mask) != (12, "active"):
                more = option("mask", mask)
                finished_run(config(tmp_path, layers=(layer,), more=more), layer / 100 + i / 10)
        finished_run(config(tmp_path, "corrsteer_s", (layer,)), 0.1)
    (grid,) = grids(compared(tmp_path))
    assert (grid.title, grid.x_name, grid.xs) == ("CRL", "steered layer", ("8", "12", "18"))
    assert set(grid.ys) == {"mask=none", "mask=active"}
    assert len(grid.cells) == 5 and ("mask=active", "12") not in grid.cells
    assert grid.cells["mask=active", "18"].mean("delta") == pytest.approx(0.28)
    assert main([str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "report" / "heat_map.png").exists()


def test_a_map_of_two_options_that_were_crossed(tmp_path):
    for mask in ("none", "active"):
        for activation in ("identity", "jumprelu", "softmax"):
            more = option("mask", mask) | option("activation", activation)
            finished_run(config(tmp_path, more=more), len(activation) / 100)
    (grid,) = grids(compared(tmp_path))
    named = {grid.x_name, *(y.split("=")[0] for y in grid.ys)}
    assert named == {"activation", "mask"} and len(grid.cells) == 6
    for (y, x), row in grid.cells.items():
        assert f"{grid.x_name}={x}" in row.family and y in row.family


def test_options_changed_one_at_a_time_make_no_map(tmp_path):
    for depth in (0, 1, 2, 3):
        finished_run(config(tmp_path, more={"policy": {"depth": depth, "critic": 0}}), 0.1)
    for critic in (1, 2, 3):
        finished_run(config(tmp_path, more={"policy": {"depth": 1, "critic": critic}}), 0.1)
    assert grids(compared(tmp_path)) == []


# --- labels ---


def labelled(folder: Path, method: str, n_train: int, draw: int, delta: float, **given) -> None:
    more = {"task.n_train": n_train, "task.train_seed": draw, **option("mask", "none")}
    made = config(folder, method, more=more | given.pop("more", {}), **given)
    finished_run(made, delta)


def test_a_line_of_each_method_by_its_number_of_labels(tmp_path):
    """Draws are put together; options other than the number stay apart, the best layer is taken."""
    for n_train, delta in ((25, 0.05), (100, 0.1), (500, 0.2)):
        for draw in (0, 1, 2):
            labelled(tmp_path, "crl", n_train, draw, delta + draw / 100)
        labelled(tmp_path, "crl", n_train, 0, delta, more=option("mask", "active"))
        for layer in (8, 12):  # the lower one is better on validation
            labelled(tmp_path, "corrsteer_s", n_train, 0, delta - layer / 100, layers=(layer,))
    finished_run(config(tmp_path, "none", more={"task.n_train": 2000}), 0.0)
    lines = label_lines(compared(tmp_path))
    assert sorted(lines) == ["CRL", "CRL mask=active", "CorrSteer-S"]
    assert all(sorted(line) == [25, 100, 500] for line in lines.values())
    row = lines["CRL"][100]
    assert len(row.runs) == 3 and row.mean("delta") == pytest.approx(0.11)
    low, high = row.interval()
    assert high - low > 0.04, "draws are in it: one run's own is .02 to either side"
    assert lines["CorrSteer-S"][25].layers == (8,)
    table = [row.family for row in compared(tmp_path).rows if row.family.startswith("CRL task")]
    assert table == [f"CRL task.n_train={n}" for n in (25, 100, 500)], "in order of the number"
    assert main([str(tmp_path / "demo")]) == 0
    report = tmp_path / "demo" / "report"
    assert (report / "by_labels.png").exists()
    assert "by number of labelled" in (report / "report.html").read_text()


def test_without_numbers_of_labels_to_compare_there_is_no_figure_of_them(tmp_path):
    labelled(tmp_path, "crl", 100, 0, 0.1)
    labelled(tmp_path, "corrsteer_s", 50, 0, 0.1)  # another method's
    assert not label_figure.by_labels(compared(tmp_path), (tmp_path / "x.png",))
    assert not (tmp_path / "x.png").exists()


def test_lines_by_number_of_labels_look_different(tmp_path, monkeypatch):
    drawn: list[tuple] = []
    real = Axes.errorbar

    def spy(axis, x, y, **how):
        drawn.append((how["label"], how["color"], how["marker"], list(x), list(y)))
        return real(axis, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", spy)
    for n_train in (25, 50, 500):
        for i, method in enumerate(("crl", "probe", "corrsteer_s", "calibration")):
            labelled(tmp_path, method, n_train, 0, n_train / 5000 + i / 100)
    assert label_figure.by_labels(compared(tmp_path), (tmp_path / "x.png",))
    assert len({label for label, *_ in drawn}) == len({how[1:3] for how in drawn}) == 4
    for _, _, _, x, y in drawn:
        assert x == pytest.approx([25, 50, 500], rel=0.2) and y == sorted(y)
        assert y[-1] - y[0] == pytest.approx(9.5)
