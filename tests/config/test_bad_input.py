"""What a person can get wrong: each is told, with the override or the make target that mends it.

Faults of the command line itself (typos, unknown options) are in test_config.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crl_exp.config.errors import UserError
from crl_exp.runs.directory import RunDirectory
from tests.helpers import forking
from tests.helpers.tiny_run import (
    ROOT,
    SMALL,
    TinyFiles,
    composed,
    random_sae_weights,
    run_small,
    save_sae,
    small,
    write_task,
)


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path / 'out'}"]


@pytest.fixture
def own_files(tiny_files, tmp_path) -> TinyFiles:
    """A copy of the tiny files that a test may damage."""
    shutil.copytree(tiny_files.root, tmp_path / "files")
    return TinyFiles(tmp_path / "files")


def refused(overrides: list[str]) -> str:
    """The message that the experiment ends with."""
    with pytest.raises(UserError) as caught:
        run_small(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("layers.layer=4", r"layer 4 is out of range: .* 0 to 3; set .*layers\.layer=0"),
        ("layers.layer=-1", r"layer -1 is out of range"),
        ("layers.layer=3", r"layer 3 has no SAE; .*\[0, 1, 2\].*layers\.layer=0.*train-sae"),
        ("layers=list layers.layers=[1,7]", r"layer 7 is out of range"),
        ("layers=list layers.layers=[]", r"layers=all"),
        ("layers=range layers.last=4", r"layers\.last=4 is out of range"),
        ("layers=range layers.first=2 layers.last=1", r"0 ≤ layers\.first ≤ layers\.last"),
        ("layers=best_on_validation layers.among=[0,9]", r"layer 9 is out of range"),
        ("model.path=tiny:lama", r"model\.path=tiny:lama: .*did you mean 'llama'"),
        ("model.quantization=nf4", r"model\.quantization=nf4 needs an NVIDIA GPU"),
        ("sae.folder=no/such/folder", r"sae\.folder=no/such/folder has no SAE.*sae\.id_template"),
        ('sae.id_template="l{layer}"', r"has no SAE whose id looks like 'l\{layer\}'"),
        ("sae.folder=null sae.release=gemma-scop", r"sae\.release=gemma-scop.*did you mean"),
        ("model.path=no/such/model", r"model\.path=no/such/model: can't load.*model=smollm2_135m"),
        ("task.n_test=0", r"task\.n_test=0: must be at least 1"),
        ("task.n_train=500", r"has 80 items, but .* lower .*task\.n_train=500"),
        ("algorithm.prompts_per_update=26", r"prompts_per_update=26 exceeds task\.n_train=24"),
        ("task.max_new_tokens=3", r"task\.max_new_tokens=3: .* set task\.max_new_tokens=1"),
        ("task.choices=[yes]", r"task\.choices=\['yes'\]: give two answers or more"),
        ("task.choices=[w1,w2]", r"line 1: the answer .* not one of task\.choices"),
        ("task.path=no/such.jsonl", r"task\.path=no/such\.jsonl: can't be read"),
        ("coefficient.multiplier=-1", r"coefficient\.multiplier=-1\.0: must be a positive"),
        ("coefficient.multiplier=nan", r"coefficient\.multiplier=nan: must be finite"),
        ("coefficient.ratio=inf", r"coefficient\.ratio=inf: must be finite"),
        ("coefficient=constant coefficient.value=nan", r"coefficient\.value=nan: must be"),
        ("method=corrsteer_a method.multipliers=[1,nan]", r"method\.multipliers=.*nan"),
        ("method=corrsteer_s method.n_candidates=0", r"method\.n_candidates=0.*at least 1"),
        ("layers=list layers.layers=[2,0,2]", r"layers\.layers=.*names \[2\] more than once"),
        ("layers=best_on_validation layers.among=[1,1]", r"layers\.among=.*names \[1\] more"),
        ("method._target_=crl_exp.steering.methods.crl.CorrSteer method.multipliers=[1]",
         r"CorrSteer chooses no features|method\."),
        ("model.device=tpu", r"model\.device=tpu: must be cpu, cuda, cuda:N or mps"),
        ("model.device=cpu:99", r"model\.device=cpu:99: must be cpu, cuda"),
        ("model.device=cud", r"model\.device=cud: .*did you mean 'cuda'"),
        ("model.device=cuda:99", r"no CUDA device here|there are \d+ CUDA devices here"),
        ("model.revision=nope", r"model\.revision=nope: .* is a folder.*set model\.revision=null"),
        ("model.path=tiny:llama model.revision=nope", r"model\.revision=nope: .* is a folder"),
        ("task._target_=crl_exp.tasks.base.Task", r"is a base .* leaves draw, score, scorer_name"),
        ("fusion._target_=crl_exp.steering.stages.base.Stage", r"is a base .*choose .*fusion=NAME"),
        ("task.choices=['','']", r"task\.choices=\['', ''\]: an answer is empty"),
        ("task.choices=[yes,yes]", r"an answer is there twice"),
        ("output_dir='~nosuchuser/x'", r"output_dir=~nosuchuser/x: there is no home folder of"),
        ("sae.folder='~nosuchuser/x'", r"sae\.folder=~nosuchuser/x: there is no home folder of"),
        ("task.path='~nosuchuser/x'", r"task\.path=~nosuchuser/x: there is no home folder of"),
        ("method=listed method.path='~nosuchuser/x'", r"method\.path=~nosuchuser/x: there is no"),
        ("model.path='~nosuchuser/x' model.revision=a", r"model\.path=~nosuchuser/x: there is no"),
        ("task.path=/dev/zero", r"task\.path=/dev/zero: /dev/zero is no file"),
        ("policy.k=0", r"policy\.k=0: must be at least 1"),
        ("policy.k=64 warmup.min_frequency=0.9",
         r"only \d+ features may be steered, but policy\.k=64; lower policy\.k"),
        ("method.features=fixed policy.k=2", r"method\.features=fixed .* policy\.k=2"),
        ("decay.gamma=0", r"decay\.gamma=0\.0: must be in \(0, 1\]"),
        ("decay.gamma=nan", r"decay\.gamma=nan: must be finite"),
        ("engine.batch_size=0", r"engine\.batch_size=0: must be at least 1"),
        ("algorithm.prompts_per_update=0", r"algorithm\.prompts_per_update=0: must be at least 1"),
        ("algorithm.minibatches=3", r"algorithm\.minibatches=3 doesn't divide"),
        ("algorithm.lr_policy=nan", r"algorithm\.lr_policy=nan: must be finite"),
        ("noise=gaussian noise.std=nan", r"noise\.std=nan"),
        ("noise=gaussian noise.schedule=cos", r"noise\.schedule=cos: must be one of .*'cosine'"),
        ("algorithm=grpo activation=jumprelu", r"activation=jumprelu .* but grpo has none; set"),
        ("algorithm=grpo algorithm.group_size=1", r"algorithm\.group_size=1: must be at least 2"),
        ("activation=ste_topk policy.k=9", r"top=8 .* policy\.k=9; set activation\.top=9"),
        ("activation=sparse_attention policy.k=40", r"quantile=0\.5 leaves .* policy\.k=40"),
        ("mask=all policy.k=40", r"mask\.keep=0\.25 leaves .* policy\.k=40"),
        ("policy.critic=w", r"policy\.critic=w: must be one of v, q"),
        ("policy.nonlinearity=rellu", r"policy\.nonlinearity=rellu: must be .*'relu'"),
        ("warmup.score=fischer", r"warmup\.score=fischer: must be .*'fisher'"),
        ("warmup.negative=flip", r"warmup\.negative=flip: must be one of keep, clip, steer"),
        ("method.online_correlation=true warmup.score=fisher", r"set warmup\.score=pearson"),
        ("method.online_correlation=true warmup.negative=steer", r"set warmup\.negative=keep"),
        ("method.online_correlation=true method.stage2=false", r"needs method\.stage2=true"),
        ("decay.gamma=1.01", r"decay\.gamma=1\.01: must be in \(0, 1\]"),
        ("noise=epsilon_greedy noise.epsilon=2", r"noise\.epsilon=2\.0: must be in \[0, 1\]"),
        ("warmup.min_frequency=1", r"warmup\.min_frequency=1\.0: must be in \[0, 1\)"),
        ("checkpoint.updates=0", r"checkpoint\.updates"),
        ("order=[mask,noise,fusion]", r"order=.* must hold each of .* once"),
        ("order=[mask,mask,noise,fusion,activation]", r"order=.* must hold each of .* once"),
    ],
)  # fmt: skip
def test_a_bad_value(overrides, says, common):
    said = refused([*common, *overrides.split()])
    assert re.search(says, said), said


def test_the_faults_of_several_sections_come_together(common):
    said = refused([*common, "layers.layer=9", "algorithm.prompts_per_update=30", "policy.k=2",
                    "method.features=fixed"])  # fmt: skip
    for part in ("layer 9", "prompts_per_update=30", "policy.k=2"):
        assert part in said


def test_a_missing_asset_says_make_assets(tmp_path, monkeypatch):
    """With an empty cache the model is missed before anything is loaded; no network is asked."""
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    said = refused(["tracking=none", f"output_dir={tmp_path / 'out'}"])
    assert "SmolLM2-135M-Instruct" in said and "`make assets`" in said


def test_a_missing_data_asset_says_make_assets(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path / "cache"))
    not_ours = ("task=", "task.")
    overrides = [o for o in tiny_files.overrides() if not o.startswith(not_ours)]
    said = refused([*overrides, "task=sentiment", f"output_dir={tmp_path / 'out'}"])
    assert "data/hutto_icwsm_2014" in said and "`make assets`" in said


# --- SAEs that don't fit, or are damaged ---


def test_an_sae_of_another_width(common, tmp_path):
    save_sae(tmp_path / "saes", 1, random_sae_weights(0, d_in=16))
    said = refused([*common, f"sae.folder={tmp_path / 'saes'}"])
    assert "d_in=16" in said and "32 wide" in said and "sae=…" in said
    assert not (tmp_path / "out").exists(), "found out only after the weights were loaded"


def test_more_features_than_the_sae_has(common, tmp_path):
    said = refused([*common, "layers=list", "layers.layers=[0,2]", "policy.k=65"])
    for layer in (0, 2):
        assert f"policy.k=65: the SAE of layer {layer}" in said and "has 64 features" in said
    assert not (tmp_path / "out").exists(), "found out only after the weights were loaded"
    # It is the policy's: a method without one doesn't ask for it.
    assert run_small([*common, "policy.k=65", "method=none"])[0]["n"] == 16


def test_an_sae_of_another_layer(common, tmp_path):
    save_sae(tmp_path / "saes", 1, random_sae_weights(0), hook_layer=2)
    said = refused([*common, f"sae.folder={tmp_path / 'saes'}"])
    assert "blocks.2.hook_resid_post" in said and "sae.id_template" in said


def test_an_sae_of_another_model(common, tmp_path):
    overrides = [*common, "method=corrsteer_s", "model.name=other"]
    said = refused(overrides)
    assert "was trained on tiny, but the model is other" in said and "sae.other_model=true" in said
    assert not (tmp_path / "out").exists(), "found out only after the weights were loaded"
    result, _ = run_small([*overrides, "sae.other_model=true"])
    assert any("was trained on tiny, but steers other" in text for text in result["warnings"])


def test_an_sae_of_the_base_model_is_allowed_and_recorded(common):
    result, _ = run_small([*common, "method=corrsteer_s", "model.name=tiny-instruct"])
    assert any("trained on tiny, but steers tiny-instruct" in text for text in result["warnings"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\x00 not this" + path.read_bytes()[12:])


@pytest.mark.parametrize("damage", [cut, garble, Path.unlink])
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_a_damaged_sae_file(name, damage, own_files, tmp_path):
    damage(own_files.root / "saes" / "blocks.1.hook_resid_post" / name)
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "blocks.1.hook_resid_post" in said or "layer 1 has no SAE" in said
    assert "sae.folder=…" in said or "train-sae" in said


def test_an_sae_with_a_nan(own_files, tmp_path):
    weights = random_sae_weights(1)
    weights["W_dec"][3, 4] = float("nan")
    save_sae(own_files.root / "saes", 1, weights)
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "non-finite values in W_dec" in said and "restore the file" in said


# --- models ---


def test_a_config_of_an_sae_that_is_a_list(own_files, tmp_path):
    (own_files.root / "saes" / "blocks.1.hook_resid_post" / "cfg.json").write_text("[1]")
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "cfg.json holds a list, not a config" in said and "sae.folder=…" in said


@pytest.mark.parametrize("sections", [["config.json"], ["tokenizer_config.json"]])
def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(sections, own_files, tmp_path):
    """transformers would ask on the terminal whether to run it."""
    folder, mark = own_files.root / "models" / "llama", tmp_path / "it ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(1)\n")
    for name in sections:
        path = folder / name
        plain = json.loads(path.read_text())
        if name == "config.json":
            plain["model_type"] = "one_of_its_own"
            plain["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
        else:
            plain["tokenizer_class"] = "OwnTokenizer"
            plain["auto_map"] = {"AutoTokenizer": ["own.T", None]}
        path.write_text(json.dumps(plain))
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "model.path=" in said and not mark.exists()
    assert "it brings Python code of its own" in said and "never run here" in said


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for m in messages %}", "end of template"),
        ("{{ raise_exception('one turn only') }}", "one turn only"),
        ("{{ nothing.of_this }}", "undefined"),
    ],
)
def test_a_chat_template_that_cannot_be_rendered(template, why, own_files, tmp_path):
    folder = own_files.root / "models" / "llama"
    (folder / "chat_template.jinja").write_text(template)
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "its chat template can't be rendered" in said and why in said
    assert "task.chat_template=false" in said


@pytest.mark.parametrize("fault", ["task.n_test=100000", "model.device=cuda:99"])
def test_what_fails_before_it_begins_leaves_no_run(fault, common, tmp_path):
    """Neither a run directory nor, therefore, a failed run in MLflow."""
    tracked = [one for one in common if not one.startswith("tracking")]
    refused([*tracked, "tracking=mlflow", fault])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [cut, garble, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_file(name, damage, own_files, tmp_path):
    damage(own_files.root / "models" / "llama" / name)
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "model.path=" in said and "can't load" in said


def test_a_damaged_asset_says_make_assets(own_files, tmp_path, monkeypatch):
    """An asset is checked against its manifest, so a file of another size is found out."""
    from crl_exp.config.machine.asset_sources import ASSETS

    name = "models/SmolLM2-135M-Instruct"
    cache, made = tmp_path / "cache", own_files.root / "models" / "llama"
    files = {path.name: {"size": path.stat().st_size} for path in made.iterdir()}
    fingerprint = next(asset.fingerprint for asset in ASSETS if asset.name == name)
    shutil.copytree(made, cache / name)
    entry = {"fingerprint": fingerprint, "files": files}
    (cache / "manifest.json").write_text(json.dumps({"assets": {name: entry}}))
    monkeypatch.setenv("CRL_EXP_CACHE", str(cache))
    overrides = [*own_files.overrides(), f"model.path=asset:{name}", f"output_dir={tmp_path / 'o'}"]
    assert run_small([*overrides, "method=none"])[0]["n"] == 16
    cut(cache / name / "model.safetensors")
    assert "`make assets`" in refused([*overrides, "method=corrsteer_s"])


# --- the task's data ---


@pytest.mark.parametrize("line", ["not json", '{"question": "w1"}', '["w1", "yes"]', "3"])
def test_a_damaged_line_of_the_task_is_named(line, own_files, tmp_path):
    path = own_files.root / "task.jsonl"
    path.write_text(path.read_text() + line + "\n")
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "task.jsonl, line 81" in said and ("expected" in said or "not JSON" in said)


def test_a_task_that_is_not_text_is_named(own_files, tmp_path):
    garble(own_files.root / "task.jsonl")
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "task.path=" in said and "is not UTF-8" in said


def test_a_data_set_that_is_no_file(tiny_files, tmp_path):
    plain = [o for o in tiny_files.overrides() if not o.startswith("task")]
    said = refused(
        [*plain, "task=gsm8k", "task.data_files=/dev/zero", f"output_dir={tmp_path / 'out'}"]
    )
    assert "task.data_files: /dev/zero is no file" in said


def test_a_task_without_items(own_files, tmp_path):
    (own_files.root / "task.jsonl").write_text("")
    said = refused([*own_files.overrides(), f"output_dir={tmp_path / 'out'}"])
    assert "has 0 items" in said and "task.n_train" in said


@pytest.mark.parametrize(("target", "share", "said"), [("yes", 1, "all"), ("no", 0, "none")])
def test_a_task_that_is_all_right_or_all_wrong_is_warned_about(
    target, share, said, own_files, tmp_path
):
    """Every correlation is 0 then; the run says so, and what to do."""
    weights_file = own_files.root / "models" / "llama" / "model.safetensors"
    weights = load_file(weights_file)
    # With a final norm of zero all logits are equal, and the first choice is taken.
    weights["model.norm.weight"].zero_()
    save_file(weights, weights_file, metadata={"format": "pt"})
    write_task(own_files.root / "task.jsonl", n=80, answers=(target,))
    overrides = [*own_files.overrides(), f"output_dir={tmp_path / 'out'}"]
    result, _ = run_small([*overrides, "method=corrsteer_s"])
    assert result["accuracy_baseline"] == share
    (warning,) = [text for text in result["warnings"] if "every correlation is 0" in text]
    assert f"gets {said} of the 24 training items" in warning and "task.n_train=…" in warning


# --- run directories ---


@pytest.mark.parametrize("where", ["/dev/null/outputs", "a_file/outputs"])
def test_an_output_folder_that_cannot_be_written(where, tiny_files, tmp_path):
    """Under a file nobody can make a folder, root neither."""
    (tmp_path / "a_file").write_text("")
    said = refused([*tiny_files.overrides(), f"output_dir={tmp_path / where}"])
    assert "can't write" in said and "set output_dir=/a/folder/you/can/write" in said


def test_a_finished_run_is_kept(common):
    overrides = [*common, "method=corrsteer_s"]
    result, folder = run_small(overrides)
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    said = refused(overrides)
    assert "already finished" in said and "resume=force" in said
    again, _ = run_small(overrides, skip_finished=True)
    assert again == result, "in a sweep it is skipped and its result returned"
    (folder / "result.json").write_text(json.dumps({**result, "n": -1}))
    assert run_small(overrides, skip_finished=True)[0]["n"] == -1, "skipped: nothing is computed"
    assert run_small([*overrides, "resume=force"])[0]["n"] == 16


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing(tiny_files, tmp_path):
    """`launch.py` itself: with -m a finished run is skipped, without it is shown again. Both say
    what came of them."""
    sizes = [f"{key}={SMALL[key]}" for key in ("task.n_train", "task.n_validation", "task.n_test")]
    common = [*tiny_files.overrides(), *sizes, f"output_dir={tmp_path}", "layers.layer=1"]

    def launch(*arguments: str, python: str) -> subprocess.CompletedProcess:
        command = [python, "launch.py", *arguments, *common]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    first = launch("-m", "method=none,corrsteer_s", python=sys.executable)
    assert first.returncode == 0 and "skipped" not in first.stdout, first.stdout + first.stderr
    assert len(list(tmp_path.glob("single/*/result.json"))) == 2
    second = launch("-m", "method=none,corrsteer_s,corrsteer_a", python=forking.python())
    assert second.returncode == 0 and second.stdout.count("already finished, skipped") == 2
    results = {p: p.read_bytes() for p in tmp_path.glob("single/*/result.json")}
    assert len(results) == 3
    table = second.stdout.split("already finished, skipped")[-1]
    for name in ("unsteered", "CorrSteer-S", "CorrSteer-A"):
        assert re.search(rf"^{name} +\S+ +1 +16 +\S+ → \S+ % +[+-]\d", table, re.M), table
    assert "crl_exp report " in table and "crl_exp show " in table
    alone = launch("method=none", python=forking.python())
    assert alone.returncode == 0 and "Traceback" not in alone.stderr
    assert "already finished" in alone.stdout and "resume=force" in alone.stdout
    folder = next(p.parent for p in results if json.loads(p.read_text())["method"] == "none")
    assert re.search(
        r"^unsteered.*, seed 0: accuracy .*, \+0\.0 \[0\.0, 0\.0\] points .*, n = 16 test items$",
        alone.stdout, re.M,
    ) and f"python -m crl_exp show {folder} --fixed" in alone.stdout  # fmt: skip
    assert {p: p.read_bytes() for p in results} == results


def test_a_checkpoint_of_another_config(common):
    config = small(common)
    _, folder = run_small(common)
    (folder / "result.json").unlink()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**state, "run_key": "another"}, folder / "checkpoint.pt")
    said = refused(common)
    assert "another config" in said and RunDirectory(config).key in said and "resume=force" in said
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert run_small([*common, "resume=force"])[0]["method"] == "crl"


def test_two_configs_have_two_keys_and_what_does_not_matter_has_none():
    plain = RunDirectory(composed([])).key
    assert RunDirectory(composed(["seed=1"])).key != plain
    assert RunDirectory(composed(["algorithm.lr_policy=0.1"])).key != plain
    same = ["output_dir=x", "tracking=none", "resume=force", "sweep_name=s", "checkpoint.updates=1"]
    assert RunDirectory(composed(same)).key == plain


def test_a_failed_run_says_why_and_runs_again(own_files, tmp_path):
    overrides = [*own_files.overrides(), f"output_dir={tmp_path / 'out'}"]
    weights = own_files.root / "saes" / "blocks.1.hook_resid_post" / "sae_weights.safetensors"
    good = weights.read_bytes()
    cut(weights)
    refused(overrides)
    folder = RunDirectory(small(overrides)).path
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "damaged" in status["error"]
    assert "Traceback" in status["traceback"] and not (folder / "result.json").exists()
    weights.write_bytes(good)
    assert run_small(overrides)[0]["n"] == 16
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_a_run_held_by_another_process_is_left_alone(common):
    from filelock import FileLock

    folder = RunDirectory(small(common)).path
    folder.mkdir(parents=True)
    with FileLock(str(folder / ".lock")):
        assert "another process" in refused(common)
    assert run_small(common)[0]["n"] == 16
