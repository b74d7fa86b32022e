"""Names that become folders, and texts that Hydra or YAML would read as something else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.config.paths import check_sweep
from crl_exp.experiments.config import experiment
from crl_exp.launcher.commands import logs
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.planning.plan import compose_points
from crl_exp.launcher.settings import SlurmSettings, changed
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import find_records, find_sweep
from tests.helpers import forking
from tests.helpers.launching import points_of, settings
from tests.helpers.synthetic import config, finished_run
from tests.helpers.tiny_run import CONF, ROOT, quickly_composed

BAD = ("..", ".", "", "  ", "../../evil", "/tmp/evil", "a/b", "a\\b", ".hidden", "shared",
       "mlartifacts", "two\nlines", "tab\t", " blank", "esc\x1b[31m", "x" * 300)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_sweep_lies_in_one_folder_of_the_output_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"sweep_name=.*take a plain name"):
        RunDirectory(config(tmp_path, sweep_name=name))
    made = quickly_composed(["+debug=tiny", f"output_dir={tmp_path}"])
    made.sweep_name = name
    with pytest.raises(UserError, match=r"sweep_name=.*take a plain name") as error:
        experiment(made)
    assert "\x1b" not in str(error.value), "nothing of it reaches the terminal"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["demo", "2024_11_29", "my sweep", "größer", "a.b-c", "007"])
def test_plain_names_pass(name):
    check_sweep(name)


def test_every_point_of_a_sweep_is_asked_too(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 runs can't be submitted[\s\S]*is a path"):
        points_of("+debug=tiny", f"output_dir={tmp_path / 'o'}", "sweep_name=../evil", "seed=0,1")
    assert list(tmp_path.iterdir()) == []


def test_commands_take_no_other_folder_for_a_run(tmp_path, monkeypatch):
    run = finished_run(config(tmp_path / "outputs"), 0.1)
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "conf"
    other.mkdir()
    (other / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="no run in"):
        find_records(Path("conf"))
    for name in ("", " "):
        with pytest.raises(UserError, match="name is empty"):
            find_sweep(name, Path("outputs"))
        with pytest.raises(UserError, match="name is empty"):
            logs.find_run(name, Path("outputs"))
    assert logs.find_run(run.key[:5], Path("outputs")).key == run.key
    with pytest.raises(UserError, match="no run '/nowhere'"):
        logs.find_run("/nowhere", Path("outputs"))


# --- texts that would be read as something else ---


def written(tmp_path: Path, *overrides: str, conf: Path = CONF) -> list[str]:
    """The texts that matter, of the composed points of a sweep."""
    common = ["+debug=tiny", f"output_dir={tmp_path}", *overrides]
    with typed_sweep(common, conf) as (loader, master, jobs):
        points = compose_points(loader, master, jobs, settings("local_processes"))
    task = experiment(points[0].config).task
    return [point.run.path.parent.name for point in points] + list(task.choices or [])


NAMES = ("2024_11_29", "1e5", "007", "true", "1_000", "0x10", "010", "7", "1.0", "1.50")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_exactly_what_was_typed_or_refused(tmp_path, name):
    quoted = f'sweep_name="{name}"'
    try:
        found = written(tmp_path, f"sweep_name={name}", "task.choices=[yes,no]")
    except UserError as error:
        said = str(error)
        assert quoted in said, said
    else:
        assert found[0] == name
    assert written(tmp_path, quoted, "task.choices=[yes,no]")[0] == name


@pytest.mark.parametrize(
    ("typed", "mend"),
    [
        ("task.choices=[1_0,2_0]", '["1_0","2_0"]'),
        ("task.choices=[yes,true]", '[yes,"true"]'),
        ("task.choices=[1e5,a 1]", '["1e5",a 1]'),
        ("task.choices=[1_0,2_0],[a,b]", '["1_0","2_0"],[a,b]'),
        ("model.revision=12345e7", '"12345e7"'),
    ],
)
def test_a_text_that_hydra_reads_as_a_number_is_refused(tmp_path, typed, mend):
    with pytest.raises(UserError, match="a text is meant") as error:
        written(tmp_path, "sweep_name=s", typed)
    assert mend in str(error.value)


def test_a_text_that_stays_what_it_is_passes(tmp_path):
    assert written(tmp_path, "sweep_name=20241129", "task.choices=[1,2.5]") == [
        "20241129", "1", "2.5",
    ]  # fmt: skip


FILES = {
    "task/mine.yaml": (
        "defaults: [tiny]\nname: mine\nchoices: [yes, no]\n",
        'task.choices is a text, and YAML reads yes as true: write "yes"',
    ),
    "model/mine.yaml": (
        "defaults: [tiny]\nname: 123456e78901\n",
        "model.name is a text, and YAML reads 123456e78901 as the number inf",
    ),
    "hydra/launcher/mine.yaml": (
        "defaults: [local_processes]\npython: 010\n",
        "hydra.launcher.python is a text, and YAML reads 010 as the number 8",
    ),
    "sweep/mine.yaml": (
        "# @package _global_\nhydra:\n  sweeper:\n    grids:\n"
        "      - {task.choices: [[yes, no]], seed: [0, 1]}\n",
        "task.choices is a text, and YAML reads yes as true",
    ),
}


@pytest.fixture
def users_conf(tmp_path) -> Path:
    return Path(shutil.copytree(CONF, tmp_path / "conf", symlinks=False))


@pytest.mark.parametrize("name", FILES)
def test_a_users_file_says_what_it_means(tmp_path, users_conf, name):
    text, fault = FILES[name]
    (users_conf / name).write_text(text)
    group = name.rpartition("/")[0]
    chosen = f"+{group}=mine" if group == "sweep" else f"{group}=mine"
    with pytest.raises(UserError) as error:
        written(tmp_path / "o", "sweep_name=s", chosen, conf=users_conf)
    assert fault in str(error.value) and f"{name}, line " in str(error.value)
    for bare in ("yes, no", "123456e78901", "010"):
        quoted = ", ".join(f'"{word}"' for word in bare.split(", "))
        text = text.replace(bare, quoted)
    (users_conf / name).write_text(text)
    written(tmp_path / "o", "sweep_name=s", chosen, conf=users_conf)


def test_a_clusters_time_is_not_read_in_base_60(tmp_path, users_conf):
    (users_conf / "hydra/launcher/mine.yaml").write_text("defaults: [slurm]\ntime: 4:00:00\n")
    with pytest.raises(UserError, match=r'YAML reads 4:00:00 as the number 14400: write "4:00:00"'):
        written(tmp_path, "sweep_name=s", "hydra/launcher=mine", conf=users_conf)


def test_so_are_those_of_its_further_options(tmp_path, users_conf):
    (users_conf / "hydra/launcher/mine.yaml").write_text(
        "defaults: [slurm]\nsbatch: {time_min: 4:00:00, nodes: 1, exclusive: true}\n"
    )
    with pytest.raises(UserError, match=r"time_min is a text, and YAML reads 4:00:00 as the numbe"):
        written(tmp_path, "sweep_name=s", "hydra/launcher=mine", conf=users_conf)
    found = changed(settings("slurm"), ["sbatch.time_min=12:00:00", "sbatch.nodes=2",
                                        "sbatch.exclusive=true"])  # fmt: skip
    assert isinstance(found, SlurmSettings)
    assert found.sbatch == {"time_min": "12:00:00", "nodes": 2, "exclusive": True}


def test_a_templates_argument_is_the_text_that_was_typed(tmp_path):
    args = "+model.chat_template_args"
    with pytest.raises(UserError, match=r"Hydra reads 2024_07_26 as the number 20240726"):
        written(tmp_path, "sweep_name=s", f"{args}.date_string=2024_07_26")
    written(tmp_path, "sweep_name=s", f"{args}.enable_thinking=false", f"{args}.depth=2")


@pytest.mark.slow
def test_one_run_is_asked_as_a_sweep_is(tmp_path):
    done = subprocess.run(
        [forking.python(), "launch.py", "+debug=tiny", f"output_dir={tmp_path}",
         "sweep_name=2024_11_29", "task.choices=[1_0,b]"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "'sweep_name=\"2024_11_29\"'" in done.stderr and "1_0 as the number 10" in done.stderr
    assert list(tmp_path.iterdir()) == []
