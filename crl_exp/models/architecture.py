"""Decoder layers, found in any architecture the way transformers builds its models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from crl_exp.config.errors import UserError
from crl_exp.models.config import ModelConfig, cannot_load

_STEERABLE: set[tuple[str, str | None]] = set()  # configs that were found to be, by content
CHOOSE = "choose a decoder-only transformer (Llama, Gemma-2, Qwen, GPT-2, GPT-NeoX, …) by model=…"


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's stack: its one direct ModuleList of `num_hidden_layers` blocks.

    Raises `UserError` where the architecture keeps its layers otherwise, or has no attention whose
    keys and values could be kept.
    """
    kind = type(model).__name__
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    n_layers = getattr(config, "num_hidden_layers", None)
    n_heads = getattr(config, "num_attention_heads", None)
    if not n_layers or not n_heads:
        raise UserError(f"{kind} has no attention layers that could be steered; {CHOOSE}")
    stacks = [
        child
        for child in model.get_decoder().children()  # type: ignore[operator]
        if isinstance(child, nn.ModuleList) and len(child) == n_layers
    ]
    if len(stacks) != 1:
        raise UserError(
            f"can't find the {n_layers} decoder layers of {kind} ({len(stacks)} candidate lists), "
            f"so this architecture can't be steered; {CHOOSE}"
        )
    return list(stacks[0])


def check_architecture(config: ModelConfig) -> Any:
    """Build the model without weights and find its layers; returns the architecture's config.

    Raises `UserError` for an architecture that can't be steered.
    """
    from transformers import AutoModelForCausalLM

    read = config.read_config()
    # Building takes a tenth of a second, and every run of a process asks.
    asked = (read.to_json_string(use_diff=False), config.attn_implementation)
    if asked in _STEERABLE:
        return read.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                read, attn_implementation=config.attn_implementation
            )
    except (ValueError, ImportError) as error:
        raise UserError(cannot_load(config, config.path, error)) from error
    find_layers(model)
    _STEERABLE.add(asked)
    return read.get_text_config()


def one_rotation(config: Any) -> int | None:
    """Tokens up to which a LongRoPE model turns all rows alike; None for any other model.

    transformers chooses the frequencies by the longest row of a batch.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [given, *(one for one in given.values() if isinstance(one, dict))]
    found = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) == "longrope"
    ]
    return min((n for n in found if n), default=None)
