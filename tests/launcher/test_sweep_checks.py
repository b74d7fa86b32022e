"""A sweep is checked whole before anything of it starts, in every launcher; nothing here runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.keys import plain_of, run_key, settle
from crl_exp.experiments import config as configs
from crl_exp.launcher.command_line import _check_points, check_alone
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.composing import compose
from crl_exp.launcher.planning import plan
from crl_exp.launcher.planning.plan import check, check_all
from crl_exp.launcher.planning.shows import shows_text
from tests.helpers.launching import launched, points_of, tiny
from tests.helpers.tiny_run import ROOT

FAULTS = [
    ("hydra.sweeper.grids=[3]", r"hydra\.sweeper\.grids=\[3\]: each must hold overrides"),
    ("hydra.sweeper.grids=3", r"hydra\.sweeper\.grids=3: must be a list of grids, as in"),
    ("hydra.sweeper.grids=0", r"hydra\.sweeper\.grids=0: must be a list of grids"),
    ("hydra.sweeper.grids=abc", r"hydra\.sweeper\.grids=abc: must be a list of grids"),
    ("hydra.sweeper.params=3", r"hydra\.sweeper\.params=3: must hold overrides"),
    ("hydra.sweeper.grids=[{seed: []}]", r"grids: seed: \[\]: gives no value"),
    ("seed=range(0)", r"seed=range\(0\): gives no value, so the sweep would have no run"),
    ("seed=glob(*)", r"seed=glob\(\*\): gives no value"),
    ("method=glob(nothing_like_it*)", r"gives no value"),
    ("seed=interval(0,1)", r"seed=interval\(0,1\): Can only enumerate"),
    ("resume=new,force", r"resume can't differ within a sweep: it doesn't change what a run"),
    ("tracking=none,mlflow", r"tracking can't differ within a sweep"),
    ("rung=1,2", r"rung can't differ within a sweep"),
    ("checkpoint.updates=1,2", r"checkpoint can't differ within a sweep"),
    ("layers.layer=3,99", r"1 of 2 runs can't be submitted; none was:\n- layer 99 is out of range"),
    ("model.device=cpu,cuda:99", r"no CUDA device here|there are \d+ CUDA devices here"),
    ("task.n_test=8,100000", r"task\.n_test=100000|lower one of them"),
]  # fmt: skip


def test_a_typed_layer_is_not_for_the_runs_at_all_layers(tmp_path, caplog):
    """It stands in place of other grids' layers; where no grid has any, it is a fault."""
    grids = "[{layers: single, layers.layer: [1, 2]}, {layers: all}]"
    typed = [f"hydra.sweeper.grids={grids}", "layers.layer=3,4", "method=corrsteer_s"]
    with typed_sweep(tiny(tmp_path, *typed)) as (_, _, jobs):
        where = [[one for one in job if one.startswith("layers")] for job in jobs]
    single = ["layers=single"]
    assert where == [[*single, "layers.layer=3"], [*single, "layers.layer=4"], ["layers=all"]]
    assert "layers.layer is left out where layers=all" in caplog.text
    with pytest.raises(UserError, match=r"Could not override 'layers\.layer'"):
        points_of(*tiny(tmp_path, "layers=all", "layers.layer=3,4", "method=corrsteer_s"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def checked_here(*overrides: str) -> list[plan.Point]:
    """As the sweeper does for a launcher of Hydra's."""
    with typed_sweep(overrides) as (loader, master, jobs):
        return check_all(loader, master, jobs)


@pytest.mark.parametrize("kind", ["basic", "local_processes"])
@pytest.mark.parametrize(("override", "says"), FAULTS)
def test_a_fault_of_any_point_is_told_before_the_first(kind, override, says, tmp_path):
    overrides = tiny(tmp_path / "out", "method=none", override)
    with pytest.raises(UserError, match=says):
        checked_here(*overrides) if kind == "basic" else launched(kind, overrides)
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_hydras_own_sweeper_is_refused_before_its_first_point(tmp_path):
    """It would run that before the second, which has a fault, is looked at."""
    typed = tiny(tmp_path / "out", "hydra/sweeper=basic", "method=none", "task.n_test=8,100000")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "-m", f"hydra.sweep.dir={tmp_path}", *typed],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: hydra/sweeper=basic starts the first run" in done.stderr
    assert done.stdout.count("output_dir=") == 1, "no second point was begun"
    assert not (tmp_path / "out").exists()


def test_points_that_are_one_run_by_other_words_are_one(tmp_path):
    grids = "hydra.sweeper.grids=[{seed: [0, 1]}, {seed: 0, decay: none}]"
    points = checked_here(*tiny(tmp_path, grids))
    assert len(points) == 3 and len({point.key for point in points}) == 2


def test_points_of_a_large_sweep_are_what_each_is_composed_by_itself(tmp_path, monkeypatch):
    """Some are looked at before the others, and all share what was found out of their sections."""
    monkeypatch.setattr(plan, "SAMPLE", 3)
    typed = tiny(tmp_path, "layers.layer=0,1", "seed=0,1", "method=crl,corrsteer_s")
    points = checked_here(*typed)
    assert len(points) == 8
    for point in (points[0], points[-1]):
        alone = compose(point.overrides)
        settle(alone)
        assert point.key == run_key(alone) and point.plain == plain_of(alone)
        assert point.plain == plain_of(point.config), "its config is as it was composed"
        one, other = configs.experiment(point.config, {}, point.plain), configs.experiment(alone)
        assert repr(one) == repr(other)


def test_what_a_sweep_can_show_is_said_once(tmp_path, capsys):
    with typed_sweep(tiny(tmp_path, "method=random", "seed=0,1")) as (loader, master, jobs):
        _check_points(loader, master, jobs)
    assert capsys.readouterr().out.count("can show, with 16 test items, 2 seeds: ") == 1


def test_seeds_of_a_method_without_chance_are_told_and_count_as_one(tmp_path, capsys):
    typed = tiny(tmp_path, "method=corrsteer_s,prompting", "seed=0,1,2")
    with typed_sweep(typed) as (loader, master, jobs):
        _check_points(loader, master, jobs)
    told = capsys.readouterr().out
    assert "method=corrsteer_s has no chance in it: one seed is enough" in told
    assert told.count("method=corrsteer_s seed=") == 2, "one for each seed but the first"
    assert "can show, with 16 test items, 1 seed: " in told
    assert "can show, with 16 test items, 3 seeds: " in told, "examples in context are drawn"


@pytest.mark.parametrize(
    "typed", [["task.shuffle_labels=true"], ["sae.dictionary=random"], ["method=lora"]]
)
def test_a_draw_outside_the_method_is_chance_too(typed, tmp_path):
    points = points_of(*tiny(tmp_path, "method=corrsteer_s", *typed, "seed=0,1"))
    assert not any("one seed is enough" in line for line in check(points))
    assert all(point.uses_seed for point in points)


def test_draws_of_training_items_count_as_seeds(tmp_path):
    """As in a report, which puts them in one row."""
    typed = tiny(tmp_path, "method=corrsteer_s", "task.train_seed=0,1,2")
    assert "16 test items, 3 seeds: " in shows_text(points_of(*typed))[0]
    both = shows_text(points_of(*typed, "seed=0,1"))
    assert "16 test items, 3 seeds: " in both[0] and len(both) == 2, "seeds share their draw"


def test_what_is_done_is_not_checked_again(tmp_path):
    (point,) = points_of(*tiny(tmp_path, "method=none", "task.n_test=100000"))
    point.run.path.mkdir(parents=True)
    point.run.result_path.write_text("{}")
    assert checked_here(*tiny(tmp_path, "method=none", "task.n_test=100000,8"))
    with pytest.raises(UserError, match="lower one of them"):
        checked_here(*tiny(tmp_path, "method=none", "task.n_test=100000,8", "resume=force"))


def test_a_fault_of_a_hundred_thousand_points_is_told_once_and_soon(tmp_path, monkeypatch):
    composed: list[int] = []
    plain = plan._compose

    def counted(composer, jobs, settings, of):
        composed.append(len(jobs))
        return plain(composer, jobs, settings, of)

    monkeypatch.setattr(plan, "_compose", counted)
    with pytest.raises(UserError) as caught:
        checked_here(*tiny(tmp_path, "seed=range(0,100000)", "layers.layer=99", "policy.k=0"))
    said = str(caught.value)
    assert "64 of 64 runs looked at, of 100000 in all, can't be submitted" in said
    assert said.count("policy.k=0: ") == 1 and "policy.k=0" in said and "and 61 more" in said
    assert composed == [plan.SAMPLE], "the others weren't composed"


def hydra_node(overrides: list[str]) -> DictConfig:
    with typed_sweep(overrides) as (_, master, _):
        return master.hydra


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+sweep=layerwise", r"\+sweep=layerwise is many runs: add -m"),
        ("hydra.sweeper.grids=[{seed: [0, 1]}]", r"hydra\.sweeper\.grids is many runs: add -m"),
        ("hydra/launcher=slurm", r"hydra/launcher=slurm starts sweeps.*add -m"),
        ("hydra/launcher=local_processes", r"hydra/launcher=local_processes starts sweeps"),
    ],
)
def test_a_sweep_without_m_is_no_single_run(override, says):
    with pytest.raises(UserError, match=says):
        check_alone(hydra_node([override]))
    check_alone(hydra_node(["seed=1"]))
