"""A tiny random model with random SAEs, made offline when first asked for.

For trying out any experiment or sweep in seconds (`+debug=tiny`). It knows nothing and no figure
of it means anything. The formats are the real ones: a transformers folder, SAELens folders. It has
as many layers as the sweeps over SmolLM2's layers need.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.machine.assets import cache_dir

N_LAYERS, D_MODEL, D_SAE = 24, 32, 64
KINDS = ("llama", "gemma2")
RECIPE = 1  # raise this number when what is made changes
SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>"]
# Answers of choice tasks that are longer than a letter: they have to be one token.
WORDS = ["yes", "no", "Yes", "No", "Positive", "Negative"]
CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<bot>"


def tiny_model(kind: str) -> Path:
    """Folder of the model. Raises `UserError` for an unknown kind."""
    if kind not in KINDS:
        raise UserError(
            f"model.path=tiny:{kind}: must be one of {', '.join(f'tiny:{k}' for k in KINDS)}"
            f"{did_you_mean(kind, KINDS)}"
        )
    return _made(f"{kind}-{RECIPE}", lambda folder: _write_model(kind, folder))


def tiny_saes(kind: str) -> Path:
    """Folder of the SAEs of every layer of the model of this kind."""
    if kind not in KINDS:
        raise UserError(f"sae.folder=tiny:{kind}: must be one of {', '.join(KINDS)}")
    return _made(f"{kind}-saes-{RECIPE}", lambda folder: _write_saes(kind, folder))


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """Write a folder once, whole or not at all, whoever else asks for it at the same time."""
    root = cache_dir() / "tiny"
    root.mkdir(parents=True, exist_ok=True)
    folder, partial = root / name, root / f"{name}.partial"
    with FileLock(str(root / f"{name}.lock")):
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            os.replace(partial, folder)
    return folder


def _write_model(kind: str, folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 256 + len(SPECIAL) + len(WORDS), "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None, "hidden_size": D_MODEL, "intermediate_size": 2 * D_MODEL,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 16_384, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            window: dict[str, Any] = {"sliding_window": 16, "query_pre_attn_scalar": 8}
            model = Gemma2ForCausalLM(Gemma2Config(**shape, **window))
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, so that any text of any task can be read, and some words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    raw.add_special_tokens([AddedToken(token) for token in SPECIAL])
    raw.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = CHAT
    made.save_pretrained(folder)


def _write_saes(kind: str, folder: Path) -> None:
    """Unit directions, the encoder's those of the decoder; features active about half the time."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    draw = torch.Generator().manual_seed(0)
    for layer in range(N_LAYERS):
        hook_name = f"blocks.{layer}.hook_resid_post"
        metadata = SAEMetadata(hook_name=hook_name, model_name=f"tiny-{kind}")
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata))
        W_dec_FD = torch.nn.functional.normalize(
            torch.randn(D_SAE, D_MODEL, generator=draw), dim=1
        )  # fmt: skip
        sae.load_state_dict(
            {
                "W_dec": W_dec_FD, "W_enc": W_dec_FD.T.contiguous(), "b_enc": torch.zeros(D_SAE),
                "b_dec": torch.zeros(D_MODEL), "threshold": torch.full((D_SAE,), 0.05),
            }
        )  # fmt: skip
        sae.save_model(folder / hook_name)
