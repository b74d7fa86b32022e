"""`hydra.launcher.mem=auto`: what is asked of SLURM for a model, before its weights are there."""

from __future__ import annotations

import pytest

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.planning.memory import gpu_lines, memory_lines
from crl_exp.launcher.planning.plan import compose_points
from tests.helpers.launching import settings

GEMMA = ("model=gemma2_2b_it", "sae=gemma_scope_2b_res", "method=none", "layers.layer=12")


def asked(tmp_path, *overrides: str, **launcher):
    values = {"mem": "auto", **launcher}
    with typed_sweep([f"output_dir={tmp_path}", *overrides]) as (loader, master, jobs):
        return compose_points(loader, master, jobs, settings("slurm", **values))


def test_it_follows_the_model_the_device_and_the_pack(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    # 4.9 GiB of weights, .3 of the SAE; 8 beside them on a GPU's host.
    (point,) = asked(tmp_path, *GEMMA)
    assert point.settings.mem == "16GB"
    (line,) = memory_lines([(point.config, point.settings)])
    assert "16GB of each job: 2.61 billion parameters (the model's card) × 2 bytes" in line
    # On the CPU twice the bytes, 4 beside and the kept prompts' 12: 26.
    (point,) = asked(tmp_path, *GEMMA, "model.device=cpu", "model.dtype=float32")
    assert point.settings.mem == "28GB"
    (point,) = asked(tmp_path, *GEMMA, pack=16)  # half a GiB for each other run
    assert point.settings.mem == "24GB"


def test_points_of_a_sweep_get_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    models = ("model=gemma2_2b_it,llama31_8b_it", "sae=none", "method=none")
    assert [point.settings.mem for point in asked(tmp_path, *models)] == ["16GB", "24GB"]


def test_a_number_is_taken_as_it_is(tmp_path):
    assert [point.settings.mem for point in asked(tmp_path, *GEMMA, mem="7GB")] == ["7GB"]


def test_an_unknown_model_is_refused_with_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"how large model.path=nobody/x is.*mem=32GB"):
        asked(tmp_path, "model=hf", "model.path=nobody/x", "sae=none", "method=none")


SPREAD = ("model=gemma2_27b", "sae=none", "method=none", "model.device_map=auto")
ONE_SAE = (*SPREAD[:1], "sae=gemma_scope_27b_res", "layers.layer=22", "model.device_map=auto")


@pytest.mark.parametrize(
    ("overrides", "gib", "gpus"),
    # 50.7 GiB of weights over nine tenths of each less 2 GiB; an SAE of 4.6 GiB lies on one.
    [(SPREAD, 80, 1), (SPREAD, 40, 2), (SPREAD, 24, 3), (ONE_SAE, 24, 4)],
)
def test_a_spread_model_asks_for_as_many_gpus_as_it_needs(
    overrides, gib, gpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (point,) = asked(tmp_path, *overrides, gpu_gib=gib)
    assert point.settings.gpus == gpus
    (line,) = gpu_lines([(point.config, point.settings)])
    assert f"{gpus} GPUs of {gib} GiB for each job: 27.2 billion parameters" in line


def test_gpus_that_are_given_or_named_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert asked(tmp_path, *SPREAD, gpus=4)[0].settings.gpus == 4
    assert asked(tmp_path, *SPREAD, gres="gpu:a100:2")[0].settings.gpus_asked == 2
    named = (*SPREAD[:3], "model.device_map={model:0,lm_head:2}")
    assert asked(tmp_path, *named)[0].settings.gpus == 3
    assert asked(tmp_path, *SPREAD[:3])[0].settings.gpus == 1


@pytest.mark.parametrize(
    ("overrides", "gib", "said"),
    [
        (SPREAD, None, r"over how many GPUs.*gpus=2.*gpu_gib=80"),
        (ONE_SAE, 7, r"the SAEs \(4\.6 GiB\).*steer fewer layers"),
        (("model=hf", "model.path=nobody/x", *SPREAD[1:], "model.device=cuda"), 80, "gpus=2"),
    ],
)
def test_a_number_of_gpus_that_nothing_tells_is_refused(
    overrides, gib, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=said):
        asked(tmp_path, *overrides, gpu_gib=gib)
