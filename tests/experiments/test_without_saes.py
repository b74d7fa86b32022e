"""`sae=none`: what works with residuals needs no SAE, and gets the same with and without."""

from __future__ import annotations

import numpy as np
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import experiment, validate
from crl_exp.runs.items import item_rewards
from crl_exp.runs.records import Record
from tests.helpers.tiny_run import lab_of, quickly_composed, run_small, small


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path}"]


def without(common: list[str]) -> list[str]:
    return [*[one for one in common if not one.startswith("sae.")], "sae=none"]


@pytest.mark.parametrize(
    "method",
    [["probe"], ["probe_steering"], ["lora", "method.rank=2"], ["none"],
     ["raw_residual", "method.norm_match=false"]],
    ids=lambda method: method[0],
)  # fmt: skip
def test_the_same_answers_with_saes_and_without(method, common):
    asked = [f"method={method[0]}", *method[1:], "layers=single", "layers.layer=1"]
    (with_result, with_saes), (without_result, no_saes) = (
        run_small([*given, *asked]) for given in (common, without(common))
    )
    mine, theirs = (item_rewards(Record(path)) for path in (with_saes, no_saes))
    np.testing.assert_array_equal(mine.steered, theirs.steered)
    assert with_result["accuracy_steered"] == without_result["accuracy_steered"]
    assert without_result["sae"] == "none" and without_result["layers"] == [1]


def test_every_layer_can_be_read_where_only_some_have_an_sae(common):
    """The tiny model has four layers; three have SAEs."""
    assert validate(experiment(small([*common, "method=probe", "layers=every"]))) == [0, 1, 2, 3]
    assert validate(experiment(small([*common, "method=probe", "layers=all"]))) == [0, 1, 2]
    assert validate(experiment(small([*without(common), "method=probe", "layers=all"]))) == [
        0, 1, 2, 3,
    ]  # fmt: skip
    for method in ("crl", "raw_residual"):  # the second has stage 1 beside it, where SAEs are
        with pytest.raises(UserError, match="layer 3 has no SAE"):
            validate(experiment(small([*common, f"method={method}", "layers=every"])))


def test_a_layer_is_read_at_its_saes_site_where_it_has_one(tmp_path, tiny_files, common):
    from tests.helpers.tiny_run import random_sae_weights, save_sae

    save_sae(tmp_path / "pre", 1, random_sae_weights(1), point="pre")
    own = [
        *common, f"sae.folder={tmp_path / 'pre'}", "method=probe", "layers=every",
        'sae.id_template="blocks.{layer}.hook_resid_pre"',
    ]  # fmt: skip
    assert lab_of(own).sites == {0: 0, 1: 0, 2: 2, 3: 3}


@pytest.mark.parametrize(
    "method",
    [["crl"], ["corrsteer_s"], ["attribution"], ["lora"],
     ["raw_residual", "method.norm_match=true"]],
    ids=lambda method: method[0],
)  # fmt: skip
def test_methods_that_need_features_say_so(method, common):
    with pytest.raises(UserError) as caught:
        validate(experiment(small([*without(common), f"method={method[0]}", *method[1:]])))
    assert f"method={method[0]} needs SAEs with these options" in str(caught.value)


def test_an_sae_called_none_is_refused():
    with pytest.raises(UserError, match=r"sae\.name=none means that there is none"):
        experiment(quickly_composed(["sae.name=none"]))
