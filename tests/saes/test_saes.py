"""SAEs: the published ones that the configs name, their metadata, sites, and normalisation."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.saes.config import SAEConfig
from crl_exp.saes.layer_sae import load_saes
from crl_exp.saes.metadata import SAEMetadata, relation
from tests.helpers import tiny
from tests.helpers.tiny_run import CONF, LAYERS, lab_of, random_sae_weights, run_small, save_sae

PUBLISHED = {
    "gemma_scope_2b_res": range(26),
    "gemma_scope_2b_res_65k": range(26),
    "gemma_scope_9b_it_res": (9, 20, 31),
    "llama_scope_res_8x": range(32),
    "llama_scope_res_32x": range(32),
    "llama31_8b_it": (3, 7, 11, 15, 19, 23, 27),
    "gemma_scope_27b_res": [10, 22, 34],
    "gemma_scope2_270m_it_res": [5, 9, 12, 15],
    "gemma_scope2_1b_it_res": [7, 13, 17, 22],
    "gemma_scope2_4b_it_res": [9, 17, 22, 29],
    "qwen_scope_1_7b_res": range(28),
    "qwen_scope_8b_res": range(36),
    "gpt2_res_jb": range(12),
}


def option(name: str, **changes) -> SAEConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "sae" / f"{name}.yaml"))
    return SAEConfig(**{**values, **changes})  # type: ignore[dict-item]


# --- published releases, from SAELens' own directory; no hub is asked ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_template_names_every_layer(name):
    config = option(name)
    assert config.faults() == [] and config.available == list(PUBLISHED[name])
    published = config._published()
    for layer in config.available:
        assert config.sae_id(layer) in published.saes_map
        page = published.neuronpedia_id[config.sae_id(layer)]
        assert page is None or f"/{layer}-" in page


def test_every_option_with_a_release_is_listed_here():
    files = (CONF / "sae").glob("*.yaml")
    options = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in files}
    named = {name for name, values in options.items() if values["folder"] is None}  # type: ignore[index, call-overload]
    assert named - {"release", "none"} == set(PUBLISHED)


PRESETS = sorted(path.stem for path in (CONF / "preset").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_saes_are_of_its_model(name):
    """Or of the base model of its instruction-tuned one."""
    picked = OmegaConf.load(CONF / "preset" / f"{name}.yaml").defaults
    chosen = {key.removeprefix("override /"): one for pair in picked for key, one in pair.items()}
    model = OmegaConf.load(CONF / "model" / f"{chosen['model']}.yaml")
    sae = option(chosen["sae"])
    if not sae.absent:
        assert relation(sae._published().model, model.name) in ("same", "tuned")


@pytest.mark.parametrize(
    "release",
    ["mwhanna-qwen3-4b-transcoders", "gemma-scope-2-1b-it-transcoders-all",
     "gemma-scope-2b-pt-transcoders"],
)  # fmt: skip
def test_transcoders_are_refused_by_name(release):
    with pytest.raises(UserError, match=f"sae.release={release}: holds transcoders, .* sae=none"):
        _ = option("release", release=release, id_template="layer_{layer}").available


def test_metadata_comes_without_the_hub_where_saelens_knows_it():
    found = option("gemma_scope_2b_res").metadata(12)
    assert found == SAEMetadata(
        d_in=2304, d_sae=16384, hook_name="blocks.12.hook_resid_post", model_name="gemma-2-2b",
        normalization=None, centered=False, neuronpedia_id="gemma-2-2b/12-gemmascope-res-16k",
    )  # fmt: skip
    assert found.warnings(12, "gemma-2-2b") == []
    assert (
        "trained on gemma-2-2b, but steers gemma-2-2b-it" in found.warnings(12, "gemma-2-2b-it")[0]
    )


def test_faults_of_a_published_sae():
    config = option("gemma_scope_2b_res")
    assert config.metadata_faults(12, 2304, "gemma-2-2b-it") == []
    (width,) = config.metadata_faults(12, 576, "gemma-2-2b")
    assert "d_in=2304" in width and "576 wide" in width
    (model,) = config.metadata_faults(12, 2304, "SmolLM2-135M-Instruct")
    assert "was trained on gemma-2-2b" in model and "sae.other_model=true" in model
    assert option("gemma_scope_2b_res", other_model=True).metadata_faults(12, 2304, "mine") == []


@pytest.mark.parametrize(
    ("trained_on", "used_on", "expected"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", "same"),
        ("meta-llama/Llama-3.1-8B", "Meta-Llama-3.1-8B", "same"),
        ("llama3.1-8b", "Llama-3.1-8B", "same"),
        (None, "anything", "same"),
        ("gemma-2-2b", "gemma-2-2b-it", "tuned"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B-Instruct", "tuned"),
        ("Llama-3.1-8B-Instruct", "Llama-3.1-8B", "tuned"),
        ("gemma-2-2b", "gemma-2-9b", "other"),
        ("gemma-2-9b-it", "gemma-2-2b-it", "other"),
        ("gemma-2-2b", "gemma-2b", "other"),
        ("gpt2-small", "gpt2-medium", "other"),
    ],
)
def test_names_of_models(trained_on, used_on, expected):
    assert relation(trained_on, used_on) == expected


def test_an_unreachable_hub_names_the_repository_and_the_way_without(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = option("llama_scope_res_8x")
    (said,) = config.metadata_faults(3, 4096, "Llama-3.1-8B")
    assert "can't be reached for fnlp/Llama3_1-8B-Base-LXR-8x" in said
    assert "sae=disk sae.folder=/that/folder" in said
    with pytest.raises(UserError, match="fnlp/Llama3_1-8B-Base-LXR-8x"):
        load_saes(config, [3], 4096, "Llama-3.1-8B", "cpu")


# --- sites ---


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["corrsteer_a", "crl", "raw_residual"])
def test_saes_of_layer_inputs_go_the_whole_way(kind, method, tiny_files, tmp_path):
    """Layer 0's input, the embedding, included."""
    for layer in LAYERS:
        save_sae(tmp_path / "pre", layer, random_sae_weights(layer), point="pre")
    overrides = [*tiny_files.overrides(kind), f"sae.folder={tmp_path / 'pre'}", "layers=all",
                 "sae.id_template=blocks.{layer}.hook_resid_pre", f"method={method}",
                 f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    workspace = lab_of(_quoted(overrides))
    assert {layer: sae.site for layer, sae in workspace.saes.items()} == {0: -1, 1: 0, 2: 1}
    result, _ = run_small(_quoted(overrides))
    assert result["layers"] == [0, 1, 2] and result["n"] == 16


def _quoted(overrides: list[str]) -> list[str]:
    """Hydra takes a brace in a value only within quotes."""
    return [
        f'{key}="{value}"' if "{" in value else f"{key}={value}"
        for key, value in (o.split("=", 1) for o in overrides)
    ]


def test_a_layers_input_is_the_output_of_the_one_below(tiny_files, tmp_path):
    """The same SAE said to be at layer 1's output and at layer 2's input: equal statistics."""
    weights = random_sae_weights(7)
    save_sae(tmp_path / "saes", 1, weights, point="post")
    save_sae(tmp_path / "saes", 2, weights, point="pre")
    save_sae(tmp_path / "saes", 0, weights, point="pre")
    found = {}
    for layer, point in ((1, "post"), (2, "pre"), (0, "pre")):
        overrides = [*tiny_files.overrides(), f"sae.folder={tmp_path / 'saes'}",
                     f"sae.id_template=blocks.{{layer}}.hook_resid_{point}",
                     f"layers.layer={layer}", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
        workspace = lab_of(_quoted(overrides))
        found[layer, point] = workspace.statistics()[layer]
        if point == "pre" and layer == 0:
            ids = torch.tensor(
                [workspace.lm.prompt_ids(item.user, True)[-1] for item in workspace.splits.train]
            )
            embedded_BD = workspace.lm.decoder.get_input_embeddings()(ids)  # type: ignore[operator]
            mean_D = embedded_BD.double().mean(0)
            torch.testing.assert_close(found[0, "pre"].mean_D, mean_D, atol=1e-6, rtol=1e-5)
    post, pre = found[1, "post"], found[2, "pre"]
    torch.testing.assert_close(post.mean_D, pre.mean_D)
    for name, values_F in post.by_feature.items():
        torch.testing.assert_close(values_F, pre.by_feature[name])


# --- what is done to the input before it is encoded ---


def loaded(tmp_path, **more):
    save_sae(tmp_path / "s", 1, random_sae_weights(3), **more)
    config = SAEConfig(
        "s", str(tmp_path / "s"), None, "blocks.{layer}.hook_resid_post", False, "sae"
    )
    return load_saes(config, [1], tiny.D_MODEL, "tiny", "cpu")[1]


X_BD = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(5)) + 2.0


def jumprelu(x_BD: torch.Tensor, weights: dict) -> torch.Tensor:
    pre_BF = x_BD @ weights["W_enc"] + weights["b_enc"]
    return torch.where(pre_BF > weights["threshold"], pre_BF.relu(), 0.0)


@pytest.mark.parametrize("subtracts", [True, False])
def test_b_dec_is_taken_from_the_input_where_the_sae_says_so(subtracts, tmp_path):
    weights = random_sae_weights(3)
    sae = loaded(tmp_path, apply_b_dec_to_input=subtracts)
    by_hand = jumprelu(X_BD - weights["b_dec"] if subtracts else X_BD, weights)
    torch.testing.assert_close(sae.encode(X_BD), by_hand)


def test_a_sae_of_a_centered_model_sees_the_residual_centered(tmp_path):
    plain = loaded(tmp_path / "a")
    said = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    centered = loaded(tmp_path / "b", said=said)
    assert centered.centered and not plain.centered
    x0_BD = X_BD - X_BD.mean(1, keepdim=True)
    torch.testing.assert_close(centered.encode(X_BD), plain.encode(x0_BD))
    assert not torch.allclose(plain.encode(X_BD), plain.encode(x0_BD))


def test_centering_the_residual_is_what_centering_the_writing_weights_does():
    """TransformerLens' center_writing_weights by hand, on a GPT-2: same logits, same residuals
    but for their mean."""
    lm, centered = tiny.language_model("gpt2"), tiny.language_model("gpt2")
    with torch.no_grad():
        head = lm.model.get_output_embeddings().weight.clone()  # type: ignore[operator]
        centered.model.lm_head.weight = torch.nn.Parameter(head)  # type: ignore[union-attr]
        for name, p in centered.decoder.named_parameters():
            if name in ("wte.weight", "wpe.weight") or ".c_proj." in name:
                p -= p.mean(-1, keepdim=True)
        ids = torch.tensor([[5, 9, 23, 40]])
        a = lm.model(ids, output_hidden_states=True)
        b = centered.model(ids, output_hidden_states=True)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
    for x, y in list(zip(a.hidden_states, b.hidden_states, strict=True))[:-1]:
        torch.testing.assert_close(x - x.mean(-1, keepdim=True), y, atol=1e-4, rtol=1e-4)


def test_a_normalisation_at_run_time_is_kept_and_recorded(tmp_path):
    sae = loaded(tmp_path, normalize_activations="layer_norm")
    centered_BD = X_BD - X_BD.mean(1, keepdim=True)
    weights = random_sae_weights(3)
    normal_BD = centered_BD / (centered_BD.std(1, keepdim=True) + 1e-5)
    by_hand = jumprelu(normal_BD - weights["b_dec"], weights)
    torch.testing.assert_close(sae.encode(X_BD), by_hand)
    assert any("normalises its input at run time (layer_norm)" in text for text in sae.warnings)


def test_a_scale_that_was_not_folded_in_is_refused(tiny_files, tmp_path):
    save_sae(
        tmp_path / "s", 1, random_sae_weights(3), normalize_activations="expected_average_only_in"
    )
    with pytest.raises(UserError, match="fold_activation_norm_scaling_factor"):
        run_small([*tiny_files.overrides(), f"sae.folder={tmp_path / 's'}",
                   f"output_dir={tmp_path / 'out'}"])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_llama_scopes_scale_is_folded_in_by_saelens():
    """So it is no fault, though the release's config says that its input is scaled."""
    config = option("llama_scope_res_8x")
    assert set(config._published().norm_scaling_factor) >= {config.sae_id(n) for n in range(32)}


def test_a_sae_that_names_no_model_is_recorded(tmp_path):
    sae = loaded(tmp_path, said={"model_name": None})
    assert any("doesn't say which model" in text for text in sae.warnings)


# --- links ---


def test_every_reported_feature_carries_its_link(tiny_files, tmp_path):
    for layer in LAYERS:
        save_sae(tmp_path / "s", layer, random_sae_weights(layer),
                 said={"neuronpedia_id": f"tiny/{layer}-res"})  # fmt: skip
    _, folder = run_small([*tiny_files.overrides(), f"sae.folder={tmp_path / 's'}", "layers=all",
                           "method=corrsteer_a", f"output_dir={tmp_path / 'out'}"])  # fmt: skip
    layers = json.loads((folder / "features.json").read_text())
    assert set(layers) == {"0", "1", "2"}
    for layer, found in layers.items():
        assert found["found"] and found["used"]
        for row in found["found"] + found["used"]:
            link = f"https://www.neuronpedia.org/tiny/{layer}-res/{row['feature']}"
            assert row["neuronpedia"] == link
