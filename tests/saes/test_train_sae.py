"""The SAE recipe: text, residuals, training, quality; and the SAEs that ship."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from crl_exp.config.errors import UserError
from crl_exp.saes.training.quality import (
    QualityConfig,
    ce_documents,
    cross_entropy,
    explained_variance,
)
from crl_exp.saes.training.residuals import (
    ResidualConfig,
    Residuals,
    collect,
    drop_outliers,
    norm_limits,
)
from crl_exp.saes.training.specialists import SpecialistConfig
from crl_exp.saes.training.text import (
    Document,
    HeldOut,
    TextConfig,
    chat_documents,
    plain_documents,
    split_documents,
)
from crl_exp.saes.training.train import TrainingConfig, draw_rows, save_rounded, train_layer
from crl_exp.tasks.base import Item, Splits, content_id
from tests.helpers import forking
from tests.helpers.tiny_run import ROOT

D_MODEL, VOCABULARY = 32, 64
SHIPPED = Path(__file__).parents[2] / "assets" / "smollm2_saes"
STORE = {"W_enc": "float16", "W_dec": "float8_e4m3fn"}


class WordTokenizer:
    """Each word of a growing vocabulary is a token; a chat prompt has a fixed frame."""

    chat_template = "frame"
    eos_token_id = 0

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.split()
        return {"input_ids": [self.ids.setdefault(w, len(self.ids) + 1) for w in words]}

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        return f"<s> user {messages[0]['content']} <end> assistant"


@pytest.fixture
def lm():
    from transformers import LlamaConfig, LlamaForCausalLM

    from crl_exp.models.language_model import LanguageModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LanguageModel(LlamaForCausalLM(config), WordTokenizer(), "tiny")


@pytest.fixture
def text_config() -> TextConfig:
    return TextConfig({}, 1.0, 64, {}, 4, 0.25, seed=0)


def residual_config(**changes) -> ResidualConfig:
    values = {"batch_tokens": 40, "autocast": False, "outlier_factor": 4.0, "last_positions": 2}
    return ResidualConfig(**{**values, **changes})


def training_config(**changes) -> TrainingConfig:
    values = {
        "d_sae": 64,
        "k": 4,
        "rows": 64 * 400,
        "batch_size": 64,
        "lr": 3e-3,
        "warmup_share": 0.05,
        "decay_share": 0.4,
        "dead_after": 50,
        "steered_repeats": 1,
        "last_repeats": 1,
        "autocast": False,
        "store": STORE,
        "specialists": SpecialistConfig(0, 3, 12800, 64, 3e-3, 2000, 0.999),
        "seed": 0,
    }
    return TrainingConfig(**{**values, **changes})


def planted_rows(n: int = 2000) -> Residuals:
    """Rows around a mean, made of a few of 48 directions each."""
    generator = torch.Generator().manual_seed(1)
    directions = nn.functional.normalize(torch.randn(48, D_MODEL, generator=generator), dim=1)
    active = (torch.rand(n, 48, generator=generator) < 0.06).float()
    strength = active * (2 + torch.rand(n, 48, generator=generator))
    rows_ND = (strength @ directions + 5.0).half()
    no = torch.zeros(n, dtype=torch.bool)
    return Residuals({1: rows_ND}, no, no.clone(), torch.zeros(n, dtype=torch.long))


def items(*texts: str) -> tuple[Item, ...]:
    return tuple(Item(content_id(t), f"Good or bad? {t}") for t in texts)


def documents(n: int = 6) -> list[Document]:
    chat = [
        Document("chat", (1, 2, 3, *range(10 + i, 16 + i + i % 2), 4, 5), 11 + i % 2, 3)
        for i in range(n)
    ]
    return [*chat, *[Document("plain", tuple(range(20 + i, 25 + 2 * i)), 0, 1) for i in range(n)]]


def test_explained_variance_ends():
    x_ND = torch.randn(50, 7) * 3 + 100
    assert explained_variance(x_ND, x_ND) == 1.0
    assert explained_variance(x_ND, x_ND.mean(0).expand_as(x_ND)) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(x_ND, torch.zeros_like(x_ND)) < -10


def test_held_out_items_are_found_by_text():
    splits = Splits(
        train=items("a fine film"),
        validation=items("a dull film"),
        test=items("the worst of all"),
        extra={"benign": items("how to bake bread")},
    )
    held_out = HeldOut([splits])
    for text in ("a dull film", "A  Dull Film", "the worst of all", "how to bake bread"):
        assert held_out.holds(text)
    assert not held_out.holds("a fine film")


def test_chat_documents_leave_held_out_items_out(lm, text_config):
    train = items("one two three", "four five", "six seven eight")
    # The same text under another id: only its text gives it away.
    test = (Item("other", "Good or  bad? FOUR five"),)
    held_out = HeldOut([Splits(train, items("x"), test)])
    found = chat_documents(lm, "task", train, text_config, held_out)
    words = {i: w for w, i in lm.tokenizer.ids.items()}
    texts = [" ".join(words[i] for i in d.ids) for d in found]
    assert len(found) == 2 and not any("four five" in t for t in texts)
    # Skipped: what all prompts share at their start, "<s> user Good or bad?".
    assert all(d.n_skip == 5 and d.n_prompt == len(d.ids) for d in found)
    everything = HeldOut([Splits(items("x"), train, items("y"))])
    with pytest.raises(UserError, match=r"tasks\.task\.n_train"):
        chat_documents(lm, "task", train, text_config, everything)


@pytest.mark.assets
def test_no_validation_or_test_review_is_in_the_text(lm, text_config):
    from hydra import compose, initialize

    from crl_exp.experiments.config import build
    from crl_exp.launcher.commands.train_sae import TrainSaeConfig
    from crl_exp.tasks.base import Task

    raw_types = {f.name for f in fields(TrainSaeConfig)}  # importing it registers the schema
    with initialize(version_base="1.3", config_path="../../sae_training"):
        raw = compose("train_sae", overrides=["tasks.sentiment.n_train=300"])
    assert set(raw) == raw_types
    splits = build(raw.tasks.sentiment, "tasks.sentiment", Task).splits()
    # Nothing is neutral here, so that reviews of every split are offered as plain text too.
    config = replace(text_config, neutral_below=9.0, general_tokens={"movies": 400_000})
    held_out = HeldOut([splits])
    found = plain_documents(lm, config, held_out)
    found += chat_documents(lm, "sentiment", splits.train, config, held_out)
    words = {i: w for w, i in lm.tokenizer.ids.items()}
    texts = "\n".join(" ".join(words[i] for i in d.ids) for d in found)
    reviews = {
        name: [" ".join(i.user.split("Review: ")[1].split()) for i in items]
        for name, items in splits.named().items()
    }
    assert sum(r in texts for r in reviews["train"]) >= 290
    assert not [r for r in reviews["validation"] + reviews["test"] if r in texts]


def test_split_of_documents_is_disjoint_and_fixed(text_config):
    twice = documents() + documents()
    training, held = split_documents(twice, text_config)
    assert not set(training) & set(held)
    assert len(training) + len(held) == len(documents()) and len(held) == 3
    assert (training, held) == split_documents(twice, text_config)


def test_residuals_are_layer_outputs_without_padding_or_openings(lm):
    docs = documents()
    found = collect(lm, docs, [1, 2], residual_config(), lambda n: None)
    assert len(found) == sum(len(d.ids) - d.n_skip for d in docs)
    assert len(lm.decoder.layers) == 4 and not lm.layers[1]._forward_hooks
    for index, document in enumerate(docs):
        # Read plainly, one by one: hidden_states[L + 1] is the output of layer L.
        with torch.inference_mode():
            states = lm.decoder(torch.tensor([document.ids]), output_hidden_states=True)
        for layer in (1, 2):
            rows_ND = found.by_layer[layer][found.document_N == index].float()
            wanted_ND = states.hidden_states[layer + 1][0, document.n_skip :]
            torch.testing.assert_close(rows_ND, wanted_ND, atol=2e-3, rtol=2e-3)


def test_steered_positions_are_the_end_of_the_prompt_and_the_answer(lm):
    answered = Document("chat", (1, 2, 3, 11, 12, 4, 5, 30, 31), n_prompt=7, n_skip=3)
    plain = Document("plain", (20, 21, 22), n_prompt=0, n_skip=1)
    found = collect(lm, [answered, plain], [1], residual_config(), lambda n: None)
    of_chat = found.document_N == 0
    assert found.steered_N[of_chat].tolist() == [False, False, True, True, True, True]
    assert found.last_N[of_chat].tolist() == [False, False, False, True, False, False]
    assert not found.steered_N[~of_chat].any()
    drawn = draw_rows(found, training_config(steered_repeats=2, last_repeats=5))
    assert len(drawn) == 2 + 2 + 3 * 2 + 5


def test_outliers_are_dropped_from_all_layers():
    rows_ND = torch.ones(10, 4).half()
    high_ND = rows_ND.clone()
    high_ND[3] *= 50
    no = torch.zeros(10, dtype=torch.bool)
    found = Residuals({1: rows_ND, 2: high_ND}, no, no.clone(), torch.arange(10))
    found = drop_outliers(found, norm_limits(found, 4.0))
    assert found.n_dropped == 1 and 3 not in found.document_N
    assert all(len(r) == 9 and r.max() == 1 for r in found.by_layer.values())


def test_trained_folder_loads_back_and_reconstructs(tmp_path):
    from sae_lens import SAE

    rows = planted_rows()
    trained = train_layer(rows, 1, training_config(), "tiny", "planted")
    save_rounded(trained, tmp_path / "sae", STORE)
    sae = SAE.load_from_disk(tmp_path / "sae", device="cpu", dtype="float32")
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.W_dec.shape == (64, D_MODEL) and sae.W_dec.dtype == torch.float32
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.model_name == "tiny"
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), atol=0.03, rtol=0)
    x_ND = rows.by_layer[1].float()
    with torch.no_grad():
        reached = explained_variance(x_ND, sae(x_ND))
        l0 = float((sae.encode(x_ND) > 0).sum(1).float().mean())
    assert reached > 0.75
    assert 2 < l0 < 8


def test_training_lowers_the_loss():
    rows = planted_rows()
    x_ND = rows.by_layer[1].float()
    losses = []
    for n_batches in (10, 400):
        sae = train_layer(rows, 1, training_config(rows=64 * n_batches), "tiny", "planted")
        with torch.no_grad():
            losses.append(float((sae(x_ND) - x_ND).pow(2).mean()))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.slow
def test_specialists_see_the_last_prompt_token_and_stay_shut_elsewhere():
    generator = torch.Generator().manual_seed(2)
    rows = planted_rows()
    # 400 last tokens in one place, with faint variation along ten directions.
    directions = nn.functional.normalize(torch.randn(10, D_MODEL, generator=generator), dim=1)
    faint = (torch.rand(400, 10, generator=generator) < 0.2).float() * 0.5
    place_D = torch.randn(D_MODEL, generator=generator) * 3
    last_ND = (faint @ directions + place_D).half()
    rows_ND = torch.cat([rows.by_layer[1], last_ND])
    last_N = torch.arange(len(rows_ND)) >= 2000
    mixed = Residuals({1: rows_ND}, last_N, last_N, torch.zeros(len(rows_ND), dtype=torch.long))
    plain = training_config()
    special = replace(plain, specialists=replace(plain.specialists, n_features=16))

    def at_last(sae) -> float:
        return explained_variance(last_ND.float(), sae(last_ND.float()))

    without, sae = (train_layer(mixed, 1, c, "tiny", "planted") for c in (plain, special))
    places = sae.cfg.metadata.specialist_features
    assert len(places) == 16 and without.cfg.metadata.specialist_features is None
    assert at_last(sae) > at_last(without) + 0.3
    assert (sae.encode(rows.by_layer[1].float())[:, places] > 0).any(1).float().mean() < 0.01


def test_other_saes_are_not_written_beside(tmp_path):
    from crl_exp.launcher.commands.train_sae import TrainSaeConfig, check

    config = OmegaConf.structured(TrainSaeConfig)
    config.layers, config.out = [2], str(tmp_path)
    check(config, 4)
    for layer in (1, 2):
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        folder.mkdir()
        (folder / "cfg.json").write_text("{}")
    with pytest.raises(UserError, match=r"blocks\.1\.hook_resid_post\); set out="):
        check(config, 4)
    config.layers = [1, 2]
    check(config, 4)
    config.layers = [2, 1, 2]
    with pytest.raises(UserError, match=r"layers=\[2, 1, 2\]: holds a layer twice"):
        check(config, 4)


def test_training_faults_name_their_override(tmp_path):
    with pytest.raises(UserError, match=r"training\.batch_size"):
        train_layer(planted_rows(50), 1, training_config(), "tiny", "planted")
    sae = train_layer(planted_rows(), 1, training_config(rows=640), "tiny", "planted")
    with pytest.raises(UserError, match=r"training.store.W_dec=int3"):
        save_rounded(sae, tmp_path, {"W_dec": "int3"})


@pytest.mark.parametrize("overrides", [["layers=[10]", "out=saes/mine"], ["model=gpt2"]])
def test_what_the_docs_type_is_understood(overrides):
    """In conf/, `layers` would be a group."""
    from hydra import compose, initialize

    from crl_exp.launcher.commands.train_sae import TrainSaeConfig

    assert TrainSaeConfig  # importing it registers the schema
    with initialize(version_base="1.3", config_path="../../sae_training"):
        raw = compose("train_sae", overrides=overrides)
    if "out=saes/mine" in overrides:
        assert (raw.layers, raw.out) == ([10], "saes/mine")


def test_a_spread_model_is_refused(tmp_path):
    from crl_exp.launcher.commands.train_sae import run

    config: Any = SimpleNamespace(model=SimpleNamespace(device_map="auto"))
    with pytest.raises(UserError, match=r"train-sae .* on one device; set model\.device_map=null"):
        run(config, {}, "train-sae")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"layer 1: .* aren't finite.*lower training\.lr=1e\+20"):
        train_layer(planted_rows(), 1, replace(training_config(rows=640), lr=1e20), "tiny", "p")
    sae = train_layer(planted_rows(), 1, training_config(rows=640), "tiny", "planted")
    sae.W_dec.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"W_dec is too large .* training\.store"):
        save_rounded(sae, tmp_path / "sae", {"W_dec": "float16"})
    assert not list((tmp_path / "sae").glob("*.safetensors"))


def test_an_sae_worse_than_the_mean_is_named():
    from crl_exp.saes.training.quality import useless

    figures = {8: 0.9, 12: -0.56, 15: float("nan")}
    said = useless({layer: {"explained_variance": share} for layer, share in figures.items()})
    assert [line.split(":")[0] for line in said] == ["layer 12", "layer 15"]
    assert "explained variance -0.56" in said[0] and "training.lr" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "code"), [(-0.56, 1), (0.9, 0)])
def test_training_that_came_to_nothing_exits_with_a_fault(share, code, tmp_path):
    """What was trained is saved, and a script that goes on from it is told. Not trained here."""
    program = (
        "import sys\nfrom crl_exp.launcher.commands import train_sae\n"
        f"train_sae.run = lambda *_: {{10: {{'explained_variance': {share}}}}}\n"
        f"sys.exit(train_sae.main(['layers=[10]', 'out={tmp_path}']))\n"
    )
    done = subprocess.run(
        [forking.python(), "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert ("explained variance -0.56" in done.stdout + done.stderr) == bool(code)


def test_cross_entropy_edits_only_the_layer_and_kept_tokens(lm):
    docs, config = documents(), QualityConfig(100, autocast=False)
    clean = cross_entropy(lm, docs, config)
    assert cross_entropy(lm, docs, config, 2, edit=lambda x: x) == pytest.approx(clean)
    assert abs(cross_entropy(lm, docs, config, 2, edit=torch.zeros_like) - clean) > 1e-3
    # Nothing lies under a limit of zero, so nothing is edited.
    untouched = cross_entropy(lm, docs, config, 2, limit=0.0, edit=torch.zeros_like)
    assert untouched == pytest.approx(clean)
    assert not any(layer._forward_hooks for layer in lm.layers)
    assert sum(len(d.ids) - d.n_skip for d in ce_documents(docs, 25)) >= 25


def shipped_layers() -> list[int]:
    return sorted(int(p.name.split(".")[1]) for p in SHIPPED.glob("blocks.*.hook_resid_post"))


def test_shipped_saes_fit_the_size_and_have_a_card():
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40_000_000
    assert shipped_layers() == [8, 12, 15, 18, 22]
    card = (SHIPPED / "README.md").read_text()
    for layer in shipped_layers():
        figures = json.loads((SHIPPED / f"blocks.{layer}.hook_resid_post/quality.json").read_text())
        assert figures["explained_variance"] > figures["explained_variance_one_layer_off"]
        assert f"| {layer} | {figures['explained_variance']:.3f} |" in card


@pytest.mark.parametrize("layer", [8, 12, 15, 18, 22])
def test_shipped_sae_loads(layer):
    from sae_lens import SAE

    path = SHIPPED / f"blocks.{layer}.hook_resid_post"
    sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
    assert sae.cfg.architecture() == "jumprelu"
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (576, 4096)
    assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
    assert sae.cfg.metadata.model_name == "SmolLM2-135M-Instruct"
    assert all(torch.isfinite(w).all() for w in sae.state_dict().values())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4096), atol=0.02, rtol=0)
    threshold_F = sae.threshold
    assert isinstance(threshold_F, torch.Tensor) and (threshold_F > 0).all()
