"""Every option and every point of every sweep, found by globbing: a new file needs no new test."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crl_exp.config.errors import UserError
from crl_exp.experiments import config as configs
from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.command_line import explain, people_errors, register
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.runs.directory import run_key
from crl_exp.runs.records import flatten
from crl_exp.steering.feature_lists import read_list
from crl_exp.steering.methods.listed import other_sae
from crl_exp.tasks.harness import finding
from hydra_plugins.crl_exp_sweeper.grids import GridSweeper
from tests.helpers import forking, lm_eval_tasks
from tests.helpers.tiny_run import CONF, ROOT, composed, quickly_composed, run_small

OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
# What these name (another model, other data) isn't there in a fast test; they are built, not run.
NOT_RUN = {"model", "sae", "task", "tracking", "preset", "sweep"}
RUN = [pair for pair in OPTIONS if pair[0] not in NOT_RUN]
BUILT = [pair for pair in OPTIONS if pair not in RUN]
# Lists belong to an SAE, here of a model that can't be had: on a tiny one another is put in.
PUT_IN = {
    "harmbench_lists": [
        "model=tiny", "sae=tiny", "layers.first=17", "layers.last=18", "method=listed",
        "method.path=null", "method.which=null", "method.features=[[17,3,2.0],[18,3,2.0]]",
    ],
    "harmbench_parity": ["model=tiny", "sae=tiny", "layers.first=17", "layers.last=18"],
}  # fmt: skip
ALSO = {
    ("method", "listed"): ["method.features=[[1,3,2.0]]"],  # one of two keys has to be given
    ("layers", "every"): ["method=probe"],  # the tiny SAEs aren't of every layer
}
# Values without a default, which a person has to give; any other is given a word.
GIVEN = {"sae.id_template": '"layer_{layer}"'}


def test_the_globs_find_something():
    assert ("method", "crl") in OPTIONS and ("fusion", "multiply") in OPTIONS
    assert ("sweep", "demo") in OPTIONS and "demo" in SWEEPS
    assert len(OPTIONS) > 30


def choosing(group: str, option: str) -> str:
    """The override that picks an option; presets aren't in the defaults list, so they are added."""
    in_defaults = {name for entry in defaults() for name in entry}
    return f"{group}={option}" if group in in_defaults else f"+{group}={option}"


def defaults() -> list[dict]:
    entries = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))["defaults"]  # type: ignore[index, call-overload]
    return [entry for entry in entries if isinstance(entry, dict)]  # type: ignore[misc]


def given(group: str, option: str) -> list[str]:
    """Overrides for what the option's file leaves open (`???`)."""
    values = OmegaConf.load(CONF / group / f"{option}.yaml")
    open_keys = [f"{group}.{key}" for key in values if OmegaConf.is_missing(values, key)]
    more = [f"{key}={GIVEN.get(key, 'given')}" for key in open_keys]
    return more + ALSO.get((group, option), [])


def build(group: str, config: DictConfig) -> None:
    exp = configs.experiment(config)
    if group in configs.PARTS:
        assert config[group]["_target_"].endswith("." + type(getattr(exp, group)).__name__)


@pytest.mark.parametrize(("group", "option"), BUILT, ids=["/".join(pair) for pair in BUILT])
def test_every_option_composes_and_builds(group, option, tmp_path):
    typed = [choosing(group, option), *given(group, option)]
    if (group, option) == ("task", "lm_eval"):  # whose file is read when it is composed
        if missing := finding.missing():
            pytest.skip(missing)
        files = lm_eval_tasks.write_data(tmp_path)
        path = lm_eval_tasks.write_yaml(tmp_path, "own", files)
        typed += [f"task.lm_eval_task={path}", "task.n_train=20", "task.n_validation=8"]
    build(group, quickly_composed(typed))


# What asks the model for more than its residual; the points of all sweeps, below, are run by turns
# on both, stages among them.
OF_MODELS = ("coefficient", "engine", "experiment", "layers", "method", "warmup")


@pytest.mark.parametrize(
    ("group", "option", "kind"),
    [(*pair, "llama") for pair in RUN] + [
        pytest.param(*pair, "gemma2", marks=pytest.mark.slow) for pair in RUN
        if pair[0] in OF_MODELS
    ],
)  # fmt: skip
def test_every_option_runs_on_a_tiny_model(group, option, kind, tiny_files, tmp_path):
    """Stage 1, two updates and the evaluation, with the option and everything else as it comes."""
    asked = [choosing(group, option), *ALSO.get((group, option), [])]
    overrides = [*tiny_files.overrides(kind), *asked, f"output_dir={tmp_path}"]
    build(group, quickly_composed(overrides))
    result, folder = run_small(overrides)
    assert result["n"] == 16 and result["p_value"] <= 1
    assert (folder / "interventions.parquet").exists() == (result["kind"] == "steering")
    if result["method"] == "crl":
        steps = re.findall(r'^\{"step": (\d+)', (folder / "journal.jsonl").read_text(), re.M)
        assert steps[0] == "1" and steps[-1] == "2"


@functools.cache
def sweep_points(name: str, *arguments: str) -> list[list[str]]:
    """The overrides of every point of `sweeps/NAME.yaml`, by our sweeper itself; only to be read.
    That all of them compose, build and fit is in `tests.steering.test_effects`.
    """
    chosen = [f"+sweep={name}", *arguments]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        from hydra import compose

        hydra = compose("config", overrides=chosen, return_hydra_config=True).hydra
        sweeper = GridSweeper(hydra.sweeper.grids, hydra.sweeper.params)
        loader = GlobalHydra.instance().config_loader()
        sweeper.hydra_context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        return sweeper.jobs(chosen)


def typed_points(*arguments: str) -> list[list[str]]:
    with typed_sweep(arguments) as (_, _, points):
        return points


@pytest.mark.slow
def test_what_is_typed_for_an_option_is_for_the_grids_whose_option_has_it():
    """`layers=all` has no `layers.layer`; `method=none` at the default layers has."""
    points = typed_points("+sweep=layerwise", "layers.layer=8,12", "seed=0")
    layers = [
        getattr(configs.experiment(quickly_composed(p)).layers, "layer", "all") for p in points
    ]
    assert Counter(layers) == {8: 4, 12: 4, "all": 3}
    typed = typed_points("+sweep=layerwise", "layers=single", "layers.layer=8", "seed=0")
    assert all("layers.layer=8" in point for point in typed) and len(typed) == 5


def test_what_no_grid_sets_is_typed_for_all_of_them():
    """So that a slip is told, rather than left out."""
    points = typed_points("+sweep=paper_table", "layers.layer=8", "seed=0")
    assert all("layers.layer=8" in point for point in points)


@pytest.mark.parametrize("name", SWEEPS)
def test_the_first_point_of_every_sweep_composes_and_builds(name):
    exp = configs.experiment(quickly_composed(sweep_points(name)[0]))
    assert exp.sweep_name == name


# --- +debug=tiny: any run or sweep, offline ---


def test_debug_tiny_beats_what_a_grid_chooses():
    """A Gemma has a tiny one of its own, so that a sweep over families stays one."""

    def chosen(*arguments: str) -> set[tuple[str, str, str]]:
        configured = map(quickly_composed, sweep_points("architectures", "seed=0", *arguments))
        return {(config.model.name, config.sae.name, config.task.name) for config in configured}

    assert chosen("+debug=tiny") == {
        ("tiny-llama", "tiny", "tiny"), ("tiny-gemma2", "tiny_gemma", "tiny"),
    }  # fmt: skip
    typed = chosen("+debug=tiny", "task=sentiment", "model=tiny", "sae=tiny")
    assert typed == {("tiny-llama", "tiny", "sentiment")}


DEPTHS = {
    ("gemma-2-2b-it", "gemma_scope_2b_res"): 26,
    ("Llama-3.1-8B-Instruct", "llama31_8b_it"): 32,
}


@pytest.mark.slow
def test_each_family_has_its_own_saes_and_layers_that_have_one():
    met, known = set(), configs.Known()
    of_method = ("method", "coefficient")  # which neither SAEs, layers nor the template hang on
    points = sweep_points("architectures", "seed=0")
    points = [[o for o in point if not o.startswith(of_method)] for point in points]
    for point in map(list, dict.fromkeys(map(tuple, points))):
        exp = configs.experiment(quickly_composed(point), known)
        met.add((exp.model.name, exp.sae.name))
        assert exp.layers.resolve(exp.sae.available, DEPTHS[exp.model.name, exp.sae.name])
        assert exp.task.chat_template
    assert met == set(DEPTHS)


def test_what_debug_tinys_task_has_not_is_left_out_of_a_grid():
    wordings = [p for p in sweep_points("demo", "+debug=tiny") if "task.wording" in " ".join(p)]
    assert wordings == [] and any("task.wording" in " ".join(p) for p in sweep_points("demo"))


SAME = {"model": {"name": "", "path": ""}, "sae": {"folder": ""}}
TINY = {
    "llama": [],
    "gemma2": ["model.path=tiny:gemma2", "model.name=tiny-gemma2", "sae.folder=tiny:gemma2"],
}


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory):
    """An empty cache: what is tiny is made, what needs `make assets` isn't there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("kind", TINY)
def test_debug_tiny_needs_no_assets(kind, tiny_cache):
    config = composed(["+debug=tiny", *TINY[kind], f"output_dir={tiny_cache}"])
    result = run_experiment(config, skip_finished=False)
    assert result is not None
    assert result["n"] == 16 and result["method"] == "crl"
    assert [line for line in result["warnings"] if "the SAE" not in line] == [], "SAEs are random"
    assert 0 < result["accuracy_baseline"] < 1, "nothing could be learned"


def test_what_is_typed_beats_debug_tiny():
    config = composed(["+debug=tiny", "task=sentiment", "algorithm.n_updates=7"])
    assert config.task.name == "sentiment" and config.task.n_train == 24
    assert config.algorithm.n_updates == 7 and config.model.name == "tiny-llama"


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_of_every_sweep_runs_on_a_tiny_model(name, tiny_cache):
    """By turns on Llama and Gemma-2. Points that differ in the seeds alone are run once."""
    seen: set[str] = set()
    # A sweep over tasks would need their data; tests/tasks/test_task_runs.py runs every task.
    tried = ["+debug=tiny", "task=tiny", f"output_dir={tiny_cache}", *PUT_IN.get(name, [])]
    for i, point in enumerate(sweep_points(name, *tried)):
        if any(override.startswith("method.tokens=") for override in point):
            continue  # for free text, which task=tiny isn't; tests/steering/test_calibration.py
        config = quickly_composed([*point, *TINY[["llama", "gemma2"][i % 2]]])
        same = {"seed": 0, "task": {"train_seed": None}, **SAME}
        key = run_key(OmegaConf.merge(config, same))  # type: ignore[arg-type]
        if key not in seen:
            seen.add(key)
            result = run_experiment(config, skip_finished=True)
            assert result is not None and result["n"] == 16, point


@pytest.mark.slow
def test_a_sweep_is_tried_by_the_line_that_the_docs_give(tiny_cache):
    command = [forking.python(), "launch.py", "-m", "+sweep=decay", "+debug=tiny"]
    done = subprocess.run(
        [*command, f"output_dir={tiny_cache / 'typed'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tiny_cache / "typed" / "decay").glob("*/result.json"))) == 8


@pytest.mark.slow
def test_the_command_line_goes_into_every_point():
    plain, given = sweep_points("demo"), sweep_points("demo", "task.n_train=77", "seed=5")
    assert all("task.n_train=77" in point for point in given)
    assert {config.seed for config in map(quickly_composed, given)} == {5}
    assert len(given) < len(plain), "seeds of the grid are one point now that the seed is given"


@pytest.mark.parametrize("stated", ["mean_positive", "constant"])
def test_a_coefficient_on_the_command_line_beats_the_methods_own(stated):
    assert composed(["method=crl"]).coefficient._target_.endswith(".Relative")
    config = composed(["method=crl", f"coefficient={stated}"])
    assert config.coefficient == composed(["method=none", f"coefficient={stated}"]).coefficient


def test_grpo_weighs_every_answer_alike_as_its_paper_does():
    assert composed(["algorithm=grpo"]).algorithm.flatten_tokens is False


@pytest.mark.slow
def test_what_the_tables_of_depth_and_the_paper_hold():
    """Depth is varied at one width; CRL stands at all layers, beside controls that are as free."""
    depth = [quickly_composed(point) for point in sweep_points("depth", "seed=0")]
    by_depth = [
        c for c in depth if c.policy.critic_depth == 0 and c.layers._target_.endswith("Single")
    ]
    assert {c.policy.hidden for c in by_depth if c.policy.policy_depth != 1} == {576}
    assert any(c.layers._target_.endswith(".All") for c in depth)
    paper = [quickly_composed(point) for point in sweep_points("paper_table", "seed=0")]
    of = {name: {c.layers._target_.rpartition(".")[2] for c in paper if c.method.name == name}
          for name in ("crl", "crl_published", "random", "random_direction")}  # fmt: skip
    assert all("All" in layers for layers in of.values())


def test_crl_as_its_paper_has_it():
    """What is typed beats what the method brings."""
    made = composed(["method=crl_published"])
    parts = {name: made[name]._target_.split(".")[-1] for name in ("coefficient", "mask", "noise")}
    assert parts == {"coefficient": "Constant", "mask": "Generation", "noise": "EpsilonGreedy"}
    assert (made.coefficient.value, made.coefficient.multiplier, made.noise.epsilon) == (1, 1, 0.01)
    assert made.noise.schedule == "constant"  # docs/choices.md: which one the draft has isn't known
    assert (made.policy.policy_depth, made.policy.critic_depth) == (0, 0)
    assert made.algorithm.normalize_advantage is False
    typed = composed(["method=crl_published", "policy=mlp", "mask=none"])
    assert typed.policy == composed(["policy=mlp"]).policy and typed.mask._target_.endswith(
        "NoMask"
    )
    assert (typed.coefficient, typed.noise) == (made.coefficient, made.noise)


def test_the_refusal_sweep_has_every_method_for_free_text():
    """A list is no method of its own; the others need a right answer among options."""
    there = {
        word.partition("=")[2]
        for point in sweep_points("refusal_methods")
        for word in point
        if word.startswith("method=")
    }
    every = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert every - there == {"listed", "probe", "bag_of_words"}


def test_the_first_rung_of_harmbench_is_asked_as_the_logs_were():
    first = quickly_composed(sweep_points("harmbench_parity")[0])
    task, layers = first.task, first.layers
    assert (layers.first, layers.last) == (1, 25)
    assert (task.n_train, task.n_validation, task.n_test) == (108, 12, 280)
    assert task.chat_template is False and task.choices is None


def test_the_shipped_lists_belong_to_the_saes_of_their_sweep():
    """Weights are gated, so that no run would tell."""
    listed = [p for p in sweep_points("harmbench_lists") if "method=listed" in p]
    assert len(listed) == 3
    for point in listed:
        exp: Any = configs.experiment(quickly_composed(point))
        found = read_list(exp.method.path, exp.method.which)
        assert found.sae and other_sae(found, exp) == [] and found.faults() == []
        assert found.layers == list(range(exp.layers.first, exp.layers.last + 1))


POLICY = ["policy.hidden", "policy.policy_depth"]
RATES = ["algorithm.lr_critic", "algorithm.lr_policy"]
LOGGED = [*POLICY, *RATES, "algorithm.average", "algorithm.n_updates",
          "algorithm.prompts_per_update", "algorithm.validate_every"]  # fmt: skip
TO_CRL = {
    1: ["method"], 2: ["method"],
    3: ["method.stage2", "method.features", "method.multipliers", *LOGGED],
    4: LOGGED, 5: ["coefficient"],
}  # fmt: skip
TO_THE_PAPERS = {
    6: ["mask"], 7: ["noise"], 8: POLICY, 9: ["algorithm.normalize_advantage"],
    10: ["coefficient", "method"], 11: RATES,
}  # fmt: skip


def differing(one: dict, other: dict) -> list[str]:
    """Keys of two flat configs; of a part that is another, what it alone has isn't said."""
    keys = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    parts = {key.removesuffix("._target_") for key in keys if key.endswith("._target_")}
    alone = {key for part in parts for key in keys if key.startswith(f"{part}.")}
    named = {f"{part}.{key}" for part in parts for key in ("_target_", "name")}
    of_both = {key for key in alone - named if key in one and key in other}
    return sorted(keys - alone | parts | of_both)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ladder_one_sentence", TO_CRL | TO_THE_PAPERS),
        ("ladder_sentiment", TO_CRL | TO_THE_PAPERS),
        ("harmbench_parity", TO_CRL),
    ],
)
def test_each_rung_of_a_ladder_changes_what_it_says_and_nothing_else(name, steps):
    first: dict[int | None, dict] = {}
    for point in sweep_points(name):
        made = OmegaConf.to_container(quickly_composed(point), resolve=True)
        assert isinstance(made, dict)
        first.setdefault(made.pop("rung"), flatten(made))  # type: ignore[arg-type]
    beside = first.pop(None, None)
    assert list(first) == [0, *steps]
    assert {n: differing(first[n - 1], first[n]) for n in steps} == {
        n: sorted(keys) for n, keys in steps.items()
    }
    assert beside is None or differing(first[5], beside) == ["coefficient"]


def test_a_group_set_to_null_says_what_to_give():
    with pytest.raises(SystemExit) as ended, people_errors():
        composed(["mask=null"])
    assert "GROUP=NAME" in str(ended.value)
    with pytest.raises(ValueError, match="our own fault"), people_errors():
        raise ValueError("our own fault")


def explained(*overrides: str) -> str:
    """What `launch.py` prints for a fault in these overrides."""
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        configs.experiment(composed(overrides))
    return explain(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method=corrster_a", "'corrsteer_a'"),
        ("coefficient=mean_postive", "'mean_positive'"),
        ("+sweep=dmeo", "'demo'"),
        ("task.n_trian=5", "'task.n_train'"),
        ("algorithm.lr=1", "'algorithm.lr_policy'"),
        ("fusoin=add", "'fusion'"),
        ("+swep=demo", "'sweep'"),
        ("+fusion.wieght=2", "'weight'"),
        ("order=[fusion,noise,activaton,mask]", "'activation'"),
        ("resume=frce", "'force'"),
        ("warmup.pooling=maximum", "'max'"),
        ("model.dtype=float23", "'float32'"),
    ],
)
def test_a_typo_is_told_the_nearest_right_names(override, named):
    said = explained(override)
    assert "did you mean" in said and named in said, said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=first", "seed"),
        ("algorithm.lr_policy=fast", "algorithm.lr_policy"),
        ("policy.k=[1", "[1"),
        ("task=jsonl", "task.path=…"),
        ("~mask", "mask=NAME"),
        ("method._target_=os.system", "method=NAME"),
        ("fusion._target_=crl_exp.steering.methods.crl.CRL", "is not a Stage"),
        ("sae.release=null sae.folder=null", "sae.folder=…"),
        ("~fusion.weight", "fusion.weight=…"),
    ],
)
def test_a_bad_value_is_named_with_its_key(override, named):
    assert named in explained(*override.split())


def test_several_faults_are_told_at_once():
    said = explained(
        "policy.k=0", "decay.gamma=0", "engine.batch_size=0", "resume=never", "task.n_test=0",
        "order=[fusion,noise]",
    )  # fmt: skip
    for key in ("policy.k=0", "decay.gamma=0", "engine.batch_size=0", "resume=", "task.n_test=0"):
        assert key in said
    assert "order=" in said and len(said.splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [("method=crll", "'crl'"), ("task.n_trian=5", "'task.n_train'"), ("+swep=demo", "'sweep'")],
)
def test_launch_says_it_without_a_traceback(override, named):
    done = subprocess.run(
        [forking.python(), "launch.py", override, "tracking=none"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "did you mean" in done.stderr and named in done.stderr
    assert "Traceback" not in done.stderr


APP = """
import hydra

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(config):
    with open(config.seen, "a") as file:
        file.write(f"{config.a} {config.b} {config.note}\\n")
    if config.a == 2:
        raise ValueError(f"a is {config.a} and b is {config.b}")

main()
"""
APP_CONFIG = """
defaults: [_self_, {override hydra/sweeper: ours}]
a: 0
b: x
note: none
seen: ???
output_dir: ???
sweep_name: s
hydra:
  sweep: {dir: ., subdir: .}
  output_subdir: null
"""
APP_SWEEPER = """
_target_: hydra_plugins.crl_exp_sweeper.grids.GridSweeper
grids: [{a: [1, 2]}, {a: 1}, {a: [2, 3], b: [y, z]}, {a: 4, note: null},
  {a: 5, note: ["Q={question}, it's"]}]
params: null
"""


def multirun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "app.py", "-m", *arguments],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def grid_sweep(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[str], Path]:
    """A real multirun of a small program, one point of which fails in two of its three jobs."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text(APP_CONFIG)
    (folder / "hydra" / "sweeper").mkdir(parents=True)
    (folder / "hydra" / "sweeper" / "ours.yaml").write_text(APP_SWEEPER)
    seen = folder / "seen.txt"
    done = multirun(folder, f"seen={seen}", f"output_dir={folder / 'out'}")
    return done, seen.read_text().splitlines(), folder


@pytest.mark.slow
def test_a_sweep_is_the_union_of_its_grids_each_point_once(grid_sweep):
    _, seen, _ = grid_sweep
    assert seen == [
        "1 x none", "2 x none",  # the second grid's only point is here already
        "2 y none", "2 z none", "3 y none", "3 z none", "4 x None",
        "5 x Q={question}, it's",  # one value, whatever Hydra would read into it
    ]  # fmt: skip


@pytest.mark.slow
def test_a_failed_job_stops_no_other_and_all_failures_are_named(grid_sweep):
    done, seen, folder = grid_sweep
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "4 x None" in seen
    for b in "xyz":
        assert f"a is 2 and b is {b}" in said
    assert "3 of 8 jobs failed" in said
    assert (folder / "out" / "s" / "multirun.yaml").exists()


@pytest.mark.slow
def test_a_sweep_says_where_it_cannot_write(grid_sweep):
    _, _, folder = grid_sweep
    done = multirun(folder, f"seen={folder / 'no.txt'}", "output_dir=/dev/null/out")
    assert done.returncode == 1 and not (folder / "no.txt").exists()
    assert "can't write to /dev/null/out/s" in done.stderr and "set output_dir=" in done.stderr
