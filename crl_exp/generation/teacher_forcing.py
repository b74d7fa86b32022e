"""Given answers read by the model (teacher-forced), from kept prompts.

The last prompt token and the answer's tokens go through the model in one pass; what comes before is
kept. Position t of the pass is the steered token t of a generation: its output is what answer token
t is drawn from and, past the last one, the answer's end. The logits are the model's own, with every
cap, scale and bias of its head.
Shapes: B rows, T positions, V vocabulary, D d_model, S sites (index 0 is the input of layer 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from crl_exp.generation.prompts import PromptBatch
from crl_exp.generation.results import Generation, cut_at
from crl_exp.models.batching import bytes_to_decode
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.placement import refuse_kept_elsewhere
from crl_exp.models.sites import hooks


@dataclass(frozen=True)
class Forced:
    """An answer's tokens. ended: the model ended it there, so that its end is scored too."""

    tokens: Sequence[int]
    ended: bool

    @property
    def n_scored(self) -> int:
        return len(self.tokens) + self.ended


def forced(
    lm: LanguageModel, generation: Generation, max_new_tokens: int, stop: Sequence[str]
) -> list[Forced]:
    """The answers of a generation. One that wrote a stop text, or used up its tokens, has no end
    of its own; the stop text's tokens are part of it."""
    texts = lm.tokenizer.batch_decode(generation.tokens, skip_special_tokens=True) if stop else []
    stopped = [cut_at(text, stop) != text for text in texts] or [False] * len(generation.tokens)
    return [
        Forced(tokens, len(tokens) < max_new_tokens and not by_text)
        for tokens, by_text in zip(generation.tokens, stopped, strict=True)
    ]


def logits(lm: LanguageModel, prompt: PromptBatch, answers: Sequence[Forced]) -> Tensor:
    """Output scores [B, T, V] at every position of these answers, one a row of the batch.

    Gradients flow through the whole pass where they are enabled; kept keys and values belong to
    tokens before the first steered one, which nothing that is steered can change.
    """
    device = lm.device
    n_scored_B = torch.tensor([answer.n_scored for answer in answers], device=device)
    width = int(n_scored_B.max())
    ids_BT = torch.zeros(len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        fed = list(answer.tokens[: answer.n_scored - 1])
        ids_BT[row, 1 : 1 + len(fed)] = torch.tensor(fed, dtype=torch.long)
    ids_BT = ids_BT.to(device)
    ids_BT[:, 0] = prompt.last_B
    step_T = torch.arange(width, device=device)
    query_BT = prompt.position_B[:, None] + step_T
    key_BK = torch.cat([prompt.key_BT, query_BT], dim=1)
    valid_BK = torch.cat([prompt.valid_BT, step_T < n_scored_B[:, None]], dim=1)
    made_BTV = lm.model(
        input_ids=ids_BT,
        attention_mask=lm.mask(query_BT, key_BK, valid_BK),
        position_ids=query_BT,
        past_key_values=_cache(prompt),
        use_cache=True,
    ).logits
    return lm.at_home(made_BTV)


def _cache(prompt: PromptBatch) -> DynamicCache:
    """Keys and values of all but the last token. A copy, appended to by copying: the engine's own
    cache is written in place, which gradients can't go through."""
    cache = DynamicCache()
    if prompt.rows.shape[1] > 1:
        for index, kv_N2HE in enumerate(prompt.store.kv_L):
            rows = prompt.rows[:, :-1].to(kv_N2HE.device)
            keys, values = kv_N2HE[rows].permute(2, 0, 3, 1, 4)
            cache.update(keys, values, index)
    return cache


def log_probs(lm: LanguageModel, logits_BTV: Tensor, answers: Sequence[Forced]) -> Tensor:
    """Log-probability [B, T] of each answer's tokens and its end (any of the model's end tokens),
    in nats; 0 past them."""
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    log_prob_BTV = logits_BTV.to(wide).log_softmax(dim=-1)
    width = logits_BTV.shape[1]
    token_BT = torch.zeros(len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        token_BT[row, : len(answer.tokens)] = torch.tensor(answer.tokens, dtype=torch.long)
    log_prob_BT = log_prob_BTV.gather(2, token_BT.to(log_prob_BTV.device)[:, :, None])[:, :, 0]
    length_B1 = torch.tensor([[len(answer.tokens)] for answer in answers])
    ended_B1 = torch.tensor([[answer.ended] for answer in answers])
    step_T = torch.arange(width)
    at_end_BT = ((step_T == length_B1) & ended_B1).to(log_prob_BT.device)
    scored_BT = (step_T < length_B1).to(log_prob_BT.device) | at_end_BT
    ids = sorted(lm.eos_ids)
    if ids and bool(at_end_BT.any()):
        log_prob_BT = torch.where(at_end_BT, log_prob_BTV[:, :, ids].logsumexp(-1), log_prob_BT)
    return log_prob_BT.masked_fill(~scored_BT, 0.0)


def gradients(
    lm: LanguageModel,
    prompt: PromptBatch,
    answers: Sequence[Forced],
    objective: Callable[[Tensor], Tensor],
    weight_T: Tensor,
) -> Tensor:
    """Derivative [S, D] of an objective by a vector that is added to the residual at every position
    of every row, `weight_T` times it at position t; for each site by itself. One backward pass.

    objective: of the logits [B, T, V], a number. Raises `UserError` where weights of the model are
    kept off the GPUs.
    """
    refuse_kept_elsewhere(lm.model, lm.name, "method=attribution")
    sites = range(-1, lm.n_layers)
    zero_SD = torch.zeros(len(sites), lm.d_model, dtype=lm.dtype, device=lm.device)
    added_SD = zero_SD.requires_grad_()

    def add(index: int, hidden_BTD: Tensor) -> Tensor:
        weight_T1 = weight_T[: hidden_BTD.shape[1], None].to(hidden_BTD)
        return hidden_BTD + weight_T1 * added_SD[index]

    see = {site: partial(add, index) for index, site in enumerate(sites)}
    with torch.enable_grad(), hooks(lm, see):
        (gradient_SD,) = torch.autograd.grad(objective(logits(lm, prompt, answers)), added_SD)
    return gradient_SD


def bytes_a_row(lm: LanguageModel, n_prompt: int, n_scored: int, backward: bool) -> int:
    """Rough memory of one row: prompt and answer as in decoding, scores of the vocabulary at each
    position, and for the way back what each layer keeps."""
    vocabulary = lm.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    scores = 4 * vocabulary * n_scored * (4 if backward else 3)
    kept = 40 * lm.d_model * lm.n_layers * n_scored * lm.dtype.itemsize if backward else 0
    return bytes_to_decode(lm, n_prompt + n_scored) + scores + kept
