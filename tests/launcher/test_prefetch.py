"""`python -m crl_exp prefetch`: every thing of a sweep once, and what can't be had named."""

from __future__ import annotations

import shutil

import datasets.config
import pytest

from crl_exp.launcher.commands.prefetch import main


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_what_lies_on_disk_is_looked_at_once(capsys):
    assert main(["+sweep=layerwise", "+debug=tiny", "layers.layer=8,12", "seed=0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = sorted(line.split(":")[0] for line in lines)
    assert kinds == [
        f"SAEs tiny, layers {[*range(24)]}", "SAEs tiny, layers [12]", "SAEs tiny, layers [8]",
        "model tiny-llama", "task tiny (choice(yes|no))",
    ]  # fmt: skip
    assert all("on disk" in line for line in lines if not line.startswith("task"))


def test_all_that_cannot_be_had_is_named(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    models = "model.path=nobody/model-a,nobody/model-b"
    assert main(["+debug=tiny", "task=gsm8k,tiny", models, "method=none", "seed=0,1"]) == 1
    said = capsys.readouterr().out
    for missing in ("model.path=nobody/model-a", "model.path=nobody/model-b"):
        assert said.count(f"missing: {missing}: the hub can't be reached") == 1
    assert said.count("missing: task.hub_id=openai/gsm8k: can't load") == 1
    assert said.count("missing:") == 3
    assert "task tiny" in said, "what can be had is fetched all the same"


def test_weights_that_are_missing_are_named(capsys, tiny_files, tmp_path):
    shutil.copytree(tiny_files.root, tmp_path / "files")
    next((tmp_path / "files" / "saes").glob("*.2.*/*.safetensors")).unlink()
    own = type(tiny_files)(tmp_path / "files")
    assert main([*own.overrides(), "layers.layer=1,2", "method=none"]) == 1
    said = capsys.readouterr().out
    assert "no weights for the layers [2]" in said and "layers [1]: on disk" in said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["+sweep=layerwse"], "did you mean 'layerwise'"),
        (["+debug=tiny", "task.n_trian=8"], "did you mean 'task.n_train'"),
        (["+debug=tiny", "task.n_test=0"], "task.n_test=0"),
    ],
)
def test_a_slip_ends_with_one_message(overrides, says):
    """No traceback: it is what the process ends with."""
    with pytest.raises(SystemExit) as ended:
        main(overrides)
    assert isinstance(ended.value.code, str) and says in ended.value.code
