"""Language models: loading, the decoder's layers, masks, and the output head.

This is the only file that imports transformers' model classes. Shapes: B rows, Q query tokens,
K key tokens, D d_model, V vocabulary (or the allowed tokens of a choice task).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crl_exp.assets import asset_path
from crl_exp.errors import UserError, did_you_mean

ASSET_PREFIX = "asset:"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class ModelConfig:
    """Which language model.

    name: what results are filed under, and what an SAE's metadata is compared with.
    path: a local folder, a hub id, or `asset:NAME` for one fetched by `make assets`.
    revision: hub revision (null: the default branch).
    dtype: float32, bfloat16 or float16.
    device: cpu, cuda, cuda:1, …
    attn_implementation: sdpa, eager or null (transformers' own choice for the architecture).
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    device: str
    attn_implementation: str | None

    def local_path(self) -> str:
        """Resolve `asset:` names. Raises `UserError` where the asset is missing."""
        if self.path.startswith(ASSET_PREFIX):
            return str(asset_path(self.path.removeprefix(ASSET_PREFIX)))
        return self.path

    def faults(self) -> list[str]:
        """What can be said to be wrong before anything is loaded."""
        found = []
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            found.append(f"model.dtype={self.dtype}: must be one of {', '.join(DTYPES)}{near}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            found.append(f"model.device={self.device}: no CUDA device here; set model.device=cpu")
        if self.attn_implementation not in (None, "sdpa", "eager"):
            found.append(
                f"model.attn_implementation={self.attn_implementation}: the engine builds its own "
                "masks, which sdpa, eager and null take"
            )
        return found

    def read_config(self):
        """The architecture's config, without weights. Raises `UserError` naming the mend."""
        from transformers import AutoConfig

        path = self.local_path()
        try:
            return AutoConfig.from_pretrained(path, revision=self.revision)
        except (OSError, ValueError) as error:
            raise UserError(_cannot_load(self, path, error)) from error


def _cannot_load(config: ModelConfig, path: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return (
        f"model.path={config.path}: can't load a language model from {path!r} ({first_line}). "
        "Give a folder with config.json and safetensors (model.path=/a/folder), a hub id that "
        "this machine can reach (gated ones need `hf auth login`), or model=smollm2_135m, "
        "which `make assets` fetches without a hub"
    )


class LanguageModel:
    """A frozen causal language model with handles on its decoder layers."""

    def __init__(self, model: nn.Module, tokenizer, name: str):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or self.d_model // config.num_attention_heads
        self.d_kv: int = n_heads * head_dim
        self.layers = find_layers(self.decoder, self.n_layers)
        self.window: int | None = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ())
        # Models that mix window and full layers take one mask for each type.
        self.mask_types = sorted(layer_types) if "sliding_attention" in layer_types else []
        if not layer_types and getattr(config, "use_sliding_window", True) is False:
            self.window = None
        if layer_types == {"full_attention"}:
            self.window = None
        unknown = layer_types - {"full_attention", "sliding_attention"}
        if unknown:
            raise UserError(
                f"model {name} has attention layers of type {sorted(unknown)}, which the engine's "
                "masks don't cover; choose a model with full or sliding-window attention"
            )
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def fingerprint(self) -> str:
        """Hash of the weights' sums: statistics made with other weights are not reused."""
        sums = [float(p.sum(dtype=torch.float64)) for p in self.model.parameters()]
        return hashlib.sha256(repr(sums).encode()).hexdigest()[:12]

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end an answer: the tokenizer's and the generation config's."""
        generation = getattr(self.model, "generation_config", None)
        listed = getattr(generation, "eos_token_id", None)
        ids = listed if isinstance(listed, list) else [listed]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    def prompt_ids(self, user: str, chat_template: bool) -> list[int]:
        """Token ids of a user turn, ready for the first output token."""
        if not chat_template:
            return self.tokenizer(user)["input_ids"]
        if not self.tokenizer.chat_template:
            raise UserError(f"model {self.name} has no chat template; set task.chat_template=false")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": user}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """First token of each choice. Raises `UserError` where two share it."""
        ids = [self.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in choices]
        if len(set(ids)) < len(ids):
            raise UserError(
                f"task.choices={list(choices)}: two of them begin with the same token of "
                f"{self.name}, so a constrained answer can't tell them apart; reword them"
            )
        return ids

    def mask(self, query_BQ: Tensor, key_BK: Tensor, valid_BK: Tensor) -> Tensor | dict:
        """Additive attention mask [B, 1, Q, K] from positions, so that padding may lie anywhere.

        query_BQ, key_BK: position of each query and key. valid_BK: false where a key is padding.
        """
        distance_BQK = query_BQ[:, :, None] - key_BK[:, None, :]
        seen_BQK = valid_BK[:, None, :] & (distance_BQK >= 0)

        def additive(allowed_BQK: Tensor) -> Tensor:
            lowest = torch.finfo(self.dtype).min
            zeros = torch.zeros(allowed_BQK.shape, dtype=self.dtype, device=allowed_BQK.device)
            return zeros.masked_fill(~allowed_BQK, lowest)[:, None]

        if self.window is None:
            return additive(seen_BQK)
        windowed = additive(seen_BQK & (distance_BQK < self.window))
        if not self.mask_types:
            return windowed
        full = additive(seen_BQK)
        return {kind: full if kind == "full_attention" else windowed for kind in self.mask_types}

    def logits(self, hidden_BD: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """Output scores [B, V], or [B, len(token_ids)] for these tokens alone.

        A final soft cap (Gemma-2) is left out: it is monotone, and decoding is greedy.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if token_ids is None:
            return head(hidden_BD)
        rows = torch.as_tensor(token_ids, device=hidden_BD.device)
        bias = None if head.bias is None else head.bias[rows]
        return nn.functional.linear(hidden_BD, head.weight[rows], bias)

    @contextmanager
    def skipping(self, top: int, residual_BD: Tensor) -> Iterator[None]:
        """Within, layers 0..`top` are not computed: `top`'s output is `residual_BD`.

        The prompt's last token is the same for every policy up to the first steered layer, so
        its residual there is read once and put in. Hooks on layer `top` see it as its output.
        """
        if top < 0:
            yield
            return
        put_in = residual_BD[:, None].to(self.dtype)
        for layer in self.layers[:top]:
            layer.forward = _pass_through  # type: ignore[method-assign]
        self.layers[top].forward = lambda *_, **__: put_in  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers[: top + 1]:
                del layer.forward


def _pass_through(hidden: Tensor, *_args, **_kwargs) -> Tensor:
    return hidden


def find_layers(decoder: nn.Module, n_layers: int) -> list[nn.Module]:
    """The decoder's stack: its one direct ModuleList of `num_hidden_layers` blocks.

    Raises `UserError` where the architecture keeps its layers otherwise.
    """
    stacks = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == n_layers
    ]
    if len(stacks) != 1:
        raise UserError(
            f"can't find the {n_layers} decoder layers of {type(decoder).__name__} "
            f"({len(stacks)} candidate lists); this architecture can't be steered"
        )
    return list(stacks[0])


def load_model(config: ModelConfig) -> LanguageModel:
    """Load weights and tokenizer. Raises `UserError` where they are missing or damaged."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = config.local_path()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
        ).to(config.device)  # type: ignore[arg-type]
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(_cannot_load(config, path, error)) from error
    if config.path.startswith(ASSET_PREFIX):
        assert Path(path).is_dir()
    return LanguageModel(model, tokenizer, config.name)
