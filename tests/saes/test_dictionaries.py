"""Controls as free as CRL: the same SAE and policy, but other directions are added."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.generation.engine import Job
from crl_exp.saes.dictionaries import with_dictionary
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.policy import PolicyController
from tests.helpers.tiny_run import LAYERS, lab_of, random_sae_weights, run_small, save_sae
from tests.helpers.tiny_steering import random_sae

OTHERS = ("random", "permuted")


@pytest.fixture(scope="module")
def common(tiny_files, tmp_path_factory) -> list[str]:
    """Decoder rows from .5 to 3 long."""
    out = tmp_path_factory.mktemp("dictionaries")
    for layer in LAYERS:
        weights = random_sae_weights(layer)
        weights["W_dec"] *= torch.linspace(0.5, 3.0, len(weights["W_dec"]))[:, None]
        save_sae(out / "saes", layer, weights)
    return [
        *tiny_files.overrides(), f"sae.folder={out / 'saes'}", f"output_dir={out / 'out'}",
        "coefficient=mean_positive",
    ]  # fmt: skip


def uneven(layer: int = 1) -> LayerSAE:
    sae = random_sae(layer, 8)
    sae.sae.W_dec *= torch.linspace(0.5, 3.0, 16)[:, None]  # type: ignore[operator]
    return sae


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_are_others_of_the_same_lengths_and_all_else_is_the_saes(kind):
    sae, x_BD = uneven(), torch.randn(5, 8)
    other = with_dictionary(sae, kind, seed=3)
    torch.testing.assert_close(other.dec_norm_F, sae.dec_norm_F)
    assert not torch.allclose(other.W_dec_FD, sae.W_dec_FD, atol=0.1)
    assert torch.equal(other.encode(x_BD), sae.encode(x_BD))
    assert (other.layer, other.site, other.d_sae) == (sae.layer, sae.site, sae.d_sae)
    assert other.digest == sae.digest, "stage 1's statistics are the same"
    assert other.rows_digest != sae.rows_digest == sae.digest
    assert other.nbytes > sae.nbytes


def test_permuted_rows_are_the_saes_own_directions():
    sae = uneven()
    cosine_FF = torch.nn.functional.cosine_similarity(
        with_dictionary(sae, "permuted", 0).W_dec_FD[:, None], sae.W_dec_FD[None], dim=2
    )
    at_F = cosine_FF.argmax(dim=1)
    assert (cosine_FF.amax(dim=1) > 0.9999).all()
    assert sorted(at_F.tolist()) == list(range(16)) != at_F.tolist()


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_follow_seed_and_layer(kind):
    first = with_dictionary(uneven(1), kind, 0).W_dec_FD
    assert torch.equal(with_dictionary(uneven(1), kind, 0).W_dec_FD, first)
    for layer, seed in ((1, 1), (2, 0)):
        sae = uneven(layer)
        assert not torch.allclose(with_dictionary(sae, kind, seed).W_dec_FD, first, atol=0.1)


@pytest.mark.parametrize("kind", OTHERS)
def test_corrsteer_chooses_the_same_feature_and_adds_another_direction(kind, common):
    """The same coefficient, and an addition of the same length."""
    own = lab_of([*common, "method=corrsteer_s", "method.multipliers=[1]"])
    other = lab_of([*common, "method=corrsteer_s", "method.multipliers=[1]",
                    f"sae.dictionary={kind}"])  # fmt: skip
    ours, theirs = own.exp.method.select(own), other.exp.method.select(other)  # type: ignore[attr-defined]
    assert ours == theirs
    layer, feature = ours[0].layer, ours[0].feature_idx
    cosine = torch.nn.functional.cosine_similarity(
        own.saes[layer].W_dec_FD[feature], other.saes[layer].W_dec_FD[feature], dim=0
    )
    assert float(cosine) < 0.9


def test_runs_side_by_side_add_their_own_rows(common):
    """Controllers whose SAE is the same but for its rows, of two seeds, in one call."""
    labs = [
        lab_of([*common, "method=crl", f"sae.dictionary={kind}", f"seed={seed}"])
        for kind, seed in (("sae", 0), ("random", 0), ("random", 1), ("permuted", 0))
    ]
    assert len({id(workspace.saes[1].sae) for workspace in labs}) == 1, "the weights are there once"
    prompts = labs[0].prompts("test")
    fixed = [
        FixedFeatures([Steer(1, 3, 4.0)], workspace.saes, workspace.exp.decay) for workspace in labs
    ]
    policies = [
        PolicyController(workspace.exp.method.free_agents(workspace), workspace.exp.decay)  # type: ignore[attr-defined]
        for workspace in labs
    ]
    for controllers in (fixed, policies):
        jobs = [Job(one, range(6)) for one in controllers]
        played = labs[0].engine.generate(prompts, jobs, 1, labs[0].options, True)
        for workspace, generation in zip(labs, played, strict=True):
            (step,) = generation.steps
            rows_BD = workspace.saes[1].W_dec_FD[step.action.feature_idx_BK[:, 0]]
            expected_BD = rows_BD * step.action.coefficient_BK
            torch.testing.assert_close(step.action.delta_BD, expected_BD)


def test_a_choice_tried_with_one_dictionary_is_not_taken_for_anothers(common):
    strong = [Steer(1, feature, 60.0) for feature in range(8)]
    rewards = []
    for kind in ("sae", *OTHERS):
        workspace = lab_of([*common, "method=corrsteer_s", "task.n_validation=30",
                      f"sae.dictionary={kind}"])  # fmt: skip
        got = [workspace.validation_reward(workspace.fixed([one])) for one in strong]
        again = [
            float(workspace.answer(workspace.fixed([one]), "validation").reward_B.mean())
            for one in strong
        ]
        assert got == pytest.approx(again)
        rewards.append(got)
    assert rewards[0] != rewards[1] and rewards[0] != rewards[2]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_policy_is_trained_and_logged_with_it(kind, common):
    result, folder = run_small([*common, "method=crl", f"sae.dictionary={kind}"])
    assert (result["dictionary"], result["control"], result["label"]) == (kind, True, "CRL")
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    assert len(rows) == result["n"] and all(row["features"] for row in rows)
    found = json.loads((folder / "features.json").read_text())["1"]["found"]
    plain, other = run_small([*common, "method=crl"], skip_finished=True)
    assert (plain["dictionary"], plain["control"]) == ("sae", False)
    assert found == json.loads((other / "features.json").read_text())["1"]["found"]


def test_an_unknown_dictionary_is_named_with_the_nearest(common):
    from crl_exp.config.errors import UserError

    with pytest.raises(UserError, match=r"sae\.dictionary=permute: .*'permuted'"):
        lab_of([*common, "sae.dictionary=permute"])
