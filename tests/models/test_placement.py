"""Models spread by accelerate: the same bits as on one device, and accelerate's hooks stay.

Here is one device, on which transformers attaches no hooks by itself; so a model's parts are put on
cpu and disk, or hooks are asked for, and that they are there is asserted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation import teacher_forcing
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.generation.model_check import checked
from crl_exp.generation.prompts import PromptStore
from crl_exp.generation.results import Generation
from crl_exp.models import placement
from crl_exp.models.activations import read_activations
from crl_exp.models.adapter import Adapter
from crl_exp.models.choice import Options
from crl_exp.models.config import ModelConfig
from crl_exp.models.language_model import LanguageModel, load_model
from tests.helpers import tiny
from tests.helpers.tiny_run import run_small
from tests.helpers.tiny_steering import AddVector

dispatch_model = pytest.importorskip("accelerate").dispatch_model
KINDS = ("llama", "gemma2")
PROMPTS = tiny.prompts(6)
OFFLOADED = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk",
    "model.layers.1": "cpu", "model.layers.2": "disk", "model.layers.3": "cpu",
    "model.norm": "disk", "lm_head": "disk",
}  # fmt: skip


def spread(kind: str, folder: Path, device_map: dict[str, str]) -> LanguageModel:
    made = tiny.model(kind)
    if kind == "gemma2":  # tied weights lie together
        device_map = {**device_map, "lm_head": device_map["model.embed_tokens"]}
    made = dispatch_model(
        made, device_map, offload_dir=str(folder), force_hooks=True,
        skip_keys=made._skip_keys_device_placement,
    )  # fmt: skip
    lm = LanguageModel(made, tiny.tokenizer(), f"tiny-{kind}")
    assert hooked(lm)
    return lm


def hooked(lm: LanguageModel) -> bool:
    """Whether accelerate's hook is in what each layer runs, not only noted on it."""
    return all("new_forward" in str(vars(layer).get("forward")) for layer in lm.layers)


def vector(seed: int) -> Tensor:
    return 3.0 * torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(seed))


def engine(lm: LanguageModel) -> Engine:
    return Engine(lm, EngineConfig(8, 1.0, "eager"))


def answered(lm: LanguageModel, **how: Any) -> list[Generation]:
    made = engine(lm)
    steered: list[Controller] = [
        Unsteered(), AddVector({-1: vector(1)}), AddVector({1: vector(2), 2: vector(3)}),
        AddVector({3: vector(4)}),
    ]  # fmt: skip
    jobs = [Job(one, range(len(PROMPTS))) for one in steered]
    return made.generate(made.read(PROMPTS), jobs, 5, record=True, **how)


@pytest.fixture(params=KINDS)
def pair(request, tmp_path) -> tuple[LanguageModel, LanguageModel]:
    """A plain model, and the same with weights on cpu and disk."""
    return tiny.language_model(request.param), spread(request.param, tmp_path, OFFLOADED)


def test_weights_are_elsewhere_and_their_print_is_the_plain_models(pair):
    plain, lm = pair
    away = placement.kept_elsewhere(lm.model)
    assert any("layers.0." in name for name in away) and "model.norm.weight" in away
    assert checked(lm) is lm  # tied weights come apart once the model has run
    assert lm.fingerprint() == plain.fingerprint()
    assert (lm.device, lm.dtype) == (plain.device, plain.dtype)


def test_answers_are_the_plain_models_bit_for_bit(pair):
    plain, lm = pair
    for mine, expected in zip(answered(lm), answered(plain), strict=True):
        assert mine.tokens == expected.tokens and mine.texts == expected.texts
    mine, expected = (engine(one).read(PROMPTS) for one in (lm, plain))
    assert isinstance(mine, PromptStore) and isinstance(expected, PromptStore)
    assert torch.equal(mine.residual_SND, expected.residual_SND)
    for a, b in zip(mine.kv_L, expected.kv_L, strict=True):
        assert torch.equal(a, b)
    options = Options(((4,), (7, 8), (9, 10, 11)))
    for choices in ([4, 5], options):
        got, right = (answered(one, choices=choices) for one in (lm, plain))
        assert [one.tokens for one in got] == [one.tokens for one in right]
    assert hooked(lm), "steering took accelerate's hooks away"


@pytest.mark.parametrize("hook_name", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_activations_are_the_plain_models_bit_for_bit(pair, hook_name):
    plain, lm = pair
    read = partial(
        read_activations, texts=PROMPTS, layers=range(4), hook_name=hook_name, batch_size=4
    )
    mine, expected = read(lm), read(plain)
    for layer in range(4):
        assert torch.equal(mine[layer], expected[layer])


def test_log_probabilities_are_the_plain_models_bit_for_bit(pair):
    plain, lm = pair
    hidden_BD = torch.stack([vector(seed) for seed in range(3)])
    assert torch.equal(lm.logits(hidden_BD), plain.logits(hidden_BD))
    assert torch.equal(lm.logits(hidden_BD, [4, 9]), plain.logits(hidden_BD, [4, 9]))
    assert torch.equal(lm.log_probs(hidden_BD), plain.log_probs(hidden_BD))
    answers = [teacher_forcing.Forced([7, 8, 9], True), teacher_forcing.Forced([5], True)]
    found = []
    for one in pair:
        prompt = engine(one).read(PROMPTS).batch([1, 3])
        with torch.no_grad():
            logits_BTV = teacher_forcing.logits(one, prompt, answers)
        found.append(teacher_forcing.log_probs(one, logits_BTV, answers))
    assert torch.equal(*found) and (found[0] != 0).any()


def gradient(lm: LanguageModel) -> Tensor:
    prompt = engine(lm).read(PROMPTS).batch([0, 2])
    answers = [teacher_forcing.Forced([7, 8], False)] * 2
    return teacher_forcing.gradients(
        lm, prompt, answers, lambda logits_BTV: logits_BTV[:, :, 7].sum(), torch.ones(2)
    )


def test_gradients_and_adapters_need_weights_that_stay(pair, tmp_path):
    plain, lm = pair
    for refused in (lambda: gradient(lm), lambda: Adapter(lm, [1], ["q_proj"], 2, 2.0, 0.0)):
        with pytest.raises(UserError, match=r"method=(attribution|lora): .*hydra\.launcher\.gpus"):
            refused()
    # Spread over devices that keep them they do the same as ever.
    here = spread(plain.name.removeprefix("tiny-"), tmp_path / "x", dict.fromkeys(OFFLOADED, "cpu"))
    assert torch.equal(gradient(here), gradient(plain))
    logits = []
    for one in (here, plain):
        torch.manual_seed(0)
        adapter = Adapter(one, [1, 2], ["q_proj", "down_proj"], 2, 2.0, 0.0)
        with torch.no_grad():
            for weight in adapter.named().values():
                weight.add_(0.1)
        with adapter.on(), torch.no_grad():
            logits.append(one.model(torch.tensor([PROMPTS[0]])).logits)
    assert torch.equal(*logits)
    assert hooked(here)


def test_a_compiled_step_is_refused(tmp_path):
    lm = spread("llama", tmp_path, OFFLOADED)
    with pytest.raises(UserError, match=r"set engine\.decode=eager, or model\.device_map=null"):
        Engine(lm, EngineConfig(8, 1.0, "compiled"))


def test_a_mapping_of_the_config_is_loaded_with_hooks(tmp_path, caplog):
    path = tiny.save_model("llama", tmp_path / "m")
    config = ModelConfig(
        name="m", path=str(path), revision=None, dtype="float32", device="cpu",
        attn_implementation=None, quantization=None, chat_template_args={},
    )  # fmt: skip
    lm = load_model(replace(config, device_map=OFFLOADED))
    assert hooked(lm) and placement.kept_elsewhere(lm.model)
    assert "weights of 2 are kept on the CPU or the disk" in caplog.text
    plain = load_model(config)
    assert plain.home is None and lm.fingerprint() == plain.fingerprint()
    assert [one.tokens for one in answered(lm)] == [one.tokens for one in answered(plain)]


def test_a_run_gives_the_plain_models_result(tiny_files, tmp_path):
    """Stage 1, a policy trained over SAEs, steered answers: through the config."""
    mapping = "{" + ",".join(f"{name}:{device}" for name, device in OFFLOADED.items()) + "}"
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}"]
    plain, plain_path = run_small(common)
    mine, path = run_small([*common, f"model.device_map={mapping}"])
    assert path != plain_path, "a device_map has a key of its own"
    own = {"seconds", "run_key", "peak_memory_bytes"}
    assert {k: v for k, v in mine.items() if k not in own} == {
        k: v for k, v in plain.items() if k not in own
    }
