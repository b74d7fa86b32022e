"""`read_activations` against the model run plainly: one text at a time, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, GraniteConfig, GraniteForCausalLM

from crl_exp.config.errors import UserError
from crl_exp.models.activations import forward, padded, read_activations
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import SITES, hooks
from tests.helpers import tiny

KINDS = ("llama", "gemma2", "gpt2", "gpt_neox", "qwen3")
LAYERS = range(tiny.N_LAYERS)
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=KINDS)
def lm(request) -> LanguageModel:
    return tiny.language_model(request.param)


@torch.no_grad()
def plainly(lm: LanguageModel, ids: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    """Residuals [T, D] by site and layer, from transformers' own list of hidden states and, as that
    has the last one behind the final norm, a hook on the last layer."""
    last: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        last.append(output[0] if isinstance(output, tuple) else output)

    handle = lm.layers[-1].register_forward_hook(keep)
    out = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    handle.remove()
    before = [hidden[0] for hidden in out.hidden_states[: tiny.N_LAYERS]]
    found = {("resid_pre", layer): before[layer] for layer in LAYERS}
    behind = [*before[1:], last[0].reshape(before[0].shape)]
    return found | {("resid_post", layer): behind[layer] for layer in LAYERS}


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_residuals_are_the_models_own(lm, site):
    """Texts of 5 to 17 tokens; Gemma-2's window is 6."""
    texts = tiny.prompts(7)
    alone = [plainly(lm, ids) for ids in texts]
    everything = read_activations(lm, texts, LAYERS, site, positions="all", batch_size=3)
    last = read_activations(lm, texts, LAYERS, site, batch_size=3)
    for layer in LAYERS:
        assert everything[layer].shape == (7, max(map(len, texts)), lm.d_model)
        for i, ids in enumerate(texts):
            want_TD = alone[i][site, layer]
            torch.testing.assert_close(everything[layer][i, : len(ids)], want_TD, **NEAR)
            assert everything[layer][i, len(ids) :].isnan().all()
            torch.testing.assert_close(last[layer][i], want_TD[-1], **NEAR)


def test_what_a_layer_adds_is_what_its_output_has_more_than_its_input(lm):
    texts = tiny.prompts(5, seed=1)
    read = {site: read_activations(lm, texts, LAYERS, site) for site in SITES}
    for layer in LAYERS:
        added = read["resid_post"][layer] - read["resid_pre"][layer]
        parts = read["attn_out"][layer] + read["mlp_out"][layer]
        torch.testing.assert_close(parts, added, **NEAR)
        assert read["attn_out"][layer].norm() > 0 and read["mlp_out"][layer].norm() > 0


def test_what_is_put_at_a_site_goes_on(lm):
    """By its name too: a layer whose two additions are put to 0 hands its input on."""
    ids_BT, lengths_B = padded(tiny.prompts(3, seed=4))
    seen: dict = {}
    edits = {(1, name): torch.zeros_like for name in ("attn_out", "mlp_out")}
    reads = {site: (lambda x_BTD, site=site: seen.update({site: x_BTD})) for site in (0, 1)}
    changed_BTD = forward(lm, ids_BT, lengths_B, see={**edits, **reads})
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert not torch.equal(changed_BTD, forward(lm, ids_BT, lengths_B))


@torch.no_grad()
def test_behind_a_cache_it_is_as_if_all_were_read(lm):
    """What the rows begin with is read once; Gemma-2's window is 6."""
    opening, ends = [7, 8, 9, 10, 11], [[12, 13], [14], [15, 16, 17, 18]]
    cache = DynamicCache()
    forward(lm, *padded([opening] * len(ends)), cache=cache)
    ids_BT, lengths_B = padded(ends)
    found_BTD = forward(lm, ids_BT, lengths_B, cache, start=len(opening))
    for row, end in enumerate(ends):
        whole_1TD = forward(lm, *padded([[*opening, *end]]))
        torch.testing.assert_close(found_BTD[row, : len(end)], whole_1TD[0, len(opening) :], **NEAR)


def test_hooks_go_where_the_block_fails(lm):
    def count() -> int:  # transformers may have set some of its own
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in lm.model.modules()
        )

    def fail() -> None:
        raise RuntimeError(f"{count() - before} hooks are there")

    before = count()
    sites = {-1: torch.zeros_like, 1: torch.zeros_like, (1, "mlp_out"): torch.zeros_like}
    with pytest.raises(RuntimeError, match="3 hooks are there"), hooks(lm, sites):
        fail()
    assert count() == before


def test_the_attention_is_what_is_left_when_the_mlp_adds_nothing(lm):
    """The two could be mixed up, and their sum would be right all the same."""
    texts = tiny.prompts(4, seed=2)
    attention = read_activations(lm, texts, [1], "attn_out")[1]
    block = lm.layers[1]
    silent = getattr(block, "post_feedforward_layernorm", None) or block.mlp
    handle = silent.register_forward_hook(lambda _module, _inputs, output: output * 0)
    try:
        # A parallel or sequential layer: without its MLP the layer adds its attention alone.
        before = read_activations(lm, texts, [1], "resid_pre")[1]
        behind = read_activations(lm, texts, [1], "resid_post")[1]
    finally:
        handle.remove()
    torch.testing.assert_close(behind - before, attention, **NEAR)


def test_a_text_is_read_as_its_tokens_and_the_batch_changes_nothing():
    lm = tiny.language_model("llama")
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
    ids = [lm.tokenizer(text)["input_ids"] for text in texts]
    together = read_activations(lm, texts, [0, 3])
    assert list(together) == [0, 3] and together[0].dtype == torch.float32
    for layer in (0, 3):
        torch.testing.assert_close(read_activations(lm, ids, [layer])[layer], together[layer])
        for i, text in enumerate(texts):
            alone = read_activations(lm, [text], [layer], batch_size=1)[layer][0]
            torch.testing.assert_close(alone, together[layer][i], **NEAR)


def test_no_hook_is_left_behind():
    lm = tiny.language_model("gemma2")
    for site in SITES:
        read_activations(lm, ["w1 w2"], LAYERS, site)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


def test_a_layer_that_adds_otherwise_is_refused_by_name():
    """Granite multiplies what it adds."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        residual_multiplier=0.5,
    )  # fmt: skip
    lm = LanguageModel(GraniteForCausalLM(config), tiny.tokenizer(), "tiny-granite")
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(UserError, match=r"layer 1 of tiny-granite \(Granite.*resid_post"):
            read_activations(lm, ["w1 w2 w3"], [1], site)
    assert read_activations(lm, ["w1 w2 w3"], [1])[1].shape == (1, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hook_name": "resid_pots"}, "resid_pots.*did you mean 'resid_post'"),
        ({"positions": "first"}, "positions='first'.*last, all"),
        ({"layers": [1, 4]}, r"layers=\[4\]: tiny-llama has layers 0 to 3"),
        ({"layers": []}, "nothing to read"),
        ({"texts": []}, "nothing to read"),
        ({"texts": [[7], []]}, "text 1 has no token"),
        ({"texts": [[7] * 129]}, "129 tokens, but tiny-llama takes 128"),
    ],
)
def test_what_cannot_be_read_is_named(given, said):
    lm = tiny.language_model("llama")
    asked: dict[str, Any] = {"texts": ["w1"], "layers": [0], **given}
    with pytest.raises(UserError, match=said):
        read_activations(lm, **asked)


def test_half_precision_is_measured_by_its_own_rounding():
    lm = tiny.language_model("llama")
    exact = read_activations(lm, tiny.prompts(3), [2], "mlp_out")[2]
    halved = torch.nn.Module.to(tiny.model("llama"), torch.bfloat16)
    half = LanguageModel(halved, tiny.tokenizer(), "tiny-llama")
    rounded = read_activations(half, tiny.prompts(3), [2], "mlp_out")[2]
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_one_text_is_no_list_of_texts():
    with pytest.raises(UserError, match="texts is one text"):
        read_activations(tiny.language_model("llama"), "w1 w2", [0])
