"""Tiny random models and SAEs, in the formats of the real ones, quick enough for unit tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from crl_exp.models.language_model import LanguageModel

WORDS = ["<pad>", "<eos>", "<user>", "<bot>", "yes", "no", *[f"w{i}" for i in range(58)]]
D_MODEL, N_LAYERS, D_SAE = 32, 4, 64
KINDS = ("llama", "gemma2", "gemma3", "gpt2", "gpt_neox", "qwen2", "qwen3")
CHAT = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<bot>"


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    made.chat_template = CHAT
    return made


def model(kind: str, seed: int = 0):
    """A random causal LM: llama (grouped heads), gemma2 (window 6, soft caps), gemma3 (window 6 in
    three of four layers, another rotation in the last), gpt2 (absolute positions), gpt_neox
    (partial rotary, parallel residual), qwen2 (biases), qwen3 (query norms).
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    shape: dict[str, Any] = {
        "hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128,
    }  # fmt: skip
    if kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**common, **shape, initializer_range=0.2))
    elif kind == "gemma2":
        special: dict[str, Any] = {
            "sliding_window": 6, "query_pre_attn_scalar": 8, "initializer_range": 0.2,
            "attn_implementation": "eager",
        }  # fmt: skip
        made = Gemma2ForCausalLM(Gemma2Config(**common, **shape, **special))
    elif kind == "gemma3":
        special = {"sliding_window": 6, "query_pre_attn_scalar": 8, "initializer_range": 0.2}
        layer_types = ["sliding_attention"] * (N_LAYERS - 1) + ["full_attention"]
        made = Gemma3ForCausalLM(
            Gemma3TextConfig(**common, **shape, **special, layer_types=layer_types)
        )
    elif kind == "gpt_neox":
        shape = {name: shape[name] for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        )}  # fmt: skip
        made = GPTNeoXForCausalLM(GPTNeoXConfig(**common, **shape, initializer_range=0.2))
    elif kind == "qwen2":
        del shape["head_dim"]
        made = Qwen2ForCausalLM(Qwen2Config(**common, **shape, initializer_range=0.2))
    elif kind == "qwen3":
        made = Qwen3ForCausalLM(Qwen3Config(**common, **shape, initializer_range=0.2))
    else:
        assert kind == "gpt2"
        shape = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
        made = GPT2LMHeadModel(GPT2Config(**common, **shape, initializer_range=0.2))
    return made.eval()


def language_model(kind: str, seed: int = 0) -> LanguageModel:
    return LanguageModel(model(kind, seed), tokenizer(), f"tiny-{kind}")


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """A model folder as `from_pretrained` reads it."""
    model(kind, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(n: int, seed: int = 0, prefix: int = 3) -> list[list[int]]:
    """Token ids of different lengths with a common prefix."""
    draw = torch.Generator().manual_seed(seed)
    head = list(range(6, 6 + prefix))
    lengths = torch.randint(2, 15, (n,), generator=draw).tolist()
    return [head + torch.randint(9, 60, (k,), generator=draw).tolist() for k in lengths]
