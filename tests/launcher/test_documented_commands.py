"""Every command that README and docs show is typed here, with tiny models in place of large ones.

Each is found by `documented`, and run by one of the tests below or named in `NOT_RUN` with the
reason. Of a sweep all points are composed and checked, and the first one is run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from crl_exp import __main__ as program
from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.bench import command as bench
from crl_exp.launcher.command_line import check_alone
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.planning.plan import HERE, Point, check, compose_points
from crl_exp.launcher.settings import make_settings
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.tasks.harness import finding
from tests.helpers import hub_data
from tests.helpers.documented import FENCED, documented, words
from tests.helpers.launching import settings, tiny
from tests.helpers.lm_eval_tasks import write_data, write_yaml
from tests.helpers.tiny_run import ROOT, write_task

CACHE = os.environ.get("CRL_EXP_CACHE")
HUB = "weights of the hub"
LONG = "takes minutes to hours"
NOT_RUN = {
    "python -m crl_exp COMMAND": "stands for each of them",
    "python -m crl_exp assets": "an index; test_assets.py",
    "pip install .": "an index; test_wheel.py installs what it makes",
    "python -m crl_exp options": "writes into docs/; test_options_page.py makes the page",
    "python docs/figures/token_by_layer.py": "writes into docs/; test_site.py draws it",
    "python -m crl_exp bench": f"{LONG}; test_bench.py has its parts",
    "python -m crl_exp bench --only update": f"{LONG}; test_bench.py",
    "python -m crl_exp bench --only startup commands": f"{LONG}; test_bench.py",
    "python -m crl_exp bench --against HEAD~1 --only update startup": (
        f"{LONG}; test_bench_against.py"
    ),
    'make bench-compare BASE=HEAD~1 ONLY="update startup"': f"{LONG}; test_bench_against.py",
    "python -m crl_exp bench --history": "what is kept; test_bench_against.py",
    "python -m crl_exp.launcher.bench.finished_runs outputs/SWEEP/RUN_KEY outputs/n500 500": (
        "test_finished_runs.py makes some"
    ),
    "python -m crl_exp.launcher.bench.scale FOLDER N": f"{LONG}; test_finished_runs.py makes some",
    "python launch.py …": "stands for each of them",
    "python -m crl_exp train-sae": LONG,
    "python -m tests.helpers.planted_table": f"{LONG}, and writes into docs/",
    "python -m tests.helpers.planted_table --seeds 2": f"{LONG}, and writes into docs/",
    "python -m tests.slurm.cluster": "tests/slurm/ start that cluster",
    "python -m crl_exp sync": "test_tracking.py",
    "python -m crl_exp sync outputs/NAME": "test_tracking.py",
    "python -m crl_exp sync outputs --uri http://tracking:5000": "test_tracking_servers.py",
    "python -m crl_exp prefetch +sweep=layerwise model=gemma2_2b_it sae=gemma_scope_2b_res": HUB,
    "python launch.py --help": "test_help.py; test_config.py composes all that it lists",
    "python -m crl_exp doctor": "test_doctor.py",
    "python -m crl_exp doctor +sweep=layerwise model=gemma2_2b_it sae=gemma_scope_2b_res "
    "hydra/launcher=slurm hydra.launcher.partition=gpu": "a cluster; test_doctor.py",
    "python -m crl_exp rm": "test_rm_and_rename.py",
    "python -m crl_exp rm SWEEP": "test_rm_and_rename.py",
    "python -m crl_exp rename": "test_rm_and_rename.py",
    "python -m crl_exp rename SWEEP NEW": "test_rm_and_rename.py",
    "python -m crl_exp sync outputs": "test_rm_and_rename.py",
    "python -m venv .venv && . .venv/bin/activate": "Python's own",
    "pip wheel -c constraints.txt -w wheelhouse .": "an index; test_wheel.py builds ours",
    "pip wheel": "an index",
    "pip download --only-binary": "an index; it fails, which is the point",
    "pip install --no-index --find-links wheelhouse -c constraints.txt crl-exp": (
        "wheels of an index; test_wheel.py installs ours so"
    ),
    "git clone URL crl_exp && cd crl_exp": "a network",
    "export HF_HOME=/shared/hub CRL_EXP_CACHE=/shared/crl_exp": "the shell's own",
    "python launch.py --cfg job": "Hydra's own; test_startup.py",
    "python launch.py task.n_tst=3": "refused, which is the point; test_startup.py",
    "python launch.py -m hydra/sweeper=trials hydra.sweeper.n_trials=20 hydra.sweeper.n_jobs=4 "
    "hydra/launcher=slurm hydra.launcher.wait=true 'algorithm.lr_policy=interval(1e-4,1e-2)' "
    "sweep_name=tuned": "test_optuna.py",
    "python launch.py … || { [ $? = 75 ] && scontrol requeue $SLURM_JOB_ID; }": "of a batch script",
    "python -m crl_exp compare 'demo:plain CRL@22' 'demo:plain CorrSteer-S@18'": "test_compare.py",
    "python -m crl_exp compare 'demo:plain CRL@22' 'demo:plain bias on the answer'": (
        "test_compare.py"
    ),
    "python -m crl_exp compare 'demo:plain CRL' 'demo:plain CorrSteer-S' --items 50": (
        "test_compare.py"
    ),
    "python -m crl_exp show 'demo:plain CRL@22' --broken --limit 50": "test_show.py",
    "python -m crl_exp compare demo/0123456789ab other/ba9876543210": "test_compare.py",
    "python -m tests.helpers.simulated": f"{LONG}, and writes into docs/; test_simulated.py",
    "python launch.py --config-dir=docs/examples/own_task task=capitals method=none": (
        "test_own_code.py"
    ),
    "python -m crl_exp label outputs/SWEEP/RUN_KEY --feature 12/3290 "
    "--base-url http://HOST:8000/v1 --model NAME": "an endpoint; test_label.py",
    "git apply": "of a diff of one's own",
    "hf auth login": "an account",
    "pip install hydra-optuna-sweeper": "an index",
    "pip install 'mlflow[auth]'": "an index",
    "pip install 'crl_exp[wandb]'": "an index",
    "pip install 'crl_exp[lm-eval]'": "an index",
    "python launch.py task=lm_eval task.lm_eval_task=arc_easy": (
        "a data set of the hub; test_lm_eval.py runs tasks of its own"
    ),
    "python launch.py task=lm_eval task.lm_eval_task=arc_easy task.metric=acc_norm "
    "'task.data_files={train:a.parquet,validation:v.parquet,test:t.parquet}'": (
        "files of that data set; test_lm_eval.py"
    ),
    "pip install --no-deps steering-vectors==0.12.2": "an index",
    "apt-get install munge slurmctld slurmd slurm-client": "root",
    "squeue -r": "SLURM's own",
    "scontrol show config": "SLURM's own",
    "scontrol requeue": "SLURM's own",
    "scontrol update JobId=123_4 StartTime=now": "SLURM's own",
    "export HF_HOME=/shared/hub": "the shell's own",
    "export SLURM_CONF=/tmp/slurm-k2x1/slurm.conf": "the shell's own",
}
COMPOSED = {
    "gemma2_2b_it": HUB, "gemma2_27b": HUB, "/models/mine": "a GPU, and a model of one's own",
    "method.path=": "a list, or a run, of one's own", "+sweep=harmbench_lists": HUB,
    "task.groups=": "a data set of the hub", "task.choices=null": "a data set of the hub",
    "task=refusal": "data that `make assets` fetches", "task=one_sentence": "likewise",
    "task.scorer=judge": "an endpoint; tests/tasks/test_own_judge.py has one",
    "task.scorer=preference_model": "a reward model; tests/tasks/test_preference_model.py has one",
    "+sweep=harmbench_parity": HUB, "EleutherAI/": HUB,
    "+sweep=null_action": "data that `make assets` fetches",
    "+sweep=refusal_methods": "likewise; its bias is of tokens, which only free text has",
    "+sweep=demo_one_sentence": "likewise; its bias is of tokens, which only free text has",
}  # fmt: skip
"""Commands with these are composed, and neither checked nor run: the reason."""
FETCHED = (
    "task=refusal", "task=one_sentence", "+sweep=null_action", "+sweep=refusal_methods",
    "+sweep=demo_one_sentence",
)  # fmt: skip
"""Those of them that are checked and run where `make assets` has been."""
DOCUMENTED = documented()
WANTED = [command for command in DOCUMENTED if command not in NOT_RUN]
LAUNCHES = [command for command in WANTED if command.startswith("python launch.py")]
MAKES = [command for command in WANTED if command.startswith("make ")]
TRAININGS = [command for command in WANTED if command.startswith("python -m crl_exp train-sae ")]
BENCHES = [command for command in WANTED if command.startswith("python -m crl_exp bench ")]
COMMANDS = [
    command
    for command in WANTED
    if command.startswith("python -m crl_exp ") and command not in (*TRAININGS, *BENCHES)
]
# Names in the docs that stand for a sweep, a run, or its folder.
SWEEP = "layerwise"
STANDS_FOR = {
    "mine": SWEEP,
    "NAME": SWEEP,
    "SWEEP": SWEEP,
    "probing": SWEEP,
    "OTHER": "another",
    **dict.fromkeys(["n10", "n100", "n500", "n1000"], SWEEP),
    "single": SWEEP,
    "tiny/single": SWEEP,
    "tiny/layerwise": SWEEP,
}


def test_every_command_is_run_or_it_says_why_not():
    kinds = [*LAUNCHES, *MAKES, *TRAININGS, *BENCHES, *COMMANDS]
    assert sorted(kinds) == sorted(WANTED), "of a kind that nobody runs"
    assert set(NOT_RUN) <= set(DOCUMENTED), "no page has them any more"
    assert len(LAUNCHES) > 15 and len(COMMANDS) > 10


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder with the files that the docs name, and an empty cache."""
    home = tmp_path_factory.mktemp("home")
    hub_data.on_files("gsm8k", home / "gsm8k", "jsonl")
    hub_data.on_files("mmlu", home / "mmlu")
    own_questions(home)
    write_task(home / "yes_no", n=400)
    write_task(home / "numbers", n=60, answers=("1", "2"))
    write_yaml(home, "own", write_data(home))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(home / "cache"))
        yield home


def own_questions(folder: Path) -> None:
    """The file that docs/quickstart.md makes, by its own lines."""
    page = (ROOT / "docs" / "quickstart.md").read_text()
    (program,) = [text for language, text in FENCED.findall(page) if language == "python"]
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def overrides_of(command: str, home: Path) -> list[str]:
    """What is typed after `launch.py`, made tiny."""
    typed = [word for word in words(command)[2:] if word != "-m"]
    typed = [word.replace("+sweep=NAME", f"+sweep={SWEEP}") for word in typed]
    for text, path in (
        ("my_questions.jsonl", home / "my_questions.jsonl"),
        ("/data/gsm8k.jsonl", home / "gsm8k" / "*.jsonl"),
        ("auxiliary_train:a.parquet", f"auxiliary_train:{home}/mmlu/*auxiliary_train*.parquet"),
        ("validation:v.parquet", f"validation:{home}/mmlu/*validation*.parquet"),
        ("test:t.parquet", f"test:{home}/mmlu/*test*.parquet"),
        ("FILE.yaml", home / "tiny_own.yaml"),
        ("FILE.jsonl", home / ("numbers" if "task.answer_kind=number" in typed else "yes_no")),
    ):
        typed = [word.replace(text, str(path)) for word in typed]
    made_tiny = [] if "+debug=tiny" in typed else ["+debug=tiny"]
    if "task=gsm8k" in typed:  # whose answers are hundreds of tokens long
        made_tiny.append("task.max_new_tokens=4")
    return [*typed, *made_tiny, f"output_dir={home / 'out'}"]


def slow_where_it_is_a_ready_sweep(command: str) -> Any:
    """Dozens of points are composed and checked."""
    ready = "+sweep=" in command and f"+sweep={SWEEP}" not in command
    return pytest.param(command, marks=pytest.mark.slow if ready else ())


@pytest.mark.parametrize(
    "command", [slow_where_it_is_a_ready_sweep(one) for one in LAUNCHES], ids=LAUNCHES
)
def test_a_launch(command, home):
    overrides = overrides_of(command, home)
    if "task=lm_eval" in command and (missing := finding.missing()):
        pytest.skip(missing)
    why = next((reason for text, reason in COMPOSED.items() if text in command), None)
    with typed_sweep(overrides) as (loader, master, jobs):
        launcher = OmegaConf.to_container(master.hydra.launcher)
        assert isinstance(launcher, dict)
        kind = str(launcher.pop("_target_")).rpartition(".")[2]
        own = {"SlurmLauncher": "slurm", "LocalProcessesLauncher": "local_processes"}.get(kind)
        how = make_settings(own, launcher) if own else HERE  # type: ignore[arg-type]
        if " -m " not in command:
            assert len(jobs) == 1
            check_alone(master.hydra)
        points = compose_points(loader, master, jobs[:3] if why else jobs, how)
    if why:
        return
    check(points)
    # tests/config/test_config.py runs the points of ready sweeps.
    for point in points[:1] if "+sweep=" in command else that_differ(points):
        result = run_experiment(point.config, skip_finished=True)
        assert result is not None and result["n"] >= 1


def that_differ(points: list[Point]) -> list[Point]:
    """Of the points that differ in seed and layers alone, the first."""
    found: dict[str, Point] = {}
    for point in points:
        plain: Any = OmegaConf.to_container(point.config, resolve=True)
        rest = {key: value for key, value in plain.items() if key not in ("seed", "layers")}
        found.setdefault(json.dumps(rest, sort_keys=True, default=str), point)
    return list(found.values())


FREE_TEXT = ["task=tiny", "task.choices=null", "task.max_new_tokens=3"]
QUESTIONS = [
    command
    for command in LAUNCHES
    if command in (ROOT / "docs" / "questions.md").read_text() and "task=one_sentence" in command
]


@pytest.mark.slow
@pytest.mark.parametrize("command", QUESTIONS)
def test_a_question_about_fetched_texts_runs_on_made_up_ones(command, home):
    overrides = [word for word in overrides_of(command, home) if word != "task=one_sentence"]
    with typed_sweep([*overrides, *FREE_TEXT]) as (loader, master, jobs):
        points = that_differ(compose_points(loader, master, jobs, HERE))
    check(points)
    assert len(points) > 1
    for point in points:
        result = run_experiment(point.config, skip_finished=True)
        assert result is not None and result["n"] >= 1


@pytest.fixture
def fetched(monkeypatch) -> None:
    """The cache that `make assets` fills, in place of `home`'s empty one."""
    if CACHE is None:
        monkeypatch.delenv("CRL_EXP_CACHE", raising=False)
    else:
        monkeypatch.setenv("CRL_EXP_CACHE", CACHE)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    "command", [one for one in LAUNCHES if any(text in one for text in FETCHED)]
)
def test_a_launch_on_data_that_is_fetched(command, tmp_path):
    """Every point is checked, and its items drawn from the real files; their answers are of tens of
    tokens, so that running one takes minutes."""
    with typed_sweep([word for word in words(command)[2:] if word != "-m"]) as typed:
        loader, master, jobs = typed
        own = [str(point.config.task.name) for point in compose_points(loader, master, jobs, HERE)]
    overrides = [*overrides_of(command, tmp_path), f"task={own[0]}", *(
        f"task.n_{split}=64" for split in ("train", "validation", "test")
    )]  # fmt: skip
    with typed_sweep(overrides) as (loader, master, jobs):
        points = compose_points(loader, master, jobs, HERE)
    check(points)
    assert all(point.config.task.name == own[0] for point in points)


SMALL_TRAINING = [
    "tasks.sentiment.n_train=60", "tasks.refusal.n_train=20", "text.answer_tokens=4",
    "text.general_tokens={amazon: 1500, movies: 500, nyt: 0, tweets: 0}",
    "text.answers={refusal: 2, sentiment: 2}", "training.d_sae=256", "training.k=16",
    "training.rows=4000", "training.batch_size=128", "training.dead_after=20",
    "training.specialists.n_features=16", "training.specialists.k=4",
    "training.specialists.rows=1000", "training.specialists.batch_size=64",
    "training.specialists.gate_rows=200", "quality.ce_tokens=300",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.usefixtures("fetched")
def test_a_training_of_saes(tmp_path):
    """The command as it is typed, a thousandth of its size: it ends, and says that they are bad."""
    (command,) = [one for one in TRAININGS if "model=mine" not in one]
    done = subprocess.run(
        [sys.executable, *words(command)[1:], *SMALL_TRAINING], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    folder = tmp_path / "saes" / "mine" / "blocks.10.hook_resid_post"
    quality = json.loads((folder / "quality.json").read_text())
    assert (folder / "cfg.json").exists()
    assert done.returncode == int(quality["explained_variance"] < 0)


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_of_saes_is_understood(command):
    """As Hydra reads it; tests/saes/test_train_sae.py trains."""
    from hydra import compose, initialize_config_dir

    from crl_exp.launcher.commands.train_sae import TrainSaeConfig

    assert TrainSaeConfig  # importing it registers the schema
    typed = [word for word in words(command)[4:] if word != "model=mine"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "sae_training"), version_base="1.3"):
        raw = compose("train_sae", overrides=typed)
    assert (raw.layers, raw.out) == ([10], "saes/mine")


def test_what_make_is_asked_for():
    """Make itself says what it would do; its recipes type nothing that isn't tried here."""
    for command in MAKES:
        asked = [word.replace("…", SWEEP) for word in shlex.split(command)]
        done = subprocess.run(["make", "-n", *asked[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        for line in done.stdout.splitlines():
            if "crl_exp" in line and " -m crl_exp " in line:
                assert shlex.split(line.split(" -m crl_exp ")[1])[0] in program.COMMANDS, line


def test_the_list_of_benches(capsys):
    for command in BENCHES:
        assert bench.main(words(command)[4:]) == 0
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def outputs(home) -> tuple[Path, str]:
    """A folder `outputs` with a finished sweep that was submitted, and the key of a run. Beside it
    another one, of another seed."""
    folder = home / "work" / "outputs"
    for name, asked in (("another", ["method=corrsteer_s", "seed=1"]),
                        (SWEEP, ["method=none,corrsteer_s"])):  # fmt: skip
        with typed_sweep(tiny(folder, *asked, f"sweep_name={name}")) as typed:
            loader, master, jobs = typed
            points = compose_points(loader, master, jobs, HERE)
        for point in points:
            run_experiment(point.config, skip_finished=True)
    keys = [point.key for point in points]
    part = {"job": None, "workers": [], "settings": vars(settings("local_processes")),
            "runs": keys, "packs": [[key] for key in keys]}  # fmt: skip
    submission = {"cwd": str(home), "launcher": "local_processes", "released": True,
                  "parts": [part]}  # fmt: skip
    SweepFile(folder / SWEEP, {key: [] for key in keys}, [submission]).write()
    return folder, keys[0]


def stood_for(word: str, folder: Path, key: str) -> str:
    if word in ("RUN_KEY", "RUN"):
        return key
    if word in ("RUN_DIRECTORY", "DIR"):
        return str(folder / SWEEP / key)
    word = STANDS_FOR.get(word, word)
    return word.replace("/SWEEP/", f"/{SWEEP}/").replace("RUN_KEY", key)


def test_the_commands(outputs, quick_reports, monkeypatch, capsys):
    """In one process; what differs only in the name of the sweep is typed once."""
    folder, key = outputs
    monkeypatch.chdir(folder.parent)
    before = {path: path.read_bytes() for path in folder.glob("*/*/*.json")}
    typed = [[stood_for(word, folder, key) for word in words(command)[3:]] for command in COMMANDS]
    for line in dict.fromkeys(map(tuple, typed)):
        assert program.main(line) == 0, (line, capsys.readouterr())
    assert (folder / SWEEP / "report" / "table.md").exists()
    assert {path: path.read_bytes() for path in before} == before, "finished runs stay as they were"
    assert (folder / "comparisons" / f"{SWEEP}+another" / "table.md").exists()
    for made in (folder / SWEEP / "report", folder / "comparisons"):
        shutil.rmtree(made)
