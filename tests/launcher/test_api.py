"""What `import crl_exp` gives, in fresh interpreters, and to programs that use Hydra themselves."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import crl_exp
from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key
from tests.helpers.tiny_run import ROOT, composed

HEAVY = ("torch", "transformers", "mlflow", "sae_lens", "hydra", "omegaconf", "numpy", "pandas")
NAMES = [name for name in crl_exp.__all__ if name != "__version__"]


def fresh(program: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a program prints, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- names ---


def test_the_import_loads_nothing():
    program = (
        f"import sys; before = set(sys.modules); import crl_exp; print(crl_exp.__version__); "
        f"print(sorted({HEAVY!r} & sys.modules.keys()) if False else "
        f"sorted(set({HEAVY!r}) & set(sys.modules))); "
        "print(sorted(n for n in set(sys.modules) - before if n.startswith('crl_exp')))"
    )
    assert fresh(program).splitlines() == [crl_exp.__version__, "[]", "['crl_exp']"]


BOTH_WAYS = """
import importlib, pkgutil, pickle, sys, typing
import crl_exp
name, first = sys.argv[1:] if len(sys.argv) > 1 else (NAME, FIRST)
if first == "modules":
    for found in pkgutil.iter_modules(crl_exp.__path__, "crl_exp."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
one = getattr(crl_exp, name)
if first == "name":
    for found in pkgutil.iter_modules(crl_exp.__path__, "crl_exp."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
assert getattr(crl_exp, name) is one and callable(one), one
assert one.__module__.startswith("crl_exp.") and one.__name__ == name
assert pickle.loads(pickle.dumps(one)) is one
typing.get_type_hints(one)
assert name in dir(crl_exp)
print(one.__module__)
"""


@pytest.mark.parametrize("first", ["name", "modules"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_same_whatever_was_imported_first(name, first):
    program = BOTH_WAYS.replace("NAME, FIRST", f"{name!r}, {first!r}")
    assert fresh(program).strip() == crl_exp._HOMES[name]


def test_no_module_has_an_exported_name():
    """Importing it would put the module in the name's place."""
    there = {path.stem for path in (ROOT / "crl_exp").iterdir()}
    assert not there & set(NAMES)


def test_a_star_and_help_show_every_name_and_an_unknown_one_is_told():
    program = (
        "from crl_exp import *\nimport crl_exp, pydoc\n"
        f"assert set({NAMES!r}) <= set(dir())\n"
        "text = pydoc.render_doc(crl_exp, renderer=pydoc.plaintext)\n"
        f"assert all(name in text for name in {NAMES!r})\n"
        "try:\n    crl_exp.lode_run\nexcept AttributeError as error:\n    print(error)\n"
    )
    assert fresh(program) == "module 'crl_exp' has no attribute 'lode_run'\n"


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse((ROOT / "crl_exp" / "__init__.pyi").read_text())
    said = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert said == crl_exp._HOMES
    (listed,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(listed) == sorted(crl_exp.__all__)
    assert (ROOT / "crl_exp" / "py.typed").exists()


# --- compose ---


def test_a_config_is_composed_as_the_command_line_does():
    typed = ["+debug=tiny", "method=corrsteer_s", "seed=3"]
    ours = crl_exp.compose(typed)
    assert "hydra" not in ours and run_key(ours) == run_key(composed(typed))
    assert OmegaConf.to_container(ours) == OmegaConf.to_container(composed(typed))


def test_ones_own_files_come_first_and_are_read_anew(tmp_path):
    file = tmp_path / "task" / "tiny.yaml"
    file.parent.mkdir()
    shipped = (ROOT / "conf" / "task" / "tiny.yaml").read_text()
    for n in (5, 7):  # the second time it was edited
        file.write_text(shipped.replace("n_test: ", f"n_test: {n} # "))
        assert crl_exp.compose(["task=tiny"], config_dir=tmp_path).task.n_test == n
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "_target_: crl_exp.steering.methods.base.NoSteering\nname: mine\n"
    )
    assert crl_exp.compose(["method=mine"], tmp_path).method.name == "mine"
    with pytest.raises(UserError, match="method/mine"):
        crl_exp.compose(["method=mine"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task.n_tst=3"], "did you mean 'task.n_test'"),
        (["method=corrster_s"], "did you mean 'corrsteer_s'"),
        (["mask=null"], "GROUP=NAME"),
        (["+sweep=demo"], r"\+sweep=demo is many runs: `crl-exp launch -m \+sweep=demo`"),
        (["sweep_name=2024_11_29"], "a text is meant"),
        ("method=none", r"give a list of texts, as in \['method=none'\]"),
    ],
)
def test_a_fault_is_the_users_to_mend(overrides, said):
    with pytest.raises(UserError, match=said):
        crl_exp.compose(overrides)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config_dir=.*/no: there is no such folder"):
        crl_exp.compose([], config_dir=tmp_path / "no")


FOREIGN = """
import os, sys
from dataclasses import dataclass
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
import crl_exp

@dataclass
class Mine:
    a: int = 1

ConfigStore.instance().store(name="schema", node=Mine)
OmegaConf.register_new_resolver("now", lambda: "mine", replace=True)

def world():
    return (
        id(GlobalHydra.instance()), HydraConfig.get().job.name, dict(os.environ),
        OmegaConf.get_type(ConfigStore.instance().load("schema.yaml").node),
        sorted(ConfigStore.instance().repo), sorted(ConfigStore.instance().repo["hydra"]),
        OmegaConf.create({"x": "${now:}"}).x, hydra.compose("schema").a, hydra.version.getbase(),
    )

@hydra.main(version_base="1.2", config_path=None, config_name="schema")
def main(config):
    os.environ["MINE"] = "1"
    OmegaConf.register_new_resolver("now", lambda: "mine", replace=True)
    before = world()
    ours = crl_exp.compose(["+debug=tiny", "method=corrsteer_s", "task.n_train=12", "task.n_test=4",
                            "task.n_validation=4", "layers.layer=2"])
    assert world() == before
    result = crl_exp.run(ours)
    assert world() == before
    run = crl_exp.load_run(f"outputs/tiny/single/{result['run_key']}")
    answers = run.generate(["What is 1 + 1?"])
    assert world() == before
    try:
        crl_exp.compose(["task.n_tst=3"])
    except ValueError as error:
        assert "did you mean" in str(error)
    assert world() == before and config.a == 2
    print("answers", len(answers), "n", result["n"])

main()
"""


@pytest.mark.slow
def test_another_hydra_application_keeps_its_own_world(tmp_path):
    (tmp_path / "app.py").write_text(FOREIGN)
    done = subprocess.run(
        [sys.executable, "app.py", "a=2", "hydra.run.dir=.", "hydra.output_subdir=null"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CRL_EXP_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["answers 1 n 4"], done.stdout + done.stderr


def test_it_works_inside_of_initialize(tmp_path):
    """As a notebook has it: Hydra is initialised, and goes on being so."""
    from hydra import compose, initialize_config_dir

    (tmp_path / "mine.yaml").write_text("b: 4\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert crl_exp.compose(["seed=5"]).seed == 5
        assert compose("mine").b == 4
        with pytest.raises(UserError):
            crl_exp.compose(["sede=5"])
        assert compose("mine").b == 4


# --- loading ---


def test_task_model_and_saes_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("CRL_EXP_CACHE", str(tmp_path))
    config = crl_exp.compose(["+debug=tiny", "layers=list", "layers.layers=[3,7]"])
    before = OmegaConf.to_yaml(config)
    lm, saes = crl_exp.load_model(config), crl_exp.load_saes(config)
    assert sorted(saes) == [3, 7] and lm.n_layers == 24
    assert sorted(crl_exp.load_saes(config, [0])) == [0]
    task = crl_exp.load_task(config)
    items = task.splits().test
    assert len(items) == config.task.n_test and task.score(items[:1], [items[0].target])[0].reward
    x_ND = crl_exp.read_activations(lm, [item.user for item in items], [3])[3]
    assert saes[3].encode(x_ND).shape == (len(items), saes[3].d_sae)
    random = crl_exp.compose(["+debug=tiny", "layers.layer=3", "sae.dictionary=random"])
    assert not (crl_exp.load_saes(random)[3].W_dec_FD == saes[3].W_dec_FD).any()
    assert OmegaConf.to_yaml(config) == before, "the config is the caller's"
    with pytest.raises(UserError, match="layers=single"):
        crl_exp.load_saes(crl_exp.compose(["+debug=tiny", "layers.layer=99"]))


def test_a_finished_run_is_read_and_one_that_is_left_alone_says_so(tmp_path, tiny_files):
    typed = [*tiny_files.overrides(), "method=none", "layers.layer=1", f"output_dir={tmp_path}",
             "task.n_train=8", "task.n_validation=4", "task.n_test=8"]  # fmt: skip
    config = crl_exp.compose(typed)
    first = crl_exp.run(config)
    assert crl_exp.run(config) == json.loads(
        (tmp_path / "single" / first["run_key"] / "result.json").read_text()
    )
    with pytest.raises(UserError, match="is left alone"):
        crl_exp.run(crl_exp.compose([*typed, "resume=retry"]))
