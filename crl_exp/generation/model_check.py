"""Does the engine compute what the model itself would? Asked once for every model that is loaded.

The engine keeps prompts, pads them, builds masks and positions by its own rules and skips layers.
An architecture that works otherwise (linear biases on distances, recurrent states, other caches,
positions that depend on the longest row) would give wrong residuals without an error. So short
prompts and a long one go both ways together, and a short one beside one at the last positions that
the model takes, and are compared.
Shapes: B rows, T tokens, D d_model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.sites import hooks

NEW_TOKENS = 3
LONG = 80
"""Tokens of the long prompt; more where a sliding window is little longer."""
LONGEST = 320
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
PROBABILITY_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest sum of differences between two distributions that rounding can make."""


class _Watch(Controller):
    """Acts at its sites but adds nothing. seen: by site, row and token, the residual [D]."""

    def __init__(self, sites: list[int]):
        super().__init__({site: site for site in sites})
        self.seen: dict[int, dict[tuple[int, int], Tensor]] = {site: {} for site in sites}

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        for row, x_D in zip(context.row_B.tolist(), x_BD.float(), strict=True):
            self.seen[layer][row, context.token_index] = x_D
        return None


def checked(lm: LanguageModel) -> LanguageModel:
    """The model, if the engine is right about it. Raises `UserError` where it isn't."""
    refused = f"model {lm.name} ({type(lm.model).__name__}) can't be steered by this engine: "
    mend = ". Choose an architecture like Llama, Gemma-2, Qwen, GPT-2 or GPT-NeoX by model=…"
    try:
        error = largest_error(lm)
        if error < TOLERANCE[lm.dtype]:
            error = error_beside_a_long_row(lm)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a foreign architecture does with our calls
        raise UserError(f"{refused}{type(failure).__name__}: {failure}{mend}") from failure
    if not error < TOLERANCE[lm.dtype]:
        raise UserError(
            f"{refused}residuals of a padded batch with kept prompts differ by {error:.1%} from "
            f"those of the model run plainly{mend}"
        )
    return lm


@torch.no_grad()
def largest_error(lm: LanguageModel) -> float:
    """Largest ‖engine's residual − the model's own‖ / ‖the model's own‖, over rows and tokens."""
    size = lm.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    long = [7 + 5 * i % 13 for i in range(_long(lm))]
    prompts = [[i % size for i in ids] for ids in ([11, 12, 13, 14, 15, 16], [11, 12, 17], long)]
    middle, last = lm.n_layers // 2, lm.n_layers - 1
    watch = _Watch(sorted({middle, last}))
    engine = Engine(lm, EngineConfig(batch_size=len(prompts), keep_gib=1.0, decode="eager"))
    answers = engine.generate(
        engine.read(prompts), [Job(watch, range(len(prompts)))], NEW_TOKENS
    )[0]  # fmt: skip
    errors = []
    for row, prompt in enumerate(prompts):
        plain = _plain(lm, [*prompt, *answers.tokens[row]], sorted(watch.sites))
        for site, seen in watch.seen.items():
            for t in range(min(len(answers.tokens[row]) + 1, NEW_TOKENS)):
                expected_D = plain[site][len(prompt) - 1 + t]
                errors.append(float((seen[row, t] - expected_D).norm() / expected_D.norm()))
    return max(errors) if all(e == e for e in errors) else float("nan")


def _long(lm: LanguageModel) -> int:
    """Tokens of the long prompt: more than the window, where that can be had cheaply."""
    length = LONG
    if lm.window is not None and lm.window < LONGEST:
        length = max(length, lm.window + NEW_TOKENS)
    return length if lm.max_positions is None else min(length, lm.max_positions - NEW_TOKENS)


@torch.no_grad()
def error_beside_a_long_row(lm: LanguageModel) -> float:
    """As `largest_error`, of a short row beside one that stands at the last positions.

    A prompt that long would take minutes; the positions alone tell whether they change the others.
    """
    size, last = lm.model.get_input_embeddings().num_embeddings, lm.n_layers - 1  # type: ignore[operator]
    if lm.max_positions is None:
        return 0.0
    ids_T = [i % size for i in (11, 12, 13, 14)]
    step_T = torch.arange(len(ids_T), device=lm.device)
    at_BT = torch.stack([step_T, step_T + lm.max_positions - len(ids_T)])
    found: list[Tensor] = []
    with hooks(lm, {last: found.append}):
        lm.decoder(
            input_ids=torch.tensor([ids_T, ids_T], device=lm.device),
            attention_mask=lm.mask(at_BT, at_BT, torch.ones_like(at_BT, dtype=torch.bool)),
            position_ids=at_BT,
            use_cache=False,
        )
    expected_D = _plain(lm, ids_T, [last])[last][-1]
    return float((found[0][0, -1].float() - expected_D).norm() / expected_D.norm())


@torch.no_grad()
def check_log_probs(lm: LanguageModel) -> None:
    """Raise `UserError` where `log_probs` isn't what the model gives (it scales its logits, say):
    for options of several tokens, whose sums need more than the order of the logits."""
    size = lm.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids_1T = torch.tensor([[i % size for i in (11, 12, 13, 14)]], device=lm.device)
    right_V = lm.model(input_ids=ids_1T).logits[0, -1].float().softmax(dim=-1)
    hidden_1TD = lm.decoder(input_ids=ids_1T).last_hidden_state
    error = float((lm.log_probs(hidden_1TD[:, -1])[0].exp() - right_V).abs().sum())
    if not error < PROBABILITY_ERROR[lm.dtype]:
        raise UserError(
            f"task.choices: {lm.name} ({type(lm.model).__name__}) makes other probabilities of its "
            f"logits than are known here (they differ by {error:.1%}), so options of several "
            "tokens can't be compared; choose options of one token each, letters say"
        )


def _plain(lm: LanguageModel, tokens: list[int], sites: list[int]) -> dict[int, Tensor]:
    """Residuals [T, D] at these sites when the model runs as transformers runs it, with no mask or
    position of ours, so not by `models.activations`."""
    found: dict[int, Tensor] = {}
    with hooks(lm, {site: partial(found.__setitem__, site) for site in sites}):
        ids_1T = torch.tensor([tokens], device=lm.device)
        lm.model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
    return {site: hidden_BTD[0].float() for site, hidden_BTD in found.items()}
