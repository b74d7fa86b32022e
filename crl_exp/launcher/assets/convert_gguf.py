"""A quantised GGUF file of a Llama-type model → a plain float32 safetensors folder, once.

Reading a GGUF de-quantises it each time (about 20 s for 135M parameters) and the result refuses
`save_pretrained`. The weights are therefore copied into a fresh model, saved, read back and
compared with a known digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from crl_exp.config.errors import UserError


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def convert(gguf: Path, target: Path, expected: str) -> None:
    """Writes `config.json`, `model.safetensors` and the tokenizer's files into `target`.

    Args:
        expected: `weights_digest` of the finished model, read back from `target`.

    Raises:
        UserError: the model read back isn't the one expected.
    """
    # The bar of the slow step is tqdm's own and stays; these would only follow it for an instant.
    transformers.utils.logging.disable_progress_bar()
    folder, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    fresh = LlamaForCausalLM(_clean_config(quantised.config))
    fresh.load_state_dict(quantised.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(
        target
    )
    saved = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    found = weights_digest(saved.state_dict())
    if found != expected:
        raise UserError(
            f"the weights converted from {name} have digest {found}, not {expected}. "
            f"transformers {transformers.__version__} reads the file another way than the version "
            "this was written for: install the one named in constraints.txt (`make setup`)"
        )


def _clean_config(config: PreTrainedConfig) -> LlamaConfig:
    """The same architecture without the traces of the GGUF file, which can't be saved."""
    known = LlamaConfig().to_dict()
    dropped = {"quantization_config", "_name_or_path"}
    values = {k: v for k, v in config.to_dict().items() if k in known and k not in dropped}
    return LlamaConfig(**values)
