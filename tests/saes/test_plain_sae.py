"""SAEs that are read without SAELens, against SAELens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from crl_exp.config.errors import UserError
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.layer_sae import LayerSAE, load_saes
from crl_exp.saes.plain import PlainSAE, read_plain

SITE, D_IN, D_SAE = "blocks.1.hook_resid_post", 12, 40


def saved(folder: Path, kind: str = "jumprelu", **more) -> Path:
    """A random SAE as SAELens saves it; no bias or threshold is zero."""
    metadata = SAEMetadata(hook_name=SITE, model_name="tiny", **more.pop("said", {}))
    shape = {"d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **more}
    sae = {
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**shape)),
        "standard": lambda: StandardSAE(StandardSAEConfig(**shape)),
        "topk": lambda: TopKSAE(TopKSAEConfig(k=5, **shape)),
    }[kind]()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            random = torch.randn(tensor.shape, generator=draw)
            tensor.copy_(random.abs() if name == "threshold" else random)
    sae.save_model(folder / SITE)
    return folder / SITE


@pytest.mark.parametrize("kind", ["jumprelu", "standard"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_the_numbers_are_saelens_own(kind, subtracts, tmp_path):
    path = saved(tmp_path, kind, apply_b_dec_to_input=subtracts)
    plain, theirs = read_plain(path, "cpu"), SAE.load_from_disk(path, "cpu", "float32")
    assert plain is not None
    x_BD = 2 * torch.randn(100, D_IN, generator=torch.Generator().manual_seed(1))
    expected_BF = theirs.encode(x_BD)
    assert 0.1 < (expected_BF > 0).float().mean() < 0.9
    assert torch.equal(plain.encode(x_BD), expected_BF)
    assert torch.equal(plain.decode(expected_BF), theirs.decode(expected_BF))
    assert torch.equal(plain.process_sae_in(x_BD), theirs.process_sae_in(x_BD))
    assert plain.state_dict().keys() == theirs.state_dict().keys()
    ours_, theirs_ = LayerSAE(1, SITE, plain), LayerSAE(1, SITE, theirs)
    assert ours_.digest == theirs_.digest and ours_.nbytes == theirs_.nbytes
    few_C = torch.tensor([0, 7, 39])
    assert torch.equal(ours_.encoder(few_C)(x_BD), theirs_.encoder(few_C)(x_BD))


def test_weights_in_half_precision_are_read_as_saelens_reads_them(tmp_path):
    path = saved(tmp_path)
    weights = load_file(path / "sae_weights.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, path / "sae_weights.safetensors")
    plain, theirs = read_plain(path, "cpu"), SAE.load_from_disk(path, "cpu", "float32")
    assert plain is not None
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "topk"},
        {"normalize_activations": "layer_norm"},
        {"said": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
    ],
)
def test_another_sae_is_left_to_saelens(change, tmp_path):
    assert read_plain(saved(tmp_path, **change), "cpu") is None


def test_a_key_or_a_version_that_is_not_known_is_left_to_saelens(tmp_path):
    path = saved(tmp_path) / "cfg.json"
    whole = json.loads(path.read_text())
    for change in (
        {"scale_of_tomorrow": 2.0},
        {"metadata": {**whole["metadata"], "sae_lens_version": "7.0.0"}},
        {"metadata": {**whole["metadata"], "sae_lens_version": "5.9.1"}},
    ):
        path.write_text(json.dumps({**whole, **change}))
        assert read_plain(path.parent, "cpu") is None, change
    path.write_text("{")
    assert read_plain(path.parent, "cpu") is None


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    path = saved(tmp_path) / "sae_weights.safetensors"
    weights = load_file(path)
    save_file({**weights, "b_enc": weights["b_enc"][1:].contiguous()}, path)
    assert read_plain(path.parent, "cpu") is None
    config = SAEConfig("x", str(tmp_path), None, "blocks.{layer}.hook_resid_post", False, "sae")
    with pytest.raises(UserError, match=f"can't load the SAE of layer 1 from {path.parent}"):
        load_saes(config, [1], D_IN, "tiny", "cpu")


def test_a_run_takes_the_plain_one(tmp_path):
    saved(tmp_path)
    config = SAEConfig("x", str(tmp_path), None, "blocks.{layer}.hook_resid_post", False, "sae")
    (sae,) = load_saes(config, [1], D_IN, "tiny", "cpu").values()
    assert type(sae.sae) is PlainSAE
    assert not any(weight.requires_grad for weight in sae.sae.parameters())
