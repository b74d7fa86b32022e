"""What runs of one process share, and what makes way for the next."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from crl_exp.config import kept
from crl_exp.config.errors import UserError
from crl_exp.experiments import shared as loaded
from crl_exp.experiments import workspace_setup as lab_setup
from crl_exp.saes import layer_sae as saes
from crl_exp.saes.config import SAEConfig
from tests.helpers import tiny
from tests.helpers.tiny_run import run_small
from tests.helpers.tiny_steering import random_sae


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch) -> None:
    monkeypatch.setattr(kept, "LOADED", {})


def test_another_model_is_loaded_once_the_last_ones_things_are_gone(
    tiny_files, tmp_path, monkeypatch
) -> None:
    models, load = [], lab_setup.load_model

    def counted(config):
        gc.collect()
        assert [kind for kind in ("model", "sae", "prompts") if kept.LOADED.get(kind)] == []
        assert all(model() is None for model in models)
        lm = load(config)
        models.append(weakref.ref(lm))
        return lm

    monkeypatch.setattr(lab_setup, "load_model", counted)
    for kind, seed in (("llama", 0), ("llama", 1), ("gemma2", 0)):
        run_small([*tiny_files.overrides(kind), f"output_dir={tmp_path}", f"seed={seed}"])
    assert len(models) == 2, "runs of one model share it"


def test_saes_that_nobody_uses_are_kept_as_far_as_they_fit(monkeypatch) -> None:
    made: list[int] = []

    def get(layer: int):
        def make():
            made.append(layer)
            return random_sae(layer, tiny.D_MODEL)

        return loaded.shared_sae(layer, make)

    nbytes = random_sae(0, tiny.D_MODEL).nbytes
    assert nbytes == sum(t.nbytes for t in random_sae(0, tiny.D_MODEL).sae.state_dict().values())
    monkeypatch.setattr(loaded, "SAE_BYTES", 2 * nbytes)
    used = get(0)
    for layer in (1, 2, 3):
        get(layer)
    gc.collect()
    assert get(3) is get(3) and get(2) is get(2) and made == [0, 1, 2, 3]
    get(1)
    assert made == [0, 1, 2, 3, 1], "it had to make way"
    assert get(0) is used and made == [0, 1, 2, 3, 1], "somebody uses it"


def test_a_full_gpu_is_not_taken_for_a_damaged_file(monkeypatch) -> None:
    import sae_lens

    config = SAEConfig("x", "folder", None, "blocks.{layer}.hook_resid_post", False, "sae")
    for error, expected in (
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("shapes"), UserError),
    ):

        def load(*_words, error=error, **_more):
            raise error

        monkeypatch.setattr(sae_lens.SAE, "load_from_disk", load)
        with pytest.raises(expected):
            saes.load_saes(replace(config), [1], 8, "x", "cpu")
