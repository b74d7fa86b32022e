"""Models: layers of any architecture, what is refused, what is said when one can't be had."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, MptConfig, OPTConfig

from crl_exp.config.errors import UserError
from crl_exp.generation.model_check import checked, largest_error
from crl_exp.models.architecture import check_architecture, find_layers
from crl_exp.models.config import ModelConfig
from crl_exp.models.language_model import LanguageModel, load_model
from tests.helpers import tiny
from tests.helpers.tiny_run import ROOT

COMMON = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
# Architectures that the code never names: other stacks, layers that hand on tuples.
FOREIGN = {
    "opt": OPTConfig(
        **COMMON, hidden_size=32, num_hidden_layers=4, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    ),
    "mpt": MptConfig(**COMMON, d_model=32, n_layers=4, n_heads=4),
    "bloom": BloomConfig(**COMMON, hidden_size=32, n_layer=4, n_head=4),
}  # fmt: skip


def config(**changes) -> ModelConfig:
    plain = {
        "name": "m", "path": "no/such", "revision": None, "dtype": "float32", "device": "cpu",
        "attn_implementation": None, "quantization": None, "chat_template_args": {},
    }  # fmt: skip
    return ModelConfig(**{**plain, **changes})


def foreign(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(FOREIGN[kind])
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return LanguageModel(made, tiny.tokenizer(), kind)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_layers_are_the_blocks_in_their_order(kind):
    lm = tiny.language_model(kind)
    assert len(lm.layers) == tiny.N_LAYERS
    seen: list[int] = []
    for i, layer in enumerate(lm.layers):
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
    lm.model(torch.tensor([[5, 6, 7]]))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_engine_agrees_with_every_known_architecture(kind):
    assert largest_error(tiny.language_model(kind)) < 1e-5


@pytest.mark.parametrize("kind", ["opt", "mpt"])
def test_the_engine_agrees_with_architectures_nobody_thought_of(kind):
    assert largest_error(checked(foreign(kind))) < 1e-5


def test_an_architecture_that_takes_no_mask_is_refused():
    """Bloom makes its position biases of the mask's shape and can't take ours."""
    with pytest.raises(UserError, match=r"bloom \(BloomForCausalLM\) can't be steered.*model=…"):
        checked(foreign("bloom"))


def test_an_engine_that_is_wrong_about_a_model_is_found_out(monkeypatch):
    """Positions off by one, as for a model that counts them otherwise."""
    lm = tiny.language_model("gpt2")
    assert checked(lm) is lm
    # wpe is asked for positions; the model run plainly makes them itself, so shift only ours.
    plain = lm.decoder.forward

    def shifted(*args, position_ids=None, **kwargs):
        moved = None if position_ids is None else position_ids + 1
        return plain(*args, position_ids=moved, **kwargs)

    monkeypatch.setattr(lm.decoder, "forward", shifted)
    with pytest.raises(UserError, match=r"differ by \d.*% from those of the model run plainly"):
        checked(lm)


def test_a_model_without_attention_is_refused(tmp_path):
    small = MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=4)
    small.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no attention layers"):
        check_architecture(config(path=str(tmp_path)))


def test_layers_that_are_kept_otherwise_are_refused():
    lm = tiny.language_model("llama")
    of_model: Any = lm.model.config
    of_model.num_hidden_layers = 3
    with pytest.raises(UserError, match="can't find the 3 decoder layers of LlamaForCausalLM"):
        find_layers(lm.model)


def test_capped_attention_is_refused_sdpa(tmp_path):
    path = str(tiny.save_model("gemma2", tmp_path))
    with pytest.raises(UserError, match=r"model\.attn_implementation=eager"):
        check_architecture(config(path=path, attn_implementation="sdpa"))
    assert check_architecture(config(path=path, attn_implementation="eager")).hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": "int4"}, "must be one of int8, nf4 or null"),
        ({"quantization": "nf4"}, "needs an NVIDIA GPU; set model.device=cuda"),
        ({"attn_implementation": "flash_attention_2"}, "builds its own masks"),
        ({"device_map": "atuo", "device": "cuda"}, "must be null, auto, or a mapping"),
        ({"device_map": "auto"}, "set model.device=cuda, or model.device_map=null"),
        ({"device_map": {"model": "gpu", "lm_head": 1}}, "gpu must be cuda:N, N, cpu or disk"),
        ({"device_map": {"model": 0, "lm_head": "cuda:0"}}, "set model.device=cuda:0"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "both must be on CUDA GPUs or both on"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}, "device": "cuda"}, "both must be on"),
    ],
)
def test_bad_values_are_told(changes, said):
    assert any(said in fault for fault in config(**changes).faults())


def test_good_maps_are_taken():
    assert config(device_map="auto", device="cuda").faults() == []
    assert config(device_map={"model": 0, "lm_head": "cuda:1"}, device="cuda").faults() == []
    assert config(device_map={"model": "cpu", "lm_head": "disk"}).faults() == []


def test_quantisation_is_handed_to_transformers():
    nf4 = config(quantization="nf4", device="cuda", dtype="bfloat16").quantization_config()
    assert nf4.load_in_4bit and nf4.bnb_4bit_quant_type == "nf4"
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16
    int8 = config(quantization="int8", device="cuda").quantization_config()
    assert int8.load_in_8bit and not int8.load_in_4bit
    assert config().quantization_config() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_fingerprint_is_of_the_weights_alone() -> None:
    """The same whatever the order of summation: threads, GPU."""
    lm = tiny.language_model("llama")
    weights = lm.model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    before = lm.fingerprint()
    with torch.no_grad():
        for change, same in (
            (lambda w: w.copy_(w.flip(0)), True),
            (lambda w: w[0, 0].mul_(1 + 1e-6), False),
        ):
            change(weights)
            lm._fingerprint = None
            assert (lm.fingerprint() == before) is same
    halved = tiny.language_model("llama")
    halved.model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert halved.fingerprint() != before


def test_a_missing_gpu_is_told_before_weights_are_read():
    with pytest.raises(UserError, match=r"model\.device=cuda: no CUDA device.*model\.device=cpu"):
        load_model(config(device="cuda"))


# --- the hub ---

ASK = """
import time
from crl_exp.config.errors import UserError
from tests.models.test_models import config
time.sleep = lambda seconds: None  # between the hub's tries
try:
    config(path="some/model").read_config()
except UserError as error:
    print(error)
"""


class Gate(BaseHTTPRequestHandler):
    """A hub whose every file is behind a licence."""

    def answer(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, format: str, *args) -> None:
        """Keeps the test's output clean."""


def asked(tmp_path: Path, **environment: str) -> str:
    """What is said of a hub id in a fresh process with an empty cache."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0",
           **environment}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NOT_REACHED = (
    r"the hub can't be reached for some/model, and it is not in the local cache"
    r".*model\.path=/that/folder"
)


def test_a_hub_that_must_not_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=NOT_REACHED):
        config(path="some/model").read_config()


@pytest.mark.slow
def test_an_unreachable_hub(tmp_path):
    assert re.search(NOT_REACHED, asked(tmp_path, HF_ENDPOINT="http://[::1]:9"))


@pytest.mark.slow
def test_a_gated_model(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = asked(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert "some/model is gated on the hub" in said and "hf auth login" in said
    assert "model.path=/that/folder" in said
