"""Language models: loading, the decoder's layers, masks, and the output head.

This is the only file that imports transformers' model classes. Shapes: B rows, Q query tokens,
K key tokens, D d_model, V vocabulary (or the allowed tokens of a choice task).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crl_exp.config.errors import UserError
from crl_exp.models import placement
from crl_exp.models.architecture import find_layers, one_rotation
from crl_exp.models.choice import options_of
from crl_exp.models.config import ModelConfig, cannot_load
from crl_exp.models.kv_cache import Scratch
from crl_exp.models.prompt_text import chat_ids, plain_ids
from crl_exp.models.sites import See, Site, hook


class LanguageModel:
    """A frozen causal language model with handles on its decoder layers.

    home: the device of all that is ours where the model is spread (`models.placement`); None where
        it isn't. device: of a spread model, where home is asked for; null: where its embeddings
        compute.
    """

    def __init__(
        self, model: nn.Module, tokenizer, name: str,
        chat_template_args: Mapping[str, Any] | None = None, device: str | None = None,
    ):  # fmt: skip
        self.layers = find_layers(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.chat_template_args = dict(chat_template_args or {})
        self._fingerprint: str | None = None
        self.scratch = Scratch()
        self.home = placement.home_of(model, device)
        self.in_tuple = False  # whether layers hand their output on in a tuple; `hook` sees it
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or self.d_model // config.num_attention_heads
        self.d_kv: int = n_heads * head_dim
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
        self.short_of: int | None = one_rotation(config)
        if self.short_of is not None:
            self.max_positions = min(self.short_of, self.max_positions or self.short_of)
        self.final_cap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        """Where the model is; of a spread one, home."""
        return self.home or next(self.model.parameters()).device

    @property
    def devices(self) -> list[torch.device]:
        """All that it computes on, home first."""
        if self.home is None:
            return [self.device]
        return list(dict.fromkeys([self.home, *map(placement.computes_on, self.layers)]))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def fingerprint(self) -> str:
        """Hash of the weights' sums: statistics made with other weights are not reused.

        Their bits are summed, as whole numbers: the same in any order, so on any machine.
        """
        if self._fingerprint is None:  # the weights are frozen
            sums = [int(_bits(p).sum(dtype=torch.int64)) for p in placement.all_weights(self.model)]
            self._fingerprint = hashlib.sha256(repr(sums).encode()).hexdigest()[:12]
        return self._fingerprint

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end an answer: the tokenizer's and the generation config's."""
        generation = getattr(self.model, "generation_config", None)
        listed = getattr(generation, "eos_token_id", None)
        ids = listed if isinstance(listed, list) else [listed]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    def prompt_ids(
        self, user: str, chat_template: bool, before: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Token ids of a user turn, ready for the first output token.

        before: user turns with their answers that stand before it; without a chat template, texts
            with an empty line between them.
        """
        if not chat_template:
            asked = "".join(f"{turn}{answer}\n\n" for turn, answer in before)
            return plain_ids(self.tokenizer, asked + user)
        return chat_ids(self.tokenizer, user, self.chat_template_args, self.name, before)

    def room(self) -> str:
        """How many tokens the model takes, in words for a message."""
        if self.short_of is None:
            return f"{self.name} takes {self.max_positions}"
        return (
            f"{self.name} takes {self.max_positions} with one rotation (LongRoPE turns all rows of "
            "a batch otherwise once one of them is longer, so answers would depend on what is "
            "beside them)"
        )

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """The one token of each choice. Raises `UserError` where one has several."""
        one_token = options_of(self.tokenizer, choices, False, self.name).one_token
        if one_token is None:
            raise UserError(f"{list(choices)}: not one token each of {self.name}")
        return one_token

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
            return self.at_home(head(hidden_BD))
        with placement.fetched(head):
            weight_VD = head.weight
            rows = torch.as_tensor(token_ids, device=weight_VD.device)
            bias = None if head.bias is None else head.bias[rows]
            there_BD = hidden_BD.to(weight_VD.device)
            return self.at_home(nn.functional.linear(there_BD, weight_VD[rows], bias))

    def at_home(self, x: Tensor) -> Tensor:
        """The same where all that is ours lies."""
        return x if self.home is None else x.to(self.home)

    def log_probs(self, hidden_BD: Tensor) -> Tensor:
        """log p of every token [B, V], float32, as the model itself gives it."""
        logits_BV = self.logits(hidden_BD).float()
        if self.final_cap is not None:  # not left out here: sums of several tokens need it
            logits_BV = self.final_cap * torch.tanh(logits_BV / self.final_cap)
        return logits_BV.log_softmax(dim=-1)

    def hook(self, site: Site, see: See) -> RemovableHandle:
        """Show `see` the residual [B, T, D] at a site; what it returns, if anything, goes on.

        site: the output of layer `site`; -1 is the input of layer 0. `models.sites` has more.
        """
        return hook(self, site, see)

    @contextmanager
    def skipping(self, top: int, residual: Tensor) -> Iterator[None]:
        """Within, layers 0..`top` are not computed: `top`'s output is `residual`, [B, D] of one
        token or [B, T, D].

        The prompt's last token is the same for every policy up to the first steered layer, so
        its residual there is read once and put in. Hooks on layer `top` see it as its output (and
        so would hooks below, where no controller steers).
        """
        if top < 0:
            yield
            return
        put_in = (residual if residual.ndim == 3 else residual[:, None]).to(self.dtype)
        given = (put_in,) if self.in_tuple else put_in
        # A spread model's layer has a `forward` of its own, in which accelerate's hook is.
        own = {layer: vars(layer).get("forward") for layer in self.layers[: top + 1]}
        for layer in own:
            layer.forward = lambda *_, **__: given  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, forward in own.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _bits(weights: Tensor) -> Tensor:
    """The same memory as whole numbers."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weights.detach().contiguous().view(kinds[weights.element_size()])


def load_model(config: ModelConfig) -> LanguageModel:
    """Load weights and tokenizer. Raises `UserError` where they are missing or damaged."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if found := config.machine_faults():
        raise UserError("\n".join(found))
    logging.disable_progress_bar()
    path = config.local_path()
    # Quantised weights are made on their device and can't be moved there.
    how: dict[str, Any] = {}
    if config.quantization:
        how = {
            "quantization_config": config.quantization_config(),
            "device_map": {"": config.device},
        }
    if config.device_map is not None:
        how["device_map"] = config.device_map
    try:
        # False, not missing: transformers would ask on the terminal whether to run a folder's code.
        plain = {"revision": config.revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **plain)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            **plain,
            dtype=config.torch_dtype,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            **how,
        )
    except (OSError, ValueError, ImportError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(cannot_load(config, path, error)) from error
    if not config.quantization and not placement.dispatched(model):
        model = model.to(config.device)  # type: ignore[arg-type]
    lm = LanguageModel(model, tokenizer, config.name, config.chat_template_args, config.device)
    if lm.home is not None:
        placement.tell(config.name, model, lm.layers)
    return lm
