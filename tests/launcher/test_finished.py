"""`load_run`: a finished run answers again as it did, and nothing is written into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

import crl_exp
from crl_exp.config.errors import UserError
from crl_exp.config.kept import LOADED
from crl_exp.config.keys import run_key
from crl_exp.experiments.run import run_experiment
from crl_exp.generation.results import Job
from crl_exp.runs.directory import RunDirectory
from crl_exp.steering.answers import Steered
from crl_exp.steering.feature_statistics.store import LayerStatistics
from tests.helpers import tiny
from tests.helpers.tiny_run import ROOT, run_small, small, write_task

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path}", "coefficient=relative"]


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Of every file and folder when it was changed last, and what is in it."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, content)
    return found


def rewards_again(run: crl_exp.launcher.finished.FinishedRun) -> list[float]:
    """Rewards of the answers that the run gives to its test items now."""
    items = run.task.splits().test
    texts = run.generate([item.user for item in items])
    return [score.reward for score in run.task.score(items, texts)]


def rewards_then(folder: Path) -> list[float]:
    table = pq.read_table(folder / "items.parquet", filters=[("split", "==", "test")])
    return table["reward_steered"].to_pylist()


Added = dict[tuple[str, int, int], tuple[list[int], list[float], float]]
"""By item, token and layer: features, their coefficients, and the length of what was added."""


def added_again(run: crl_exp.launcher.finished.FinishedRun) -> Added:
    """What the run's controller adds on its test items now."""
    items = run.task.splits().test
    ids = [run.lm.prompt_ids(item.user, run.task.chat_template) for item in items]
    jobs = [Job(run.controller, range(len(ids)))]
    made = run.engine.generate(
        run.engine.read(ids), jobs, run.task.max_new_tokens, run.options, record=True
    )[0]
    found: Added = {}
    for one in map(Steered.of, made.steps):
        for i, row in enumerate(one.rows):
            there = one.feature_idx_NK[i] >= 0
            found[items[row].item_id, one.token_index, one.layer] = (
                one.feature_idx_NK[i][there].tolist(),
                pytest.approx(one.coefficient_NK[i][there].tolist()),
                pytest.approx(float(one.delta_norm_N[i]), rel=1e-4, abs=1e-6),
            )
    return found


def added_then(folder: Path) -> Added:
    table = pq.read_table(folder / "interventions.parquet", filters=[("split", "==", "test")])
    return {
        (row["item"], row["token_index"], row["layer"]): (
            row["features"], row["coefficients"], row["delta_norm"],
        )
        for row in table.to_pylist()
    }  # fmt: skip


METHODS = {
    "corrsteer_s": ["method=corrsteer_s", "layers.layer=1"],
    "corrsteer_a": ["method=corrsteer_a", "layers=all", "decay=exponential"],
    "corrsteer_p": ["method=corrsteer_p", "layers=all"],
    "random": ["method=random", "layers.layer=1"],
    "random dictionary": ["method=corrsteer_s", "layers.layer=2", "sae.dictionary=random"],
    "listed": ["method=listed", "layers.layer=1", "method.features=[[1,3,9.0],[1,5,-4.0]]"],
    "none": ["method=none", "layers.layer=1"],
    "calibration": ["method=calibration"],
    "crl": ["method=crl", "layers.layer=1"],
    "crl, last policy": ["method=crl", "layers.layer=1", "algorithm.validate_every=0"],
    "crl, layers": ["method=crl", "layers=list", "layers.layers=[0,2]"],
    "crl, chosen layer": ["method=crl", "layers=best_on_validation"],
    "crl, length": ["method=crl", "layers.layer=1", "fusion=context_scale"],
    "crl, online": ["method=crl", "layers.layer=1", "method.online_correlation=true"],
    "crl, doses": ["method=crl", "layers.layer=1", "policy.doses=[0.5,1.0]"],
    "crl, null action": ["method=crl", "layers.layer=1", "policy.null_action=true"],
    "crl, sampled": ["method=crl", "layers.layer=1", "activation=gumbel_topk"],
    "crl, untrained": ["method=crl", "method.stage2=false", "method.features=fixed",
                       "layers.layer=1"],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_answers_as_it_did_and_writes_nothing(method, common, tmp_path, monkeypatch):
    _, folder = run_small([*common, *method])
    before = state_of(tmp_path)
    LOADED.clear()
    monkeypatch.chdir("/")
    run = crl_exp.load_run(folder)
    assert run.config.method.name == run.result["method"] and run.result["n"] == 16
    items = run.task.splits().test
    texts = run.generate([item.user for item in items])
    then = added_then(folder)
    nothing = method[0] in ("method=none", "method=calibration", "method=corrsteer_p")
    assert bool(then) != nothing and added_again(run) == then
    assert rewards_again(run) == rewards_then(folder)
    changed = pq.read_table(folder / "items.parquet", filters=[("split", "==", "test")])["changed"]
    plain = run.unsteered([item.user for item in items])
    assert [a != b for a, b in zip(texts, plain, strict=True)] == changed.to_pylist()
    assert state_of(tmp_path) == before


def test_free_text_is_the_same_token_by_token(tmp_path, monkeypatch):
    """Its `changed` tells tokens apart, and every token of a longer answer is steered."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    _, folder = run_small([
        "+debug=tiny", "task.choices=null", "task.max_new_tokens=4", "method=crl",
        "layers.layer=1", "coefficient=relative", f"output_dir={tmp_path}",
    ])  # fmt: skip
    run = crl_exp.load_run(folder)
    assert rewards_again(run) == rewards_then(folder)
    prompts = [item.user for item in run.task.splits().test]
    steered, plain = run.generate(prompts), run.unsteered(prompts)
    table = pq.read_table(folder / "items.parquet", filters=[("split", "==", "test")])
    assert [a != b for a, b in zip(steered, plain, strict=True)] == table["changed"].to_pylist()
    assert any(table["changed"].to_pylist()), "else nothing is told apart"
    assert len(then := added_then(folder)) > 16 and added_again(run) == then


def test_a_policy_knows_the_lengths_that_stage_1_measured(common, tmp_path):
    """They are beside the weights in the checkpoint; an earlier version's has none."""
    typed = [*common, "method=crl", "layers.layer=1", "fusion=context_scale"]
    _, folder = run_small(typed)
    (stored,) = tmp_path.glob("shared/warmup/*/layer_1_*.safetensors")
    statistics = LayerStatistics.load(stored)
    agent = crl_exp.load_run(folder).controller.agents[1]
    assert agent.norm_mean == statistics.norm_mean > 0
    assert agent.norm_std == statistics.norm_std > 0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["norms"]
    torch.save(state, folder / "checkpoint.pt")
    assert "a stage needs the residual's length" in refused(folder, "w1 w2")


def test_a_run_on_a_disk_that_cannot_be_written(common, tmp_path):
    _, folder = run_small([*common, "method=crl", "layers.layer=1"])
    paths = [tmp_path, *tmp_path.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert rewards_again(crl_exp.load_run(folder)) == rewards_then(folder)
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


ELSEWHERE = """
import sys, crl_exp
run = crl_exp.load_run(sys.argv[1])
items = run.task.splits().test
print(len(run.generate([item.user for item in items])), run.exp.task.path)
"""


@pytest.mark.parametrize("moved", [False, True])
def test_relative_paths_are_meant_from_where_it_was_launched(
    moved, tiny_files, tmp_path, monkeypatch
):
    """And from beside its outputs, where the whole was moved to another place."""
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny_files.root, work)
    monkeypatch.chdir(work)
    relative = [one.replace(f"{tiny_files.root}/", "") for one in tiny_files.overrides()]
    config = small([*relative, "method=corrsteer_s", "layers.layer=1", "output_dir=outputs"])
    result = run_experiment(config, skip_finished=False)
    folder = Path("outputs", "single", result["run_key"]).absolute()
    if moved:
        folder = tmp_path / "new" / folder.relative_to(work)
        work.rename(tmp_path / "new")
    before = state_of(folder)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], cwd=elsewhere, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said = done.stdout.split()
    assert said[:1] == ["16"] and said[1] == str(folder.parents[2] / "task.jsonl"), done.stderr
    assert state_of(folder) == before


# --- what can't be had ---


@pytest.fixture
def finished(common) -> Path:
    return run_small([*common, "method=corrsteer_s", "layers.layer=1"])[1]


def asked(path: Path, *prompts: str) -> None:
    run = crl_exp.load_run(path)
    if prompts:
        run.generate(prompts)


def refused(path: Path, *prompts: str) -> str:
    """What is said, of one line."""
    with pytest.raises(UserError) as caught:
        asked(path, *prompts)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_folder_that_is_no_run(finished, tmp_path):
    assert "there is no such folder" in refused(tmp_path / "no")
    assert "it has no config.yaml; give outputs/SWEEP/RUN_KEY" in refused(tmp_path)
    assert f"is a sweep: give the folder of one of its 1 runs, such as {finished}" in refused(
        finished.parent
    )
    assert "its name isn't a run's key" in refused(finished.rename(tmp_path / "mine"))


def test_a_run_that_is_not_finished(finished):
    (finished / "result.json").unlink()
    status = json.loads((finished / "status.json").read_text())
    (finished / "status.json").write_text(
        json.dumps({**status, "state": "failed", "error": "no memory\nat all"})
    )
    said = refused(finished)
    assert "isn't finished: it is failed (no memory)" in said
    assert "config.yaml can still be read" in said and "result.json can" not in said


def test_a_run_of_another_version(finished):
    config = OmegaConf.load(finished / "config.yaml")
    config.task.added_later = 3
    OmegaConf.save(config, finished / "config.yaml")
    said = refused(finished)
    assert "written by another version" in said
    assert "result.json, features.json, items.parquet" in said and "can still be read" in said
    status = json.loads((finished / "status.json").read_text())
    (finished / "status.json").write_text(json.dumps({**status, "format": 99}))
    assert "another version of crl_exp (format 99" in refused(finished)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mine.Corr", "must name a class of crl_exp"),
        ("crl_exp.steering.methods.corrsteer.Gone", "no such class"),
        ("crl_exp.gone.Corr", "no such class"),
    ],
)
def test_a_class_that_is_not_ours_or_has_gone(finished, target, said):
    config = OmegaConf.load(finished / "config.yaml")
    config.method._target_ = target
    OmegaConf.save(config, finished / "config.yaml")
    told = refused(finished.rename(finished.parent / run_key(config)))
    assert f"method._target_={target}" in told and said in told
    assert "result.json, features.json" in told


def test_a_model_or_an_sae_that_is_gone_or_another(tiny_files, tmp_path, common):
    """Its figures can be read all the same."""
    own = tmp_path / "own"
    shutil.copytree(tiny_files.root, own)
    moved = [one.replace(str(tiny_files.root), str(own)) for one in common]
    _, folder = run_small([*moved, "method=corrsteer_s", "layers.layer=1"])
    sae = own / "saes" / "blocks.1.hook_resid_post"
    shutil.rmtree(sae)
    shutil.copytree(own / "saes" / "blocks.2.hook_resid_post", sae)
    LOADED.clear()
    assert "the SAE of layer 1 is another than the one that" in refused(folder, "w1 w2")
    shutil.rmtree(sae)
    assert "sae.folder=" in refused(folder, "w1 w2")
    shutil.copytree(tiny_files.root / "saes" / sae.name, sae)
    assert asked(folder, "w1 w2") is None
    tiny.save_model("llama", own / "models" / "llama", seed=5)
    LOADED.clear()
    assert "has other weights than the one that" in refused(folder, "w1 w2")
    shutil.rmtree(own / "models")
    LOADED.clear()
    said = refused(folder, "w1 w2")
    assert "model.path=" in said and "result.json, features.json, items.parquet" in said
    run = crl_exp.load_run(folder)
    assert run.result["n"] == 16 and run.features and run.config.method.name == "corrsteer_s"


def test_a_task_whose_file_is_gone(tmp_path, tiny_files):
    """The run answers prompts all the same; only its own items are gone."""
    file = write_task(tmp_path / "mine.jsonl", n=60)
    own = [one for one in tiny_files.overrides() if not one.startswith("task.path")]
    _, folder = run_small([*own, f"task.path={file}", f"output_dir={tmp_path}",
                           "method=corrsteer_s", "layers.layer=1"])  # fmt: skip
    file.unlink()
    run = crl_exp.load_run(folder)
    assert run.generate(["w1 w2"])[0] in ("yes", "no")
    with pytest.raises(UserError, match=r"task\.path="):
        run.task.splits()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (["method=probe", "layers.layer=1"], "method=probe: what it answered by"),
        (["method=probe_steering", "layers.layer=1"], "method=probe_steering: what it answered"),
        (["method=bag_of_words"], "method=bag_of_words: what it answered by"),
        (["method=raw_residual", "layers.layer=1"], "method=raw_residual: what it answered by"),
        (["method=random_direction", "layers.layer=1"], "method=random_direction: what"),
        (["method=crl", "layers.layer=1", "method.stage2=false"], "an untrained policy follows"),
    ],
)
def test_methods_whose_runs_do_not_keep_what_they_answered_by(method, said, common):
    _, folder = run_small([*common, *method])
    told = refused(folder, "w1 w2")
    assert said in told and "result.json, features.json, items.parquet" in told
    assert crl_exp.load_run(folder).unsteered(["w1 w2"])[0] in ("yes", "no")


def test_a_policy_that_is_not_there_whole(common):
    _, folder = run_small([*common, "method=crl", "layers.layer=1"])
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "step": 1}, path)
    assert "is not of the end of training" in refused(folder, "w1 w2")
    path.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged"):
        assert "the policy is lost" in refused(folder, "w1 w2")
    path.unlink()
    assert "its checkpoint.pt, which holds the policy, isn't there" in refused(folder, "w1 w2")


@pytest.mark.parametrize("version", ["first_version", "before_the_house"])
def test_runs_of_earlier_versions(version, tmp_path, monkeypatch):
    """CorrSteer's coefficients are then in interventions.parquet alone; there is no policy."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    old = Path(shutil.copytree(FIXTURES / version / "old", tmp_path / "old"))
    keys = {json.loads(p.read_text())["method"]: p.parent for p in old.glob("*/result.json")}
    before = state_of(old)
    run = crl_exp.load_run(keys["corrsteer_s"])
    assert rewards_again(run) == _rewards_then(keys["corrsteer_s"])
    assert added_again(run) == added_then(keys["corrsteer_s"])
    assert "checkpoint.pt" in refused(keys["crl"], "1 + 1")
    assert state_of(old) == before


def _rewards_then(folder: Path) -> list[float]:
    """Of the test items, by whichever file that version wrote."""
    if (folder / "items.parquet").exists():
        return rewards_then(folder)
    table = pq.read_table(folder / "interventions.parquet", filters=[("split", "==", "test")])
    first = {row["item"]: row["reward_steered"] for row in table.to_pylist()}
    items = crl_exp.load_run(folder).task.splits().test
    return [first[item.item_id] for item in items]


def test_nothing_else_is_said_of_a_run_directory_object(common):
    """A run that is frozen only has no result either."""
    config = small([*common, "method=none", "layers.layer=1"])
    run = RunDirectory(config)
    run.freeze()
    assert "isn't finished: it is not begun" in refused(run.path)
    assert "one text: give a list" in _one_text(run_small([*common, "method=none", "seed=9"])[1])


def _one_text(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        crl_exp.load_run(folder).generate("w1 w2")
    return str(caught.value)
