"""The package as it is installed: from its wheel, and from a wheel made of its sdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import crl_exp
from tests.helpers.tiny_run import ROOT
from tests.helpers.wheels import Installed, built, checkout, empty, installed

pytestmark = pytest.mark.slow
SHIPPED = "crl_exp/config/shipped/"
FOLDERS = ("conf", "sweeps", "sae_training", "assets")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkout with a commit of its own, which was changed since."""
    folder = checkout(tmp_path_factory.mktemp("source") / "crl_exp")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "changed.txt").write_text("since\n")
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return built("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return built("build_sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist, tmp_path_factory) -> Path:
    """Unpacked inside of a repository that is the user's own."""
    folder = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = [path for path in folder.iterdir() if path.name.startswith("crl_exp-")]
    return built("build_wheel", unpacked, folder / "dist")


@pytest.fixture(scope="module")
def environment(wheel_of_sdist, tmp_path_factory) -> Installed:
    """The two wheels hold the same (tested below): the one that came the longer way is used."""
    return installed(wheel_of_sdist, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def of_the_checkout() -> set[str]:
    """Every file that is read beside modules, those behind links too."""
    return {
        (Path(folder, name)).relative_to(ROOT).as_posix()
        for top in FOLDERS
        for folder, _, names in os.walk(ROOT / top, followlinks=True)
        for name in names
    }


def content(wheel: Path) -> dict[str, int]:
    """Checksum of each file of a wheel; but for its list of them, and the line ends of its card."""
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
    return {one.filename: one.CRC for one in infos if not one.filename.endswith("RECORD")}


def test_the_wheel_has_every_file(wheel):
    names = set(content(wheel))
    shipped = {name.removeprefix(SHIPPED) for name in names if name.startswith(SHIPPED)}
    wanted = of_the_checkout()
    assert shipped == {*wanted, "built_from.json"}
    yaml = {name for name in wanted if name.endswith((".yaml", ".yml"))}
    assert len(yaml) > 180 and {"conf/sweep/demo.yaml", "sae_training/task/refusal.yaml"} <= yaml
    modules = {p.relative_to(ROOT).as_posix() for top in ("crl_exp", "hydra_plugins")
               for p in (ROOT / top).rglob("*.py")}  # fmt: skip
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"crl_exp/py.typed", "crl_exp/__init__.pyi", "crl_exp/report/assets/page.css",
            "crl_exp/tasks/data/benign_prompts.txt"} <= names  # fmt: skip
    assert not [name for name in names if name.startswith(("tests/", "conf/", "build/"))]


def test_a_wheel_of_the_sdist_is_the_same(wheel, wheel_of_sdist):
    assert content(wheel_of_sdist) == content(wheel)


def test_the_sdist_can_be_run_where_it_is_unpacked(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert all(one.isdir() or one.isreg() for one in archive.getmembers()), "no links"
    assert of_the_checkout() <= names
    assert {"launch.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_it_says_which_commit_it_was_made_from(wheel, source):
    said = json.loads(zipfile.ZipFile(wheel).read(f"{SHIPPED}built_from.json"))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True)
    assert said == {"git_commit": head.stdout.strip(), "git_dirty": True}


def test_a_run_in_an_empty_folder(environment, cache, tmp_path, source):
    """Inside of a repository of the user's own, whose commit and changes are none of ours."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "mine.txt").write_text("secret\n")
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "mine"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "mine.txt").write_text("changed\n")
    work = tmp_path / "work"
    work.mkdir()
    environment.run(environment.program, "launch", "+debug=tiny", cwd=work, cache=cache)
    (result,) = work.glob("outputs/tiny/single/*/result.json")
    code = json.loads((result.parent / "code.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True)
    assert code == {"git_commit": head.stdout.strip(), "git_dirty": True, "git_diff": None}
    assert not list(work.rglob("*.diff"))
    assert json.loads(result.read_text())["versions"]["crl_exp"] == crl_exp.__version__
    said = environment.run(
        environment.program, "status", "outputs/tiny/single", cwd=work, cache=cache
    )
    assert "done" in said.stdout


def test_a_folder_of_wheels_is_all_that_an_install_needs(source, tmp_path, cache):
    """As docs/cluster.md has it, but for the dependencies, which are of an index."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # --no-build-isolation: setuptools is this environment's. Where the docs' line has an index, pip
    # fetches it, and makes wheels of dependencies that are published as source alone.
    made = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet",
            "-c", str(ROOT / "constraints.txt"), "-w", "wheelhouse", str(source)]  # fmt: skip
    subprocess.run(made, check=True, cwd=tmp_path)
    assert [path.suffix for path in (tmp_path / "wheelhouse").iterdir()] == [".whl"]
    there = empty(tmp_path / "environment")
    # --force-reinstall: it sees what is installed where the dependencies are.
    taken = [*pip, "--python", str(there.python), "install", "--no-deps", "--no-index", "--quiet",
             "--force-reinstall", "--find-links", "wheelhouse",
             "-c", str(ROOT / "constraints.txt"), "crl-exp"]  # fmt: skip
    subprocess.run(taken, check=True, cwd=tmp_path)
    said = there.run(there.program, "doctor", "+debug=tiny", cwd=tmp_path, cache=cache).stdout
    assert " 0 failed" in said and str(there.folder) in said


COMPOSED = """
import sys
import crl_exp
from crl_exp.config.paths import REPO
from crl_exp.launcher.commands.typed import typed_sweep
assert not str(REPO).startswith(sys.argv[1]), REPO
with typed_sweep(["+sweep=demo"]) as (loader, master, jobs):
    assert len(jobs) > 40
    loader.load_sweep_config(master, jobs[0])
options = {}
for path in sorted((REPO / "conf").glob("*/*.yaml")):
    options.setdefault(path.parent.name, []).append(path.stem)
n = sum(map(len, options.values()))
for preset in ("sweep", "preset", "debug"):
    for name in options.pop(preset):
        with typed_sweep([f"+{preset}={name}"]) as (loader, master, jobs):
            assert jobs
for i in range(max(map(len, options.values()))):
    chosen = {group: names[i % len(names)] for group, names in options.items()}
    config = crl_exp.compose([f"{group}={name}" for group, name in chosen.items()])
    assert set(chosen) <= set(config)
saes = crl_exp.load_saes(crl_exp.compose(["+debug=tiny", "layers.layer=3"]))
shipped = crl_exp.compose([]).sae
from crl_exp.config.sections import fill
from crl_exp.saes.config import SAEConfig
print(n, fill(shipped, "sae", SAEConfig).available, crl_exp.__version__)
"""


def test_every_option_composes_and_the_shipped_saes_are_there(environment, cache, tmp_path):
    done = environment.run(environment.python, "-c", COMPOSED, ROOT, cwd=tmp_path, cache=cache)
    n = len(list((ROOT / "conf").glob("*/*.yaml")))
    assert done.stdout.split("\n")[-2] == f"{n} [8, 12, 15, 18, 22] {crl_exp.__version__}"


def test_the_defaults_say_how_the_model_is_had(environment, cache, tmp_path):
    """`crl-exp assets` fetches it; the SAEs are in the wheel."""
    done = environment.run(environment.program, "launch", cwd=tmp_path, cache=cache, code=1)
    assert "models/SmolLM2-135M-Instruct is not in" in done.stderr
    assert "crl-exp assets" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.assets
def test_the_demo_is_planned_with_the_fetched_assets(environment, tmp_path):
    """All points are composed and checked, model, data and SAEs among them."""
    from crl_exp.config.machine.assets import cache_dir

    done = environment.run(
        environment.program, "launch", "-m", "+sweep=demo", "hydra/launcher=local_processes",
        "hydra.launcher.setup=['exit 3']", cwd=tmp_path, cache=cache_dir(), code=1,
    )  # fmt: skip
    assert "no worker could start" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["train-sae", "bench", "report", "run", "assets"])
def test_the_other_commands_are_there(environment, cache, tmp_path, command):
    done = environment.run(environment.program, command, "--help", cwd=tmp_path, cache=cache)
    assert done.stdout and "Traceback" not in done.stderr
    listed = environment.run(environment.program, "--help", cwd=tmp_path, cache=cache)
    assert f"  {command}" in listed.stdout and "usage: crl-exp" in listed.stdout


FOREIGN = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    print("ran")

main()
"""


def test_another_hydra_application_is_not_taxed(environment, cache, tmp_path):
    """Hydra imports the plugins of the environment in every application's start."""
    (tmp_path / "app.py").write_text(FOREIGN)
    for words in (["--help"], []):
        done = environment.run(
            environment.python, "-X", "importtime", "app.py", *words, cwd=tmp_path, cache=cache
        )
        imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
        assert "crl_exp.config.errors" in imported, "ours was imported"
        heavy = {"torch", "transformers", "mlflow", "sae_lens", "numpy", "pandas", "submitit"}
        assert not heavy & {name.partition(".")[0] for name in imported}
        other = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert other == []


def test_modules_beside_the_user_hide_no_library(environment, cache, tmp_path):
    """Whichever way it is started, the working directory is looked in last."""
    (tmp_path / "datasets.py").write_text("raise RuntimeError('not the library')\n")
    tiny = ["+debug=tiny", "method=none"]
    environment.run(environment.program, "launch", *tiny, "seed=1", cwd=tmp_path, cache=cache)
    environment.run(
        environment.python, "-m", "crl_exp", "launch", *tiny, "seed=2", cwd=tmp_path, cache=cache
    )
    assert len(list(tmp_path.glob("outputs/tiny/single/*/result.json"))) == 2
